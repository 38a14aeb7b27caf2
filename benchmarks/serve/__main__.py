# SPDX-License-Identifier: Apache-2.0
"""What `flowood serve` answers in a second, beside the model alone, and that nothing is lost when it is stopped.

    python -m benchmarks.serve [MODEL …] [--files FOLDER] [--senders 8] [--seconds 3] [--rounds 5]

Without models both detectors on backbones are fitted with their defaults to synthetic photographs, and served by
PyTorch and by OpenVINO.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from rich.console import Console

import anomalib_flowood
from anomalib_flowood import OneClass
from anomalib_flowood.data import image_files
from anomalib_flowood.inference import Detector
from benchmarks.fits import quiet, quiet_engine
from benchmarks.memory import write_photographs
from benchmarks.results import put_between
from benchmarks.serve.load import served
from benchmarks.tables import markdown

README = Path(__file__).with_name("README.md")
FITTED = ("EmbeddingFlow", "FeatureMapFlow")
IMAGES = 100


class Row(NamedTuple):
    """What was measured of one model: in each round requests/s, images/s of the model alone, seconds of the answers."""

    name: str
    requests: list[float]
    bare: list[float]
    seconds: list[float]
    alone: list[float]
    lost: int


def fitted(folder: Path, output: Path) -> Iterator[tuple[str, Path]]:
    """Fit detectors to a folder of normal images; names, and checkpoints and exports."""
    for name in FITTED:
        with quiet():
            engine = quiet_engine(output / name, ())
            detector = getattr(anomalib_flowood, name)(visualizer=False)
            engine.fit(detector, datamodule=OneClass(folder.parent, folder.name, val_split_ratio=0.2))
            checkpoint = output / f"{name}.ckpt"
            engine.trainer.save_checkpoint(checkpoint, weights_only=True)
            yield f"{name}, PyTorch", checkpoint
            exported = engine.export(detector, "openvino", export_root=output / name)
            assert exported is not None
            yield f"{name}, OpenVINO", exported


def bare_rate(detector: Detector, files: Sequence[bytes], seconds: float) -> float:
    """Images/s of the model alone: images that were read beforehand, as many at once as it takes."""
    read = list(islice(detector.read(files), detector.images_at_once))
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += sum(len(part) for part in detector.score_read(read))
    return count / (time.perf_counter() - start)


def measure(
    models: Sequence[tuple[str, Path]], files: Sequence[bytes], senders: int, seconds: float, rounds: int, output: Path
) -> list[Row]:
    """Measure all models in turns."""
    rows = []
    with ExitStack() as stack:
        servers = [stack.enter_context(served(path, output / f"errors-{n}.log")) for n, (_, path) in enumerate(models)]
        detectors = [anomalib_flowood.load(path) for _, path in models]
        found: list[list[list[float]]] = [[[], [], [], []] for _ in models]
        for number in range(rounds + 1):  # the first warms up
            for server, detector, (requests, bare, took, alone) in zip(servers, detectors, found, strict=True):
                many = server.keep_busy(files, senders, seconds)
                one = server.keep_busy(files, 1, seconds / 2)
                rate = bare_rate(detector, files, seconds)
                if number:
                    requests.append(len(many) / seconds)
                    bare.append(rate)
                    took += many
                    alone += one
        for server, (name, _), (requests, bare, took, alone) in zip(servers, models, found, strict=True):
            rows.append(Row(name, requests, bare, took, alone, server.stop_under_load(files, senders)))
    return rows


def table(rows: Sequence[Row], senders: int) -> str:
    """What was measured, in Markdown."""
    head = ["served", "requests/s", "model alone, images/s", "ratio (median)", f"p50, {senders} senders, ms", "p99, ms"]
    head += ["p50, 1 sender, ms", "p99, ms", "lost when stopped"]
    lines = []
    for row in rows:
        ratio = np.median(np.divide(row.requests, row.bare))
        times = [np.percentile(seconds, share) * 1e3 for seconds in (row.seconds, row.alone) for share in (50, 99)]
        rates = [f"{np.median(rate):,.0f}" for rate in (row.requests, row.bare)]
        lines.append([row.name, *rates, f"{ratio:.2f}", *(f"{ms:,.0f}" for ms in times), str(row.lost)])
    return markdown(head, lines)


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--files", type=Path, metavar="FOLDER", help="images to send; by default synthetic ones")
    parser.add_argument("--senders", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    console, load = Console(soft_wrap=True), os.getloadavg()[0]
    with TemporaryDirectory() as folder:
        made = Path(folder) / "photographs" / "good"
        write_photographs(made, IMAGES, (480, 640))
        files = [path.read_bytes() for path in image_files(given.files or made)]
        models = [(str(path), path) for path in given.models] or list(fitted(made, Path(folder)))
        rows = measure(models, files, given.senders, given.seconds, given.rounds, Path(folder))
    command = shlex.join(["python", "-m", "benchmarks.serve", *sys.argv[1:]])
    said = (
        f"`{command}`: {given.rounds} rounds of {given.seconds:g} s on {os.cpu_count()} processors, with a load "
        f"average of {load:.1f} from other work at the start."
    )
    text = f"{said}\n\n{table(rows, given.senders)}\n"
    console.print(text, markup=False, highlight=False)
    if not given.models and put_between(README, "serve", text):
        console.print(f"Written: {README}", markup=False, highlight=False)
    return 1 if any(row.lost for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
