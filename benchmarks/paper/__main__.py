# SPDX-License-Identifier: Apache-2.0
"""The experiments of Kirichenko, Izmailov and Wilson (NeurIPS 2020), small enough for two cores, or as published.

python -m benchmarks.paper run                  # two cores, no GPU
python -m benchmarks.paper run --profile full   # the published settings, on a GPU
python -m benchmarks.paper report
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.results import positive, refused, report_rows

from . import report, study
from .profiles import PARTS, PROFILES, trial

OUTPUTS = {"laptop": Path("runs/paper"), "full": Path("runs/paper_full")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is not finished yet, then report")
    run.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    run.add_argument("--accelerator", help="Lightning's; cpu for laptop and gpu for full by default")
    run.add_argument("--workers", type=positive, help="fits at a time; 2 for laptop and 1 for full by default")
    run.add_argument("--root", default="./datasets", help="folder of the data sets")
    run.add_argument("--limit", type=positive, help="a trial on so many training images, in OUTPUT/trial")
    reporting = commands.add_parser("report", help="rebuild tables and pictures from the rows")
    for command in (run, reporting):
        command.add_argument("--profile", choices=list(PROFILES), default="laptop")
        command.add_argument("--output", type=Path, help="folder of the rows; runs/paper or runs/paper_full by default")
        command.add_argument("--into", type=Path, help="folder of the tables and pictures; beside README.md by default")
    return parser


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args()
    console = Console(soft_wrap=True)
    output, into = arguments.output or OUTPUTS[arguments.profile], arguments.into or report.HERE
    if arguments.profile == "full" and arguments.into is None:  # the README's generated part shows one profile
        into = output
    profile = PROFILES[arguments.profile]
    if arguments.command == "run":
        if arguments.limit:  # a trial's rows and pictures keep away from results
            profile, output = trial(profile, arguments.limit), output / "trial"
            into = arguments.into or output
        if arguments.accelerator:
            profile = replace(profile, accelerator=arguments.accelerator)
        if arguments.workers is not None:
            profile = replace(profile, workers=arguments.workers)
        try:
            study.run(profile, output, arguments.root, arguments.parts, console)
        except (ValueError, FileNotFoundError) as error:
            return refused(error)
    return report_rows(report.write, output, into, console)


if __name__ == "__main__":
    sys.exit(main())
