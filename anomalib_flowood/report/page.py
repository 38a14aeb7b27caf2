# SPDX-License-Identifier: Apache-2.0
"""One page with everything that a benchmark or a test has found out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from anomalib.data import AnomalibDataModule

from anomalib_flowood.files import write_text
from anomalib_flowood.metrics import MOST_SETS

from .markup import render
from .panels import histogram_panel, roc_panel, speed_panel
from .plots import source_colours
from .run import Run, read_run
from .table import METRICS, TITLES, cells_of, first_seen, several_seeds, summarise, summarise_sets
from .thumbnails import Thumbnails, find_thumbnails

_THUMBNAILS = 8
_OPEN_PANELS = 12
"""With more panels or detectors than this, those of single sets and the images wait until they are asked for."""
_COSTS = {"images_per_s": "images/s in the test", "fit_duration": "seconds of fitting"}


@dataclass(frozen=True)
class _Cell:
    """A cell of a table: what is read, and what is sorted by (``None`` for a number that is missing)."""

    text: str
    value: str | float | None
    best: bool = False
    error: str = ""


@dataclass(frozen=True)
class _Table:
    """A table: its caption, a heading for each column with whether it holds numbers and the better end, its rows."""

    caption: str
    header: list[tuple[str, bool, str]]
    rows: list[list[_Cell]]


@dataclass(frozen=True)
class _View:
    """Panels, by what they show, of one way to look at the outside images: all of them, or one set."""

    title: str
    panels: dict[str, str]


@dataclass(frozen=True)
class _Strip:
    """Images in a row: ``(data URI or nothing, path, source, score)`` each."""

    title: str
    images: list[tuple[str, str, str, str]]


def write_report(
    folder: Path, open_data: Callable[[dict[str, Any]], AnomalibDataModule], output: Path | None = None
) -> Path:
    """Write the page of a run, and its pictures as files beside it.

    The page holds everything it needs: it fetches nothing, from the network or from the folder.

    Args:
        folder: The run's folder, see :mod:`.run`.
        open_data: Builds a data module from what ``run.json`` holds of it (``class_path`` and ``init_args``), for test
            images that are no files.
        output: Folder to write to, made if missing; ``report`` in the run's folder by default.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: If the folder or one of its files is not there.
        ValueError: If a file cannot be read, lacks columns or holds values that no test gives.
    """
    run = read_run(folder)
    output = folder / "report" if output is None else output
    pictures = output / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("data-*.svg"):  # of an earlier report, which may have had more of them
        old.unlink()
    names = [str(name) for name in run.results["data"].unique()]
    data = [_data_section(run, name, number, open_data) for number, name in enumerate(names, start=1)]
    for section in data:
        for number, (title, panel) in enumerate(section.pop("pictures"), start=1):
            write_text(pictures / f"{section['anchor']}-{number}{_slug(title)}.svg", panel)
    text = render(
        "report.html",
        title=_title(run),
        introduction=_introduction(run),
        tables=_tables(run),
        several_seeds=several_seeds(run.results),
        data=data,
        record=run.record,
        settings={
            kind: {name: _yaml(value) for name, value in run.record.get(kind, {}).items()}
            for kind in ("detectors", "data")
        },
        run_settings=_yaml(run.record.get("settings", {})),
    )
    page = output / "index.html"
    write_text(page, text)
    return page


def _title(run: Run) -> str:
    if run.record.get("command") == "test":
        first = run.results.iloc[0]
        return f"Test of {first['detector']} on {first['data']}"
    return f"Benchmark {run.folder.resolve().name}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _introduction(run: Run) -> str:
    results = run.results
    counts = [
        _counted(results[column].nunique(), what) for column, what in (("detector", "detector"), ("data", "data set"))
    ]
    text = f"{counts[0]} on {counts[1]}"
    text += f", {results['seed'].nunique()} seeds." if several_seeds(results) else "."
    failed = int((results["error"] != "").sum())
    if failed:
        text += f" {failed} of {_counted(len(results), 'job')} failed: the table has their errors."
    if "date" in run.record:
        text += f" Run on {run.record['date'].replace('T', ' ')}."
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def _table(caption: str, run: Run, summary: pd.DataFrame, names: dict[str, str], columns: tuple[str, ...]) -> _Table:
    """Lay a summary out: columns of text (their headings by name), then columns of numbers.

    The data's name needs no column where it is the same in all rows: it joins the caption.
    """
    if run.results["data"].nunique() == 1:
        caption = f"{run.results['data'].iloc[0]}: {caption}"
        names = {name: heading for name, heading in names.items() if name != "data"}
    best_first = {"AUROC", "images_per_s", "seeds"}  # of these the highest comes first
    headings = TITLES | {"seeds": "seeds"}
    header = [(heading, False, "ascending") for heading in names.values()]
    header += [(headings[name], True, "descending" if name in best_first else "ascending") for name in columns]
    rows = []
    for _, row in summary.iterrows():
        texts = cells_of(row) | {"seeds": str(row["seeds"])}
        cells = [_Cell(row[name], row[name], error=row["error"] if name == "detector" else "") for name in names]
        for name in columns:
            value = None if math.isnan(row[name]) else float(row[name])
            cells.append(_Cell(texts[name], value, best=name == "AUROC" and bool(row["best"])))
        rows.append(cells)
    return _Table(caption, header, rows)


def _tables(run: Run) -> list[_Table]:
    summary = summarise(run.results).sort_values("data", kind="stable", key=first_seen)
    columns = (*METRICS, *(("seeds",) if several_seeds(run.results) else ()))
    tables = [_table("all outside images together", run, summary, {"detector": "detector", "data": "data"}, columns)]
    sets = summarise_sets(run.results)
    if not sets.empty:
        names = {"detector": "detector", "data": "data", "set": "outside"}
        tables.append(_table("each outside set", run, sets, names, ("AUROC", "FPR95")))
    return tables


# ---------------------------------------------------------------------------------------------------------------------
# One data set
# ---------------------------------------------------------------------------------------------------------------------


def _data_section(
    run: Run, name: str, number: int, open_data: Callable[[dict[str, Any]], AnomalibDataModule]
) -> dict[str, Any]:
    """Everything about one data set; ``pictures`` are all its panels."""
    scores = run.scores[run.scores["data"] == name]
    detectors = [str(detector) for detector in run.results["detector"].unique()]
    summary = summarise(run.results)
    summary = summary[summary["data"] == name]
    speed = {}
    for column, label in _COSTS.items():
        panel = speed_panel(summary, column, label, detectors)
        if panel is not None:
            speed[f"AUROC against {label}"] = panel
    views = list(_views(scores, detectors))
    panels = sum(len(view.panels) for view in views)
    entry = run.record.get("data", {}).get(name)
    images, missing = _strips(scores, None if entry is None else partial(open_data, entry))
    return {
        "title": name,
        "anchor": f"data-{number}{_slug(name)}",
        "views": views,
        "speed": list(speed.values()),
        "images": images,
        "missing": missing,
        "open_views": panels <= _OPEN_PANELS,
        "open_images": len(images) <= _OPEN_PANELS // 2,
        "one_class": "" if scores.empty or scores["label"].nunique() == 2 else _only(scores),
        "pictures": [*(item for view in views for item in view.panels.items()), *speed.items()],
    }


def _slug(text: str) -> str:
    """Text as the last part of a file's name."""
    return re.sub(r"\W+", "-", f"-{text}", flags=re.ASCII)[:60].rstrip("-")


