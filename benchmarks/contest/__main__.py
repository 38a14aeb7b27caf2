# SPDX-License-Identifier: Apache-2.0
"""Our detectors, anomalib's and plain baselines on the same backbone weights.

python -m benchmarks.contest run --industrial shared/data/magnetic_tile
python -m benchmarks.contest report
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.results import announce, positive, refused, seconds, seed

from . import contest, report
from .detectors import DETECTORS
from .tasks import PARTS, Options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is not finished yet, then report")
    run.add_argument(
        "--industrial", nargs="+", type=Path, default=(), metavar="FOLDER", help="laid out as MVTec AD, masks or none"
    )
    run.add_argument("--mvtec", type=Path, metavar="ROOT", help="MVTec AD, with a folder per category")
    run.add_argument("--visa", type=Path, metavar="ROOT", help="VisA")
    run.add_argument("--categories", nargs="+", default=(), help="of --mvtec and --visa; all by default")
    run.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    run.add_argument("--detectors", nargs="+", choices=list(DETECTORS), default=(), metavar="NAME", help="some only")
    run.add_argument("--tasks", nargs="+", default=(), metavar="TEXT", help="tasks with such words in their name")
    run.add_argument("--seeds", nargs="+", type=seed, default=(0, 1, 2))
    run.add_argument("--backbone", default="tf_efficientnet_lite0", help="a timm name or local-dir:FOLDER")
    run.add_argument("--root", default="./datasets", help="folder of the data sets that are given by name")
    run.add_argument("--cap", type=seconds, metavar="SECONDS", help="of trainings that end when they level off")
    run.add_argument("--limit", type=positive, help="a trial on about so many images, in OUTPUT/trial")
    reporting = commands.add_parser("report", help="rebuild tables and pictures from the rows")
    for command in (run, reporting):
        command.add_argument("--output", type=Path, default=Path("runs/contest"))
        command.add_argument("--into", type=Path, default=report.HERE, help="folder of README.md and the pictures")
    return parser


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = vars(_parser().parse_args())
    command, into = arguments.pop("command"), arguments.pop("into")
    console = Console(soft_wrap=True)
    if arguments.get("limit"):  # a trial's rows and pictures keep away from results
        arguments["output"] = arguments["output"] / "trial"
        into = arguments["output"] if into == report.HERE else into
    output = arguments["output"]
    try:
        if command == "run":
            contest.run(Options(**arguments), console)
        written = report.write(output, into)
    except (ValueError, FileNotFoundError) as error:
        return refused(error)
    return announce(output, written, console)


if __name__ == "__main__":
    sys.exit(main())
