# SPDX-License-Identifier: Apache-2.0
"""A fit on two processes against the same on one: seconds, and whether the same comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.tables import markdown

ROOT = Path(__file__).parents[2]
DETECTORS = ("EmbeddingFlow", "FeatureMapFlow")
BAR = 1.7
"""The least speed-up of two processes."""
TOLERANCE = 1e-3
"""Maps are stored in 16 bits, and two processes add in another order."""
COUNTS = (1, 2)


def measure(folder: Path, output: Path, detectors: Sequence[str], rounds: int) -> pd.DataFrame:
    """Fit each detector by turns on one and on two processes of one thread each.

    Args:
        folder: Of images, all of them normal.
        output: Where detectors are written.
        detectors: Names of classes.
        rounds: How often.

    Returns:
        ``detector``, number of ``images`` that it was fitted to, ``round``, ``processes``, ``seconds``, whether all
        processes have ``alike`` states to the bit, and the :func:`difference` from what one process gives.
    """
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        fits = rounds * len(detectors)
        workers = [stack.enter_context(_worker(folder, output, count, fits, detectors)) for count in COUNTS]
        for worker in workers:
            _line(worker, "ready")
        for number in range(rounds):
            for detector in detectors:
                rows.extend({"round": number, **_one_fit(worker)} for worker in workers)
                one, two = (torch.load(output / f"{detector}-{count}.pt") for count in COUNTS)
                rows[-2]["difference"], rows[-1]["difference"] = 0.0, difference(one, two)
    return pd.DataFrame(rows)


@contextmanager
def _worker(
    folder: Path, output: Path, count: int, fits: int, detectors: Sequence[str]
) -> Iterator[subprocess.Popen[str]]:
    """A process that fits when it is told to, and starts others if there are to be more."""
    command = [sys.executable, "-m", "benchmarks.scale.worker", str(folder.absolute()), str(output.absolute())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (output / f"errors-{count}.log").open("w", encoding="utf-8") as errors:
        worker = subprocess.Popen(  # noqa: S603 - this very package
            [*command, str(count), str(fits), *detectors],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        try:
            yield worker
            worker.wait(timeout=60)
        finally:
            worker.kill()
            worker.communicate()


def _one_fit(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return json.loads(_line(worker, "{"))


def _line(worker: subprocess.Popen[str], start: str) -> str:
    """The next line that begins so.

    Raises:
        RuntimeError: If the worker ends without it.
    """
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith(start):
            return line
    msg = f"A fit failed: {worker.args!r}\n"
    raise RuntimeError(msg)


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of two detectors' calibration scores, in their standard deviations.

    Weights may differ by more, and mean the same: a memory bank takes what is farthest from what it has, and rounding
    decides between two positions that are as far.
    """
    one, two = (state["post_processor.calibration"].double() for state in (ours, theirs))
    return float((one - two).abs().max() / one.std()) if one.shape == two.shape else float("inf")


def table(rows: pd.DataFrame, said: str) -> str:
    """What was measured, in Markdown.

    Args:
        rows: As :func:`measure` returns them.
        said: The command and the machine.
    """
    head = [
        "detector",
        "images",
        "one process, s",
        "two, s",
        "speed-up (median)",
        f"≥ {BAR}",
        "processes alike",
        "difference",
    ]
    lines = []
    for (detector, images), part in rows.groupby(["detector", "images"], sort=False):
        seconds = part.pivot_table(index="round", columns="processes", values="seconds")
        ratio = float((seconds[1] / seconds[2]).median())
        apart = float(part["difference"].max())
        cells = (f"{float(seconds[count].median()):.1f}" for count in COUNTS)
        held = "held" if ratio >= BAR else "**not held**"
        alike = "to the bit" if bool(part["alike"].all()) else "**no**"
        equal = f"{apart:.0e}" if apart <= TOLERANCE else f"**{apart:.0e}**"
        lines.append([str(detector), f"{images:,}", *cells, f"{ratio:.2f}", held, alike, equal])
    return f"{said}\n\n{markdown(head, lines)}\n"
