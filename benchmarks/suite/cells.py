# SPDX-License-Identifier: Apache-2.0
"""What is written in the cells of the suite's tables, and how many columns a terminal has room for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from benchmarks.tables import markdown

WIDTH = 80
"""Characters of a terminal: what does not fit beside each other goes into tables below."""


def three(value: float, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """A difference, or a dash where there is none."""
    return "–" if pd.isna(value) else f"{value:+.3f}".replace("-", "−").replace("−0.000", "+0.000")


def column(values: pd.Series, show: Callable[[float], str] = three) -> list[str]:
    """Cells in three digits, the highest bold."""
    highest = values.round(3).max()
    return [f"**{show(value)}**" if round(value, 3) == highest else show(value) for value in values]


def side_by_side(
    lines: pd.Index, columns: Mapping[str, Sequence[str]], head: str = "detector", room: int | None = WIDTH
) -> list[str]:
    """Tables with the same lines, so many columns in each as there is room for.

    Args:
        lines: What each line is about.
        columns: Cells by title.
        head: Title of the first column.
        room: Characters in a line; ``None`` for one table.
    """
    first = max(map(len, [head, *map(str, lines)]))
    groups: list[list[str]] = []
    left = 0
    for name, cells in columns.items():
        width = 2 + max(len(cell.strip("*")) for cell in (name, *cells))  # what is bold has asterisks in the file alone
        if not groups or (room is not None and width > left):
            groups.append([])
            left = (room or 0) - first - 2
        groups[-1].append(name)
        left -= width
    return [
        markdown(
            [head, *group],
            [list(line) for line in zip(map(str, lines), *(columns[name] for name in group), strict=True)],
        )
        for group in groups
    ]
