# SPDX-License-Identifier: Apache-2.0
"""The contest's detectors on any folders laid out as MVTec AD, with masks or without.

python -m benchmarks.suite run FOLDER FOLDER ...
python -m benchmarks.suite report
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.contest import contest
from benchmarks.contest.detectors import DETECTORS, ON_EMBEDDINGS
from benchmarks.contest.tasks import MAP_SIZE, SUITE_PARTS, Options
from benchmarks.results import announce_files, positive, refused, seed

from . import report

QUICK = [name for name, detector in DETECTORS.items() if not detector.held_out_loss]
"""The detectors that run by default: all but those which train for as long as they are let."""

SMALL_PARTS = tuple(report.SMALL_PARTS)
"""Parts that need no folders, for detectors on embeddings."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is not finished yet, then report")
    run.add_argument("industrial", nargs="*", type=Path, metavar="FOLDER", help="laid out as MVTec AD")
    run.add_argument(
        "--parts", nargs="+", choices=(*SUITE_PARTS, *SMALL_PARTS), default=SUITE_PARTS, metavar="PART",
        help=f"of {', '.join(SUITE_PARTS)} (the default), {', '.join(SMALL_PARTS)}",
    )  # fmt: skip
    run.add_argument(
        "--detectors", nargs="+", choices=list(DETECTORS), default=QUICK, metavar="NAME",
        help=f"of {', '.join(DETECTORS)}; by default all but those that train for long",
    )  # fmt: skip
    run.add_argument("--seeds", nargs="+", type=seed, default=(0, 1, 2))
    run.add_argument("--root", default="./datasets", help="folder of the data sets of small images")
    run.add_argument("--limit", type=positive, help="a trial on about so many images of each folder, in OUTPUT/trial")
    run.add_argument("--again", action="store_true", help="run what is finished, too: after a change of --detectors")
    reporting = commands.add_parser("report", help="rebuild the tables from the rows")
    for command in (run, reporting):
        command.add_argument("--backbone", default="tf_efficientnet_lite0", help="a timm name or local-dir:FOLDER")
        command.add_argument(
            "--image-size", type=positive, default=MAP_SIZE, help="height and width (default: %(default)s)"
        )
        command.add_argument("--output", type=Path, default=Path("runs/suite"), help="default: %(default)s")
        command.add_argument(
            "--into", nargs="+", type=Path, default=(), metavar="README",
            help="where to put the tables between markers, or the table of all folders alone",
        )  # fmt: skip
    return parser


def _run(options: Options, console: Console) -> None:
    """Run the parts on folders, then those on small images with the detectors that they are for."""
    folders = [part for part in options.parts if part in SUITE_PARTS]
    small = [part for part in options.parts if part in SMALL_PARTS]
    if folders:
        contest.run(replace(options, parts=folders), console)
    if small:
        chosen = [name for name in options.detectors if name in ON_EMBEDDINGS]
        # At their own size, whatever that of the folders.
        contest.run(replace(options, parts=small, detectors=chosen, image_size=None), console)


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = vars(_parser().parse_args())
    command, into, root = (arguments.pop(name) for name in ("command", "into", "output"))
    if arguments.get("limit"):  # a trial's rows keep away from results
        root = root / "trial"
    output = root / f"{contest.backbone_name(arguments['backbone'])}-{arguments['image_size']}"
    console = Console(soft_wrap=True)
    try:
        if command == "run":
            _run(Options(output=output, extras=False, features=root / "features", **arguments), console)
        others = sorted(path.parent for path in root.glob("*/results.csv") if path.parent != output)
        written = report.write([output, *others], into)
    except (ValueError, FileNotFoundError) as error:
        return refused(error)
    Console().print(Markdown((output / "tables.md").read_text(encoding="utf-8")))
    return announce_files(output, written, console)


if __name__ == "__main__":
    sys.exit(main())
