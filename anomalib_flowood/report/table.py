# SPDX-License-Identifier: Apache-2.0
"""One row per detector and data set, for a terminal and as Markdown; and one per out-of-distribution set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from anomalib_flowood.look import shorten
from anomalib_flowood.metrics import MEAN, MOST_SETS, NOT_DEFINED, groups_of

METRICS = ("AUROC", "FPR95", "fit_duration", "images_per_s")
SET_METRICS = ("AUROC", "FPR95")
TITLES = {"AUROC": "AUROC ↑", "FPR95": "FPR95 ↓", "fit_duration": "fit s", "images_per_s": "images/s", "seeds": "seeds"}
"""Headings of the columns of numbers."""
NAMES = {"detector": "detector", "data": "data"}
SET_NAMES = NAMES | {"set": "outside"}
"""Headings of the columns of text, of all images together and of each set."""
_RATIOS = {"detector": 3, "data": 2, "set": 1}
_ERROR = 160
"""The most characters of an error in a cell."""


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Gather a benchmark's jobs into one row per detector and data set.

    Args:
        results: One row per job with the columns ``detector``, ``data``, ``seed``, ``AUROC``, ``FPR95``,
            ``fit_duration``, ``images_per_s`` and ``error`` (empty or missing where the job succeeded).

    Returns:
        A row per detector and data set, data by data in order of first appearance: the means over seeds,
        ``AUROC_std`` and ``FPR95_std`` (NaN for a single seed), ``seeds`` (how many succeeded), ``best`` (whether no
        other detector has a higher AUROC on these data) and ``error`` (the first one, or an empty string).
    """
    frame = results.reindex(columns=["detector", "data", "seed", *METRICS, "error"])
    rows = []
    for (detector, data), group in frame.groupby(["detector", "data"], sort=False):
        errors = [error for error in group["error"] if isinstance(error, str) and error]
        done = group[~group["error"].map(lambda error: isinstance(error, str) and bool(error))]
        values = done[list(METRICS)].astype(float)
        rows.append(
            {
                "detector": detector,
                "data": data,
                **{name: values[name].mean() for name in METRICS},
                **{f"{name}_std": values[name].std(ddof=1) for name in ("AUROC", "FPR95")},
                "seeds": len(done),
                "error": errors[0] if errors else "",
            },
        )
    summary = pd.DataFrame(rows).sort_values("data", kind="stable", key=_first_seen, ignore_index=True)
    # Compared as printed: a difference nobody can see does not make a winner.
    shown = summary["AUROC"].round(3)
    summary["best"] = shown.eq(shown.groupby(summary["data"]).transform("max"))
    return summary


def _first_seen(column: pd.Series) -> pd.Series:
    """Sort key that keeps data sets in the order of the configuration."""
    return pd.Series(pd.factorize(column)[0], index=column.index)


def _number(value: float, std: float, digits: int, missing: str = "-") -> str:
    if math.isnan(value):
        return missing
    text = f"{value:,.{digits}f}"
    return text if math.isnan(std) else f"{text} ± {std:.{digits}f}"


def cells_of(row: pd.Series) -> dict[str, str]:
    """The numbers of one row as text; a metric that is missing although a job succeeded is not defined."""
    nan = float("nan")
    rate = row["images_per_s"]
    missing = NOT_DEFINED if row["seeds"] else "-"
    return {
        "AUROC": _number(row["AUROC"], row["AUROC_std"], 3, missing),
        "FPR95": _number(row["FPR95"], row["FPR95_std"], 3, missing),
        "fit_duration": _number(row["fit_duration"], nan, 1 if row["fit_duration"] < 100 else 0),
        "images_per_s": _number(rate, nan, 1 if rate < 10 else 0),
        "seeds": str(row["seeds"]),
    }


