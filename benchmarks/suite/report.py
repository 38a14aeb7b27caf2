# SPDX-License-Identifier: Apache-2.0
"""Tables of each part: a line for each detector, with means over the folders, and what it reaches on each of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.contest.tasks import SUITE_PARTS
from benchmarks.results import publish, rows_to_report
from benchmarks.tables import markdown, short_number

TITLES = {"industrial": "A model for each folder", "unified": "One model for all folders"}

WIDTH = 80
"""Characters of a terminal: folders whose columns do not fit beside each other go into tables below."""


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each detector, the best mean rank first.

    Args:
        rows: Those of one part, without failures, of seeds that have every folder.

    Returns:
        By detector: mean image AUROC (``auroc``) and its standard deviation over seeds (``spread``), mean rank by
        image AUROC (``rank``: 1 is the best, those that are level share theirs), mean AUPRO and pixel AUROC over the
        folders that have masks (``aupro``, ``pixel_auroc``), mean seconds of a fit (``fit_s``).
    """
    each = rows.groupby(["detector", "task"])[["auroc", "aupro", "pixel_auroc", "fit_s"]].mean()
    table = each.groupby("detector").mean()
    table["spread"] = rows.groupby(["detector", "seed"])["auroc"].mean().groupby("detector").std()
    table["rank"] = each["auroc"].groupby("task").rank(ascending=False).groupby("detector").mean()
    return table.sort_values(["rank", "auroc"], ascending=[True, False])


def _three(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}"


def _column(values: pd.Series) -> list[str]:
    """Cells in three digits, the highest bold."""
    highest = values.round(3).max()
    return [f"**{_three(value)}**" if round(value, 3) == highest else _three(value) for value in values]


def _per_folder(rows: pd.DataFrame, order: pd.Index, metric: str) -> dict[str, list[str]]:
    """For each folder that has the metric its column."""
    means = rows.groupby(["task", "detector"])[metric].mean().unstack("task").loc[order].dropna(axis=1, how="all")
    return {name: _column(means[name]) for name in means.columns}


def _tables(order: pd.Index, columns: dict[str, list[str]]) -> list[str]:
    """Tables with the detectors in this order, so many columns in each as a terminal has room for."""
    first = max(map(len, ["detector", *order]))
    groups: list[list[str]] = []
    room = 0
    for name, cells in columns.items():
        width = 2 + max(len(cell.strip("*")) for cell in (name, *cells))  # what is bold has asterisks in the file alone
        if not groups or width > room:
            groups.append([])
            room = WIDTH - first - 2
        groups[-1].append(name)
        room -= width
    return [
        markdown(
            ["detector", *group],
            [list(line) for line in zip(order, *(columns[name] for name in group), strict=True)],
        )
        for group in groups
    ]


def _part(rows: pd.DataFrame) -> list[str]:
    """What one part has to show."""
    folders = rows["task"].nunique()
    # Means are over the same folders for all: of the seeds that have them all, and of no other detector.
    whole = rows.groupby(["detector", "seed"])["task"].transform("nunique") == folders
    done = rows[whole]
    rest = rows[~rows["detector"].isin(done["detector"])]
    missing = sorted(set(rest["detector"]))
    table = summary(done)
    table = table.reindex([*table.index, *missing])
    shown = pd.concat([done, rest])
    means = {
        "AUROC ↑": _column(table["auroc"]),
        "± seeds": [_three(value) for value in table["spread"]],
        "rank": ["–" if pd.isna(value) else f"{value:.1f}" for value in table["rank"]],
        "AUPRO ↑": _column(table["aupro"]),
        "pixel ↑": _column(table["pixel_auroc"]),
        "fit s": [short_number(pd.Series([value])) for value in table["fit_s"]],
    }
    texts = [f"Mean over {folders} folder{'s' * (folders > 1)}:", *_tables(table.index, means)]
    texts += ["Image AUROC on each:", *_tables(table.index, _per_folder(shown, table.index, "auroc"))]
    with_maps = shown[shown["aupro"].notna()]
    if not with_maps.empty:
        order = table.index[table.index.isin(with_maps["detector"])]
        texts += ["AUPRO on each that has masks:", *_tables(order, _per_folder(with_maps, order, "aupro"))]
    return [*texts, f"Without a mean, for want of a folder: {', '.join(missing)}."] if missing else texts


def tables(rows: pd.DataFrame) -> str:
    """Return all tables in Markdown.

    Args:
        rows: As :func:`benchmarks.results.read_rows` gives them.

    Returns:
        A section for each part that has rows, and what failed.
    """
    good = rows[rows["error"].isna()]
    texts = []
    for part in SUITE_PARTS:
        some = good[good["part"] == part]
        # "bolts+cups: bolts" is what one model for both reaches on the first.
        names = some["task"].str.extract(r"^(?P<together>.*: )?(?P<folder>.*)$")
        for _, these in some.assign(task=names["folder"]).groupby(names["together"].fillna(""), sort=False):
            texts += [f"### {TITLES[part]}", *_part(these)]
    failures = rows[rows["error"].notna()]
    if len(failures):
        which = {f"{row.detector} on {row.task} ({row.part})" for row in failures.itertuples()}
        texts.append(f"Failed: {'; '.join(sorted(which))}.")
    return "\n\n".join(texts) + "\n"


def write(output: Path, into: Path) -> list[Path]:
    """Rebuild the tables.

    Args:
        output: Folder of the rows.
        into: Folder to which the rows are copied; the tables go between the markers of its README.md, where it has one.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If there are no rows.
    """
    rows = rows_to_report(output)
    into.mkdir(parents=True, exist_ok=True)
    return publish(output, into, "suite", tables(rows), [])
