# SPDX-License-Identifier: Apache-2.0
"""What fits gain by a second process, what memory and time they take of many images, and whether reading keeps up.

python -m benchmarks.scale processes [FOLDER]
python -m benchmarks.scale memory
python -m benchmarks.scale loading
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from rich.console import Console

from benchmarks.memory import write_photographs
from benchmarks.results import put_between

from . import loading, memory, processes

README = Path(__file__).with_name("README.md")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("processes", help="fit on one process and on two")
    run.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="normal images; by default some are made")
    run.add_argument("--images", nargs="+", type=int, default=(300,), help="how many are made, one folder each")
    run.add_argument("--size", type=int, nargs=2, default=(768, 1024), metavar=("HEIGHT", "WIDTH"), help="of these")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--detectors", nargs="+", choices=processes.DETECTORS, default=processes.DETECTORS)
    run = commands.add_parser("memory", help="fit to more and more images")
    counts = {memory.EMBEDDINGS: (10_000, 100_000, 300_000, 1_000_000), memory.FILES: (3_000, 10_000, 30_000, 100_000)}
    for kind, default in counts.items():
        run.add_argument(f"--{kind}", nargs="+", type=int, default=default, help="how many, one fit each")
    run = commands.add_parser("loading", help="read photographs for the backbone")
    run.add_argument("--images", type=int, default=240, help="how many are made")
    run.add_argument("--rounds", type=int, default=3)
    return parser


def _processes(arguments: argparse.Namespace, made: Path) -> tuple[str, Callable[[str], str]]:
    """Return how it was measured, and what makes a table of the rest of that line."""
    folders = [arguments.folder]
    if arguments.folder is None:
        folders = [made / f"photographs-{images}" / "good" for images in arguments.images]
        for folder, images in zip(folders, arguments.images, strict=True):
            write_photographs(folder, images, tuple(arguments.size))
    output = made / "results"
    output.mkdir()
    try:
        found = [processes.measure(folder, output, arguments.detectors, arguments.rounds) for folder in folders]
    except RuntimeError as error:
        said = "".join(path.read_text(encoding="utf-8")[-4000:] for path in sorted(output.glob("errors-*.log")))
        msg = f"{error}{said}"
        raise RuntimeError(msg) from error
    rows = pd.concat(found, ignore_index=True)
    return f"{arguments.rounds} rounds, ", partial(processes.table, rows)


def _memory(arguments: argparse.Namespace, made: Path) -> tuple[str, Callable[[str], str]]:
    """As :func:`_processes`; also draws the plot."""
    counts = {kind: getattr(arguments, kind) for kind in (memory.EMBEDDINGS, memory.FILES)}
    memory.write_images(made / "good", max(counts[memory.FILES]))
    rows = memory.measure(counts, memory.FITS, made)
    memory.plot(rows, README.with_name("memory.png"))
    return "", partial(memory.table, rows)


def _loading(arguments: argparse.Namespace, made: Path) -> tuple[str, Callable[[str], str]]:
    """As :func:`_processes`."""
    folder = made / "photographs" / "good"
    loading.write(folder, arguments.images)
    rows, spent_on = loading.measure(folder, arguments.rounds), loading.stages(folder)
    return f"{arguments.rounds} rounds, ", partial(loading.table, rows, spent_on)


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args()
    console = Console(soft_wrap=True)
    load, start = os.getloadavg()[0], time.perf_counter()
    measure = {"processes": _processes, "memory": _memory, "loading": _loading}[arguments.command]
    try:
        with TemporaryDirectory() as made:
            how, table = measure(arguments, Path(made))
    except RuntimeError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), markup=False, highlight=False)
        return 1
    command = shlex.join(["python", "-m", "benchmarks.scale", *sys.argv[1:]])
    text = table(
        f"`{command}`: {how}{time.perf_counter() - start:.0f} s in all, on {os.cpu_count()} processors, with a load "
        f"average of {load:.1f} from other work at the start."
    )
    console.print(text, markup=False, highlight=False)
    if put_between(README, arguments.command, text):
        console.print(f"Written: {README}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
