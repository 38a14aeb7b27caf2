# SPDX-License-Identifier: Apache-2.0
"""``flowood report``: the page of a run. What is wrong with its folder is said before anything slow is imported."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from anomalib_flowood.cli.starting import loading


def add_arguments(parser: ArgumentParser) -> None:
    """Describe the arguments of ``report``."""
    parser.add_argument("folder", type=str, help="Folder that `flowood benchmark` or `flowood test` named.")
    parser.add_argument("--output", type=str, default=None, help="Folder to write to; FOLDER/report if not given.")


def run(arguments: Namespace) -> None:
    """Write the page of a run and say where it is."""
    from anomalib_flowood.report.run import read_run

    folder = Path(arguments.folder)
    read_run(folder)
    with loading("PyTorch and anomalib, by which the images are read"):
        from anomalib_flowood.benchmark import build
        from anomalib_flowood.report.page import write_report

    page = write_report(folder, partial(build, "data"), arguments.output and Path(arguments.output))
    print(f"Page: {page}")
