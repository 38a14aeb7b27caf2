# SPDX-License-Identifier: Apache-2.0
"""What a benchmark or a test leaves in its folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from anomalib_flowood.files import whole_file, write_table, write_text
from anomalib_flowood.look import typed
from anomalib_flowood.report.maps import write_maps
from anomalib_flowood.report.plots import score_histograms
from anomalib_flowood.report.run import JOB_COLUMNS, RECORD, RESULTS, SCORE_COLUMNS, SCORES, read_run
from anomalib_flowood.report.table import benchmark_markdown, benchmark_table, image_table, set_markdown, set_table

CONFIGURATION = "benchmark.yaml"
"""The configuration in the folder of a benchmark, by which it can go on."""


class Results:
    """The results of a benchmark or a test in a folder, complete after every job.

    Args:
        folder: Where to write; it exists.
        writes: Whether to; only the process of rank 0 does, and the others know what has been done.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder = folder
        self.writes = writes
        self.log = self.folder / "benchmark.log"
        self._results: list[dict[str, Any]] = []
        self._scores: list[pd.DataFrame] = []

    def restore(self) -> None:
        """Take in the jobs that an earlier benchmark has finished in the folder; errors as for :func:`read_run`.

        Failed jobs are left out, and so are scores of a job that was interrupted before it had its row.
        """
        if not (self.folder / RESULTS).is_file():
            return
        run = read_run(self.folder)
        done = run.results[run.results["error"] == ""].drop(columns="error")
        self._results = [{str(name): value for name, value in row.items()} for row in done.to_dict("records")]
        if self.writes and not run.scores.empty:
            self._scores = [run.scores]
            with whole_file(self.folder / SCORES) as file:
                write_table(run.scores[SCORE_COLUMNS], file)

    def has(self, row: dict[str, Any]) -> bool:
        """Whether there is a row of a job already, by what is known of it before it has run."""
        return any(all(result.get(name) == value for name, value in row.items()) for result in self._results)

    @property
    def table(self) -> pd.DataFrame:
        """One row per job."""
        return pd.DataFrame(self._results)  # what a job does not have is empty

    def add(self, result: dict[str, Any], scores: pd.DataFrame, maps: Mapping[str, Any] | None = None) -> None:
        """Take in a finished job and write everything, so that one job at most is lost if the process ends.

        Args:
            result: The job's row.
            scores: One row per test image: ``detector``, ``data``, ``seed``, ``image_path``, ``source``, ``label``,
                ``score``; empty if the job failed.
            maps: Anomaly maps and masks of images that a report shows, see :class:`ScoreRecorder`.
        """
        self._results.append(result)
        if not self.writes:
            return
        write_maps(self.folder, result, maps or {})
        if not scores.empty:  # first, so that no row ever lacks its scores
            first = not self._scores
            with whole_file(self.folder / SCORES) as file:
                if not first:
                    shutil.copyfile(self.folder / SCORES, file)
                write_table(scores[SCORE_COLUMNS], file, mode="w" if first else "a", header=first)
            self._scores.append(scores)
        with whole_file(self.folder / RESULTS) as file:
            write_table(self.table, file)

    def _image_counts(self) -> dict[str, list[int]]:
        """How many test images jobs have seen, for data that changed before the benchmark was resumed."""
        table = self.table
        if "images" not in table:  # all have failed
            return {}
        counts = table.dropna(subset="images").groupby("data")["images"].unique()
        return {str(data): sorted(map(int, some)) for data, some in counts.items() if len(some) > 1}

    def finish(self, console: Console, images: int = 0) -> None:
        """Print the table, draw the histograms and say where everything is.

        Args:
            console: Where to print.
            images: How many inside and outside images to list of each job: those on which it is most wrong.
        """
        if not self._results or not self.writes:
            return
        text = benchmark_markdown(self.table) + set_markdown(self.table)
        write_text(self.folder / "table.md", text)
        console.print(benchmark_table(self.table))
        sets = set_table(self.table)
        if sets is not None:
            console.print(sets)
        if images and self._scores:
            for job, rows in pd.concat(self._scores).groupby(JOB_COLUMNS, sort=False):
                result = next(row for row in self._results if tuple(row[name] for name in JOB_COLUMNS) == job)
                console.print(image_table(result, rows, images))
        for data, counts in self._image_counts().items():
            numbers = " images, others on ".join(f"{count:,}" for count in counts)
            console.out(
                f"{data}: some jobs were tested on {numbers}, so that they cannot be compared. Has the folder changed? "
                f"Then run all anew: flowood benchmark --config {typed(self.folder / CONFIGURATION)}",
                highlight=False,
            )
        names = [RECORD, RESULTS, "table.md"]
        if self._scores:  # of hundreds of jobs it takes minutes
            score_histograms(pd.concat(self._scores), self.folder / "scores.png")
            names += [SCORES, "scores.png"]
        console.out(f"In {self.folder}: {', '.join(names)}", highlight=False)
        console.out(f"As a page: flowood report {typed(self.folder)}", highlight=False)
