# SPDX-License-Identifier: Apache-2.0
"""Fits detectors on as many processes as it is told, each fit when a line comes in; Lightning starts it again for more.

python -m benchmarks.scale.worker FOLDER OUTPUT PROCESSES FITS DETECTOR [DETECTOR ...]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from anomalib_flowood import OneClass, models, processes
from anomalib_flowood.engine import RunEngine
from benchmarks.fits import quiet

BATCH = 32
"""Images at once. Processes take batches by turns: few large ones could not be dealt out evenly."""
HELD_OUT = 0.2


class TimedData(OneClass):
    """Notes when a fit begins: when all processes are there, before the data are set up."""

    begin = 0.0

    def setup(self, stage: str | None = None) -> None:
        self.begin = self.begin or time.perf_counter()
        super().setup(stage)


def fit(name: str, folder: Path, output: Path, count: int) -> tuple[int, float, dict[str, Tensor]]:
    """Fit a detector with its defaults; return to how many images, seconds and state."""
    torch.manual_seed(0)
    detector = getattr(models, name)()
    data = TimedData(
        folder.parent, folder.name, val_split_ratio=HELD_OUT, train_batch_size=BATCH, eval_batch_size=BATCH
    )
    engine = RunEngine(
        accelerator="cpu", devices=count, strategy="ddp" if count > 1 else "auto", default_root_dir=output / str(count),
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    engine.fit(detector, datamodule=data)
    return len(data.train_data), time.perf_counter() - data.begin, dict(detector.state_dict())


def main() -> None:
    folder, output = map(Path, sys.argv[1:3])
    count, fits = map(int, sys.argv[3:5])
    names = sys.argv[5:]
    first = not processes.was_started()
    if first:
        print("ready", flush=True)
    for number in range(fits):
        name = names[number % len(names)]
        if first:
            sys.stdin.readline()  # meanwhile the other processes wait for this one, without work
        with quiet():
            images, seconds, state = fit(name, folder, output, count)
        states = processes.gathered_objects(state)
        alike = all(_same(states[0][key], other[key]) for other in states[1:] for key in states[0])
        if first:
            torch.save(state, output / f"{name}-{count}.pt")
            row = {"detector": name, "images": images, "processes": count, "seconds": seconds, "alike": alike}
            print(json.dumps(row), flush=True)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


if __name__ == "__main__":
    main()
