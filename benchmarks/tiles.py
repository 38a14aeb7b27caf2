# SPDX-License-Identifier: Apache-2.0
"""What memory FeatureMapFlow takes on large photographs that it sees in tiles.

    python -m benchmarks.tiles [--size 6000 8000] [--tile 224] [--images 8] [--backbone tf_efficientnet_lite0]

JPEG photographs of noise on soft shapes are written to a temporary folder. One process fits the detector to them,
another loads its checkpoint and scores one more, a third has ``Engine.predict`` do so. Peaks are of whole processes,
libraries included: the resident set size that the kernel keeps (``ru_maxrss``).
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

import anomalib_flowood

TASKS = {
    "fit": "fit to {images} photographs",
    "load": "anomalib_flowood.load(…).score of one",
    "engine": "Engine.predict of one",
}


def write_photographs(folder: Path, count: int, size: tuple[int, int], seed: int = 0) -> None:
    """Write JPEG files of noise on soft shapes, each moved by chance; height and width."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(30, 220, (15, 20, 3), dtype=np.uint8))
    pixels = np.asarray(blocks.resize(size[::-1], Image.Resampling.BICUBIC)).clip(20, 235)
    repeats = [-(-length // 500) for length in size]
    noise = np.tile(rng.integers(0, 20, (500, 500, 1), dtype=np.uint8), (*repeats, 1))[: size[0], : size[1]]
    pixels = pixels + noise
    for number in range(count):
        moved = np.roll(pixels, rng.integers(0, size[0], 2), (0, 1))
        Image.fromarray(moved).save(folder / f"{number:04d}.jpg", quality=92)


def fit(folder: Path, arguments: argparse.Namespace) -> None:
    from anomalib.engine import Engine

    data = anomalib_flowood.OneClass(
        folder / "photographs",
        "good",
        val_split_ratio=0.25,
        train_batch_size=1,
        eval_batch_size=1,
        memory_limit_mib=0,
    )
    tile = (arguments.tile, arguments.tile)
    detector = anomalib_flowood.FeatureMapFlow(
        arguments.backbone, image_size=arguments.size, tile_size=tile, visualizer=False
    )
    Engine(accelerator="cpu", devices=1, default_root_dir=folder / "results").fit(detector, datamodule=data)


def load(folder: Path, arguments: argparse.Namespace) -> None:
    found = anomalib_flowood.load(_checkpoint(folder)).score(folder / "new")
    assert found.anomaly_map is not None
    assert found.anomaly_map.shape == (1, *arguments.size)
    assert np.isfinite(found.score).all()


def engine(folder: Path, arguments: argparse.Namespace) -> None:
    from anomalib.engine import Engine

    detector = anomalib_flowood.open_checkpoint(_checkpoint(folder))
    detector.visualizer = None
    run = Engine(accelerator="cpu", devices=1, default_root_dir=folder / "predicted")
    (batch,) = run.predict(detector, data_path=folder / "new")
    assert batch.anomaly_map.shape[-2:] == tuple(arguments.size)


def _checkpoint(folder: Path) -> Path:
    return next(folder.glob("results/**/model.ckpt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(6000, 8000), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tile", type=int, default=224)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.size = tuple(arguments.size)
    if arguments.task:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        start = time.perf_counter()
        {"fit": fit, "load": load, "engine": engine}[arguments.task](arguments.folder, arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(peak, time.perf_counter() - start)
        return
    table = Table("", "peak, GiB", "seconds")
    with TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "photographs" / "train" / "good", arguments.images, arguments.size)
        write_photographs(Path(folder) / "new", 1, arguments.size, seed=1)
        for task, what in TASKS.items():
            command = [sys.executable, "-m", "benchmarks.tiles", "--task", task, "--folder", folder]
            command += ["--size", *map(str, arguments.size), "--tile", str(arguments.tile)]
            command += ["--backbone", arguments.backbone]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603
            peak, seconds = map(float, output.split()[-2:])
            table.add_row(what.format(images=arguments.images), f"{peak:.2f}", f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
