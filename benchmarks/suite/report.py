# SPDX-License-Identifier: Apache-2.0
"""One table for each part: a line for each detector, means over the folders and what it reaches on each of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.contest.tasks import SUITE_PARTS
from benchmarks.results import publish, rows_to_report
from benchmarks.tables import markdown, short_number

TITLES = {"industrial": "A model for each folder", "unified": "One model for all folders"}

SIDE_BY_SIDE = 6
"""Folders that have their columns in one table; more go into tables below it."""


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


def _tables(order: pd.Index, columns: dict[str, list[str]], first: dict[str, list[str]] | None = None) -> list[str]:
    """Tables with the detectors in this order, so many folders in each; the first one has other columns before."""
    texts = []
    names = list(columns)
    for start in range(0, max(1, len(names)), SIDE_BY_SIDE):
        chosen = dict(first or {}) if start == 0 else {}
        chosen |= {name: columns[name] for name in names[start : start + SIDE_BY_SIDE]}
        lines = [list(cells) for cells in zip(order, *chosen.values(), strict=True)]
        texts.append(markdown(["detector", *chosen], lines))
    return texts


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
    texts = [f"Mean over {folders} folder{'s' * (folders > 1)}, and image AUROC on each:"]
    texts += _tables(table.index, _per_folder(shown, table.index, "auroc"), means)
    with_maps = shown[shown["aupro"].notna()]
    if not with_maps.empty:
        order = table.index[table.index.isin(with_maps["detector"])]
        texts += ["AUPRO where there are masks:", *_tables(order, _per_folder(with_maps, order, "aupro"))]
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