def image_table(job: Mapping[str, Any], scores: pd.DataFrame, count: int) -> Table:
    """List the images on which a job is most wrong: the most anomalous inside ones, the least anomalous outside ones.

    Args:
        job: Its row of ``results.csv``.
        scores: Its test images: ``image_path``, ``source``, ``label`` and ``score``.
        count: How many of each.
    """
    title = f"{job['detector']} on {job['data']}, seed {job['seed']}"
    table = Table(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left")
    table.add_column("image", overflow="fold")
    table.add_column("is")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("labelled")
    threshold = float(job.get("threshold", math.nan))
    ascending = scores.sort_values("score", kind="stable")
    normal, anomalous = ascending[ascending["label"] == 0].iloc[::-1], ascending[ascending["label"] == 1]
    for _, row in pd.concat([normal.head(count), anomalous.head(count)]).iterrows():
        label = "-" if math.isnan(threshold) else "anomalous" if row["score"] > threshold else "normal"
        table.add_row(escape(str(row["image_path"])), escape(str(row["source"])), f"{row['score']:.4g}", label)
    return table


def several_seeds(results: pd.DataFrame) -> bool:
    """Say whether a table has to tell how many seeds a mean is of."""
    return "seed" in results and results["seed"].nunique() > 1


def columns_of(results: pd.DataFrame) -> tuple[str, ...]:
    """Return which numbers a table of all images shows."""
    return (*METRICS, "seeds") if several_seeds(results) else METRICS


def benchmark_table(results: pd.DataFrame) -> Table:
    """Lay the results out for a terminal; the best AUROC on each data set is bold.

    Args:
        results: One row per job, see :func:`summarise`.

    Returns:
        A table that wraps its names, never its numbers, and fits into 100 columns.
    """
    return _terminal_table("Benchmark", summarise(results), NAMES, columns_of(results))


def benchmark_markdown(results: pd.DataFrame) -> str:
    """Write the table of :func:`benchmark_table` as Markdown, ending in a newline."""
    return _markdown(summarise(results), NAMES, columns_of(results))


def summarise_sets(results: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of :func:`summarise` for each out-of-distribution set, which the column ``set`` names.

    Sets come in alphabetical order, then the average of each group of them, and that of all. Data with a single set are
    left out; of more than ``MOST_SETS``, since the other classes of a data set of ten would bury the table, come the
    averages of groups, where there are any.
    """
    parts = []
    columns = [column for column in results.columns if column.startswith("AUROC/")]
    for _, jobs in results.groupby("data", sort=False):
        names = [column.removeprefix("AUROC/") for column in columns if jobs[column].notna().any()]
        groups = sorted(group for group in groups_of(names) if group in names)
        sets = sorted(name for name in names if name not in {MEAN, *groups})
        if len(sets) < 2 or (len(sets) > MOST_SETS and not groups):
            continue
        for name in [*(sets if len(sets) <= MOST_SETS else []), *groups, MEAN]:
            values = {metric: jobs[f"{metric}/{name}"] for metric in ("AUROC", "FPR95")}
            done = jobs.assign(**values).dropna(subset=["AUROC"])  # the table of all images shows what failed
            parts.append(summarise(done).assign(set=name))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def set_table(results: pd.DataFrame) -> Table | None:
    """Lay the results for each out-of-distribution set out for a terminal; each set's best AUROC is bold.

    Args:
        results: One row per job, see :func:`summarise`, with the columns ``AUROC/<set>`` and ``FPR95/<set>`` where the
            data have several out-of-distribution sets.

    Returns:
        A table that fits into 100 columns; ``None`` if there is nothing to show.
    """
    summary = summarise_sets(results)
    return None if summary.empty else _terminal_table("Each outside set", summary, SET_NAMES, SET_METRICS)


def set_markdown(results: pd.DataFrame) -> str:
    """Write the table of :func:`set_table` as Markdown after an empty line; an empty string if there is no table."""
    summary = summarise_sets(results)
    return "" if summary.empty else "\n" + _markdown(summary, SET_NAMES, SET_METRICS)


def _terminal_table(title: str, summary: pd.DataFrame, names: Mapping[str, str], numbers: Sequence[str]) -> Table:
    """Lay a summary out: columns of text (their headings by name), then columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for name, heading in names.items():
        table.add_column(heading, overflow="fold", ratio=_RATIOS[name])
    for name in numbers:
        table.add_column(TITLES[name], justify="right", no_wrap=True)
    previous = None
    for _, row in summary.iterrows():
        texts = {name: escape(str(row[name])) for name in names}
        section = {**texts, "detector": ""}
        if previous not in (None, section):
            table.add_section()
        previous = section
        cells = cells_of(row)
        if row["best"]:
            cells["AUROC"] = f"[bold]{cells['AUROC']}[/bold]"
        if row["error"]:
            texts["detector"] += f"\n[red]failed: {escape(shorten(row['error'], _ERROR))}[/red]"
        table.add_row(*texts.values(), *(cells[name] for name in numbers))
    return table


def _markdown(summary: pd.DataFrame, names: Mapping[str, str], numbers: Sequence[str]) -> str:
    """Write a summary as a Markdown table; arguments as for :func:`_terminal_table`."""
    header = [*names.values(), *(TITLES[name] for name in numbers)]
    lines = [" | ".join(header), " | ".join(["---"] * len(names) + ["---:"] * len(numbers))]
    for _, row in summary.iterrows():
        texts = {name: str(row[name]) for name in names}
        cells = cells_of(row)
        if row["best"]:
            cells["AUROC"] = f"**{cells['AUROC']}**"
        if row["error"]:
            texts["detector"] += f" (failed: {shorten(row['error'], _ERROR)})"
        escaped = [text.replace("|", "\\|").replace("\n", " ") for text in texts.values()]
        lines.append(" | ".join([*escaped, *(cells[name] for name in numbers)]))
    return "".join(f"| {line} |\n" for line in lines)