def _only(scores: pd.DataFrame) -> str:
    return "outside" if scores["label"].iloc[0] else "inside"


def _views(scores: pd.DataFrame, detectors: list[str]) -> Iterator[_View]:
    """All outside images together, then each set if there are several but not too many."""
    if scores.empty:
        return
    inside, outside = scores[scores["label"] == 0], scores[scores["label"] == 1]
    colours = source_colours(scores)
    sets = list(outside["source"].unique())
    parts = {f"All {len(sets)} outside sets" if len(sets) > 1 else "".join(sets) or "Inside": scores}
    if 2 <= len(sets) <= MOST_SETS:
        parts |= {str(one): pd.concat([inside, outside[outside["source"] == one]]) for one in sets}
    for title, part in parts.items():
        panels = {}
        if part["label"].nunique() == 2:
            panels[f"ROC: {title}"] = roc_panel(part, title, detectors)
        for detector, group in part.groupby("detector", sort=False):
            first = group[group["seed"] == group["seed"].iloc[0]]
            panels[f"{detector}: {title}"] = histogram_panel(first, f"{detector}: {title}", colours)
        yield _View(title, panels)


def _strips(
    scores: pd.DataFrame, open_data: Callable[[], AnomalibDataModule] | None
) -> tuple[dict[str, list[_Strip]], str]:
    """For each detector the images on which it is most wrong, of its first seed; and what is missing."""
    chosen: dict[str, dict[str, pd.DataFrame]] = {}
    for detector, group in scores.groupby("detector", sort=False):
        first = group[group["seed"] == group["seed"].iloc[0]].sort_values("score", kind="stable")
        chosen[str(detector)] = {
            "The most anomalous inside": first[first["label"] == 0].iloc[::-1].head(_THUMBNAILS),
            "The least anomalous outside": first[first["label"] == 1].head(_THUMBNAILS),
        }
    if not chosen:
        return {}, ""
    paths = pd.concat([rows["image_path"] for strips in chosen.values() for rows in strips.values()])
    found = find_thumbnails(paths, open_data)
    return {
        detector: [_strip(title, rows, found) for title, rows in strips.items() if not rows.empty]
        for detector, strips in chosen.items()
    }, found.missing


def _strip(title: str, rows: pd.DataFrame, found: Thumbnails) -> _Strip:
    columns = rows["image_path"].astype(str), rows["source"].astype(str), rows["score"].astype(float)
    images = [
        (found.uris.get(path, ""), path, source, f"{score:,.4g}".replace("-", "−"))
        for path, source, score in zip(*columns, strict=True)
    ]
    return _Strip(title, images)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100) if value else ""
