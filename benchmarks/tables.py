# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown, and what is written in their cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import pandas as pd


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """Return a table in Markdown.

    Args:
        head: The columns' titles.
        lines: The cells of each line.
        numbers: Whether all columns but the first are of numbers, which stand to the right.
    """
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


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
