# SPDX-License-Identifier: Apache-2.0
"""What fits gain by a second process.

python -m benchmarks.scale processes [FOLDER]
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks.memory import write_photographs
from benchmarks.results import put_between

from . import processes

README = Path(__file__).with_name("README.md")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("processes", help="fit on one process and on two")
    run.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="normal images; by default some are made")
    run.add_argument("--images", type=int, default=300, help="how many are made")
    run.add_argument("--size", type=int, nargs=2, default=(768, 1024), metavar=("HEIGHT", "WIDTH"), help="of these")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--detectors", nargs="+", choices=processes.DETECTORS, default=processes.DETECTORS)
    return parser


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args()
    console = Console(soft_wrap=True)
    load, start = os.getloadavg()[0], time.perf_counter()
    with TemporaryDirectory() as made:
        folder = arguments.folder
        if folder is None:
            folder = Path(made) / "photographs" / "good"
            write_photographs(folder, arguments.images, tuple(arguments.size))
        output = Path(made) / "results"
        output.mkdir()
        try:
            rows = processes.measure(folder, output, arguments.detectors, arguments.rounds)
        except RuntimeError as error:
            said = "".join(path.read_text(encoding="utf-8")[-4000:] for path in sorted(output.glob("errors-*.log")))
            Console(stderr=True, soft_wrap=True).print(f"{error}{said}", markup=False, highlight=False)
            return 1
    command = shlex.join(["python", "-m", "benchmarks.scale", *sys.argv[1:]])
    said = (
        f"`{command}`: {arguments.rounds} rounds, {time.perf_counter() - start:.0f} s in all, on {os.cpu_count()} "
        f"processors, with a load average of {load:.1f} from other work at the start."
    )
    text = processes.table(rows, said)
    console.print(text, markup=False, highlight=False)
    if put_between(README, "processes", text):
        console.print(f"Written: {README}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
