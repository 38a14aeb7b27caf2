# SPDX-License-Identifier: Apache-2.0
"""What memory a fit on photographs takes, above that of the process at rest.

    python -m benchmarks.memory [--images 240] [--size 1200 1600] [--grey] [--workers 0] [--detectors PixelFlow …]

JPEG photographs of noise on soft shapes are written to a temporary folder. Each detector is fitted for one epoch, with
its defaults and the default batch sizes, in a process of its own. The peak is of that process and its workers, without
the pages that these share (``psutil``'s unique set size), looked at every 20 ms.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from anomalib.engine import Engine
from PIL import Image
from rich.console import Console
from rich.table import Table

from anomalib_flowood import OneClass, models

from .peak import Peak

HELD_OUT = 0.2  # 240 images leave 192 to train on: a subspace of 128 dimensions takes more than 128


def write_photographs(folder: Path, count: int, size: tuple[int, int], *, grey: bool = False) -> None:
    """Write JPEG files of noise on soft shapes; height and width."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        blocks = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        shapes = blocks.resize(size[::-1], Image.Resampling.BICUBIC)
        pixels = np.asarray(shapes) + rng.normal(0, 6, (*size, 1))
        photograph = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        (photograph.convert("L") if grey else photograph).save(folder / f"{i:04d}.jpg", quality=92)


def fit(detector: str, folder: Path, workers: int) -> None:
    """Fit, and print MiB at rest, MiB above rest at the peak, and seconds."""
    data = OneClass(folder / "photographs", "good", val_split_ratio=HELD_OUT, num_workers=workers)
    model = getattr(models, detector)(max_epochs=1)
    engine = Engine(
        accelerator="cpu", devices=1, default_root_dir=folder / "results",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    start = time.perf_counter()
    with Peak() as peak:
        engine.fit(model, datamodule=data)
    print((peak.rest or 0) / 2**20, (peak.above_rest or 0) / 2**20, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--size", type=int, nargs=2, default=(1200, 1600), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--grey", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--detectors", nargs="+", choices=models.__all__, default=models.__all__)
    parser.add_argument("--fit-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fit_in is not None:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        fit(arguments.detectors[0], arguments.fit_in, arguments.workers)
        return
    table = Table("detector", "at rest, MiB", "peak above that, MiB", "fit, s")
    with TemporaryDirectory() as folder:
        photographs = Path(folder) / "photographs"
        write_photographs(photographs / "train" / "good", arguments.images, tuple(arguments.size), grey=arguments.grey)
        for label in ("good", "bad"):
            write_photographs(photographs / "test" / label, 10, tuple(arguments.size), grey=arguments.grey)
        for detector in arguments.detectors:
            command = [sys.executable, "-m", "benchmarks.memory", "--fit-in", folder, "--detectors", detector]
            command += ["--workers", str(arguments.workers)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
            table.add_row(detector, *(f"{float(number):,.0f}" for number in output.split()[-3:]))
    Console().print(table)


if __name__ == "__main__":
    main()
