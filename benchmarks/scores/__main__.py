# SPDX-License-Identifier: Apache-2.0
"""All anomaly scores on one flow of pixels, and the score that needs no model.

python -m benchmarks.scores run
python -m benchmarks.scores report
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.results import positive, refused, report_rows, seconds, seed

from . import report, study


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scores", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is not finished yet, then report")
    run.add_argument("--sets", nargs="+", choices=study.SETS, default=study.SETS, help="data sets to train on")
    names = (study.BITS, *study.SCORES)
    run.add_argument("--scores", nargs="+", choices=names, default=names, metavar="NAME", help="some only")
    run.add_argument("--seeds", nargs="+", type=seed, default=(0, 1, 2))
    run.add_argument("--seconds", type=seconds, default=150.0, help="training time of a flow")
    run.add_argument("--images", type=positive, default=2000, help="the most test images of a set")
    run.add_argument("--root", default="./datasets", help="folder of the data sets")
    reporting = commands.add_parser("report", help="rebuild tables and picture from the rows")
    for command in (run, reporting):
        command.add_argument("--output", type=Path, default=Path("runs/scores"))
        command.add_argument("--into", type=Path, default=report.HERE, help="folder of README.md and the picture")
    return parser


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = vars(_parser().parse_args())
    command, into = arguments.pop("command"), arguments.pop("into")
    console = Console(soft_wrap=True)
    output = arguments["output"]
    if command == "run":
        try:
            study.run(study.Options(**arguments), console)
        except (ValueError, FileNotFoundError) as error:
            return refused(error)
    return report_rows(report.write, output, into, console)


if __name__ == "__main__":
    sys.exit(main())
