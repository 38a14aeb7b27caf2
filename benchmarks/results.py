# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: rows of results that outlive an interruption, tables of them, and where both are shown."""

from __future__ import annotations

import csv
import logging
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from rich.console import Console

KEY = ("part", "task", "detector", "seed")
"""What tells one row from another."""


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def read_rows(output: Path) -> pd.DataFrame:
    """Return the last row of every key; failures included."""
    path = output / "results.csv"
    if not path.is_file():
        return pd.DataFrame(columns=[*KEY, "error"])
    rows = pd.read_csv(path, dtype={"task": str, "detector": str, "error": str, "stopped_by": str})
    return rows.drop_duplicates(list(KEY), keep="last", ignore_index=True)


def append_rows(output: Path, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """Add rows to ``results.csv``, whose columns these are."""
    path = output / "results.csv"
    output.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def check_columns(output: Path, columns: Sequence[str]) -> None:
    """Refuse rows of a version that measured other things: new ones would not fit below them.

    Raises:
        ValueError: If ``results.csv`` is there and has other columns than these.
    """
    path = output / "results.csv"
    if not path.is_file():
        return
    found = list(pd.read_csv(path, nrows=0).columns)
    if found != list(columns):
        differ = sorted(set(found) ^ set(columns)) or ["their order"]
        msg = (
            f"{path} was written by a version that measured other things ({', '.join(differ)}). Move it away, or name "
            "another folder with --output."
        )
        raise ValueError(msg)


def finished(output: Path) -> set[tuple[str, str, str, int]]:
    """Return the keys of the rows that need not be run again."""
    rows = read_rows(output)
    done = rows[rows["error"].isna()]
    return set(zip(done["part"], done["task"], done["detector"], done["seed"].astype(int), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Fits
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what anomalib and Lightning have to say about every fit."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


class TimeLimit(Timer):
    """Ends a training after a number of seconds, over which the learning rate follows a cosine down to zero.

    The detectors' own cosine is over the trainer's steps, and how many fit into the time nobody knows beforehand.

    Args:
        seconds: Time from the first batch on; ``None`` to measure it only.
    """

    def __init__(self, seconds: float | None) -> None:
        super().__init__(None if seconds is None else timedelta(seconds=seconds), verbose=False)
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate."""
        del batch, batch_idx
        if self.seconds is None:
            return
        detector: Any = pl_module
        share = min(1.0, self.time_elapsed() / self.seconds)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = detector.learning_rate * (1 + math.cos(math.pi * share)) / 2


def trained_epochs(trainer: Trainer) -> float:
    """Epochs trained, a broken-off one by its share."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    return round(batches / max(1, trainer.num_training_batches), 2)


def clock_time(seconds: float) -> str:
    """Write a duration as hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def mean_sd(values: pd.Series) -> str:
    """Mean, and standard deviation where there is more than one value."""
    values = values.dropna()
    if values.empty:
        return "–"
    text = f"{values.mean():.3f}"
    return f"{text} ± {values.std():.3f}" if len(values) > 1 else text


def short_number(values: pd.Series) -> str:
    """A mean in three significant digits."""
    values = values.dropna()
    if values.empty:
        return "–"
    mean = float(values.mean())
    digits = 0 if mean == 0 else max(0, 2 - math.floor(math.log10(abs(mean))))
    return f"{mean:,.{min(digits, 3)}f}"


class Column:
    """A column of a table.

    Args:
        title: Its head.
        name: The column of the rows.
        show: Writes the values of a detector, one for each seed.
        best: ``max`` or ``min``, for the best to be found; ``None`` where none is.
        where: Which of a detector's rows count; all by default.
    """

    def __init__(
        self,
        title: str,
        name: str,
        show: Callable[[pd.Series], str] = mean_sd,
        best: Callable[[pd.Series], float] | None = None,
        where: Callable[[pd.DataFrame], pd.Series] | None = None,
    ) -> None:
        self.title, self.name, self.show, self.best, self.where = title, name, show, best, where

    def values(self, rows: pd.DataFrame) -> pd.Series:
        """One value for each seed: the mean over the tasks."""
        rows = rows if self.where is None else rows[self.where(rows)]
        return rows.groupby("seed")[self.name].mean()


# ---------------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------------


def rows_to_report(output: Path) -> pd.DataFrame:
    """Return the rows of a benchmark that has run.

    Raises:
        FileNotFoundError: If there are none.
    """
    rows = read_rows(output)
    if rows.empty:
        msg = f"There are no rows in {output}: run the benchmark first."
        raise FileNotFoundError(msg)
    return rows


def publish(output: Path, into: Path, name: str, text: str, pictures: Sequence[tuple[str, str]]) -> list[Path]:
    """Write tables, copy the rows, and show both in a README.

    Args:
        output: Folder of the rows, in which ``tables.md`` is written.
        into: Folder of the pictures, to which the rows are copied. Text and pictures go between the markers of its
            README.md, ``<!-- name: begin -->`` and ``<!-- name: end -->``, where it has them.
        name: The benchmark's, in the markers.
        text: The tables in Markdown.
        pictures: File names of the pictures, and their captions.

    Returns:
        What was written, the pictures included.
    """
    (output / "tables.md").write_text(text, encoding="utf-8")
    written = [output / "tables.md"]
    if into != output:
        written.append(Path(shutil.copyfile(output / "results.csv", into / "results.csv")))
    written += [into / file for file, _ in pictures]
    readme = into / "README.md"
    if readme.is_file():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        shown = "".join(f"\n![{caption}]({file})\n" for file, caption in pictures)
        before = readme.read_text(encoding="utf-8")
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if pattern.search(before):
            readme.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}{shown}\n{end}", before), encoding="utf-8")
            written.append(readme)
    return written


def announce(output: Path, written: Sequence[Path], console: Console) -> int:
    """Print the tables, what was written and what failed; returns the exit status."""
    console.print((output / "tables.md").read_text(encoding="utf-8"), markup=False, highlight=False)
    console.print(f"Written: {', '.join(map(str, written))}", markup=False, highlight=False)
    failed = read_rows(output)["error"].notna().sum()
    if failed:
        console.print(f"{failed} rows failed; see {output / 'errors.log'}. Run again to retry them.", highlight=False)
    return 1 if failed else 0


def report_rows(write: Callable[[Path, Path], Sequence[Path]], output: Path, into: Path, console: Console) -> int:
    """Rebuild a benchmark's tables and pictures and :func:`announce` them; returns the exit status.

    Args:
        write: Does so from the rows in its first folder, into its second, and returns what it wrote.
        output: Folder of the rows.
        into: Folder of the README and the pictures.
        console: Where to print.
    """
    try:
        written = write(output, into)
    except FileNotFoundError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {error}")
        return 2
    return announce(output, written, console)
