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
from anomalib_flowood.names import counted

from .charts import Chart, bundle, histogram_chart, speed_chart
from .curves import precision_chart, roc_chart
from .decisions import Decision, decide, kinds, percent
from .gallery import make_gallery
from .maps import JobMaps, read_maps
from .markup import render
from .plots import first_seed, source_colours
from .rows import image_rows
from .run import JOB_COLUMNS, Run, read_run
from .table import NAMES, SET_METRICS, SET_NAMES, TITLES, cells_of, columns_of, several_seeds, summarise, summarise_sets

_OPEN_CHARTS = 12
"""With more charts or detectors than this, those of single sets and the images wait until they are asked for."""
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
    """Charts of one way to look at the outside images: all of them, or one set."""

    title: str
    charts: list[Chart]


def write_report(
    folder: Path, open_data: Callable[[dict[str, Any]], AnomalibDataModule], output: Path | None = None
) -> Path:
    """Write the page of a run, and its pictures as files beside it.

    The page holds everything it needs: it fetches nothing, from the network or from the folder. Thresholds, metrics of
    pixels and anomaly maps are shown where the folder has them; older versions wrote none.

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
    maps = read_maps(folder)
    data = [_data_section(run, maps, name, number, open_data) for number, name in enumerate(names, start=1)]
    for section in data:
        for number, chart in enumerate(section.pop("charts"), start=1):
            write_text(pictures / f"{section['anchor']}-{number}{_slug(chart.title)}.svg", chart.file)
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
        bundle=bundle(),
    )
    page = output / "index.html"
    write_text(page, text)
    return page


def _title(run: Run) -> str:
    if run.record.get("command") == "test":
        first = run.results.iloc[0]
        return f"Test of {first['detector']} on {first['data']}"
    return f"Benchmark {run.folder.resolve().name}"


def _introduction(run: Run) -> str:
    results = run.results
    counts = [
        counted(results[column].nunique(), what) for column, what in (("detector", "detector"), ("data", "data set"))
    ]
    text = f"{counts[0]} on {counts[1]}"
    text += f", {results['seed'].nunique()} seeds." if several_seeds(results) else "."
    failed = int((results["error"] != "").sum())
    if failed:
        text += f" {failed} of {counted(len(results), 'job')} failed: the table has their errors."
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
    header = [(heading, False, "ascending") for heading in names.values()]
    header += [(TITLES[name], True, "descending" if name in best_first else "ascending") for name in columns]
    rows = []
    for _, row in summary.iterrows():
        texts = cells_of(row)
        cells = [_Cell(row[name], row[name], error=row["error"] if name == "detector" else "") for name in names]
        for name in columns:
            value = None if math.isnan(row[name]) else float(row[name])
            cells.append(_Cell(texts[name], value, best=name == "AUROC" and bool(row["best"])))
        rows.append(cells)
    return _Table(caption, header, rows)


def _tables(run: Run) -> list[_Table]:
    tables = [_table("all outside images together", run, summarise(run.results), NAMES, columns_of(run.results))]
    sets = summarise_sets(run.results)
    if not sets.empty:
        tables.append(_table("each outside set", run, sets, SET_NAMES, SET_METRICS))
    pixels = _pixel_table(run.results)
    return tables if pixels is None else [*tables, pixels]


def _pixel_table(results: pd.DataFrame) -> _Table | None:
    """The metrics of pixels, means over seeds; nothing if no job has any."""
    names = [name for name in map(str, results) if name.startswith("pixel_") and results[name].notna().any()]
    if not names:
        return None
    header = [("detector", False, "ascending"), ("data", False, "ascending")]
    header += [(name.removeprefix("pixel_"), True, "descending") for name in names]
    rows = []
    for (detector, data), group in results.groupby(["detector", "data"], sort=False):
        means = [float(group[name].astype(float).mean()) for name in names]
        cells = [_number(value, f"{value:.3f}") for value in means]
        rows.append([_Cell(str(detector), str(detector)), _Cell(str(data), str(data)), *cells])
    return _Table("pixels: how well the anomaly maps show where", header, rows)


# ---------------------------------------------------------------------------------------------------------------------
# One data set
# ---------------------------------------------------------------------------------------------------------------------


def _data_section(
    run: Run,
    maps: dict[tuple[str, str, str], JobMaps],
    name: str,
    number: int,
    open_data: Callable[[dict[str, Any]], AnomalibDataModule],
) -> dict[str, Any]:
    """Everything about one data set; ``charts`` are all its charts."""
    scores = run.scores[run.scores["data"] == name]
    detectors = [str(detector) for detector in run.results["detector"].unique()]
    summary = summarise(run.results)
    summary = summary[summary["data"] == name]
    found = [speed_chart(summary, column, label, detectors) for column, label in _COSTS.items()]
    speed = [chart for chart in found if chart is not None]
    jobs = {str(detector): first_seed(group) for detector, group in scores.groupby("detector", sort=False)}
    decisions = {detector: _decision(run.results, group) for detector, group in jobs.items()}
    known = {detector: decision for detector, decision in decisions.items() if decision is not None}
    thresholds = {detector: decision.threshold for detector, decision in known.items()}
    views = list(_views(scores, detectors, known))
    entry = run.record.get("data", {}).get(name)
    own = {detector: maps.get((detector, name, str(group["seed"].iloc[0]))) for detector, group in jobs.items()}
    with_maps = {detector: found for detector, found in own.items() if found is not None}
    opened = None if entry is None else partial(open_data, entry)
    gallery = make_gallery(jobs, with_maps, thresholds, opened, f"image-{number}-")
    return {
        "title": name,
        "anchor": f"data-{number}{_slug(name)}",
        "decisions": known,
        "views": views,
        "kinds": _kinds_table(jobs, thresholds),
        "speed": speed,
        "gallery": gallery,
        "rows": image_rows(jobs, thresholds, gallery),
        "open_views": sum(len(view.charts) for view in views) <= _OPEN_CHARTS,
        "open_images": len(gallery.strips) <= _OPEN_CHARTS // 2,
        "one_class": "" if scores.empty or scores["label"].nunique() == 2 else _only(scores),
        "charts": [*(chart for view in views for chart in view.charts), *speed],
    }


def _decision(results: pd.DataFrame, scores: pd.DataFrame) -> Decision | None:
    """What comes of the threshold of the job that gave these scores."""
    first = scores.iloc[0]
    same = (results[JOB_COLUMNS] == first[JOB_COLUMNS]).all(axis=1)
    return decide(results[same & (results["error"] == "")].iloc[0], scores)


def _kinds_table(jobs: dict[str, pd.DataFrame], thresholds: dict[str, float]) -> _Table | None:
    """How each source of outside images fares; nothing if there is only one."""
    header = [("detector", False, "ascending"), ("source", False, "ascending"), ("images", True, "descending")]
    header += [("found", True, "ascending"), ("found %", True, "ascending"), ("AUROC ↑", True, "ascending")]
    header.append(("median score", True, "ascending"))
    rows = []
    for detector, scores in jobs.items():
        table = kinds(scores, thresholds.get(detector, math.nan))
        for kind, images, found, area, median in table.itertuples(index=False):
            share = found / images
            cells = [_Cell(detector, detector), _Cell(kind, kind), _Cell(f"{images:,}", images)]
            cells += [_number(found, f"{found:,.0f}"), _number(share, percent(share)), _number(area, f"{area:.3f}")]
            rows.append([*cells, _number(median, f"{median:,.4g}".replace("-", "−"))])
    if len({cells[1].text for cells in rows}) < 2:
        return None
    return _Table("each source of outside images, against all inside ones", header, rows)


def _number(value: float, text: str) -> _Cell:
    return _Cell("-", None) if math.isnan(value) else _Cell(text, float(value))


def _slug(text: str) -> str:
    """Text as the last part of a file's name."""
    return re.sub(r"\W+", "-", f"-{text}", flags=re.ASCII)[:60].rstrip("-")


def _only(scores: pd.DataFrame) -> str:
    return "outside" if scores["label"].iloc[0] else "inside"


def _views(scores: pd.DataFrame, detectors: list[str], decisions: dict[str, Decision]) -> Iterator[_View]:
    """All outside images together, then each set if there are several but not too many."""
    if scores.empty:
        return
    inside, outside = scores[scores["label"] == 0], scores[scores["label"] == 1]
    colours = source_colours(scores)
    thresholds = {detector: decision.threshold for detector, decision in decisions.items()}
    sets = list(outside["source"].unique())
    parts = {f"All {len(sets)} outside sets" if len(sets) > 1 else "".join(sets) or "Inside": scores}
    if 2 <= len(sets) <= MOST_SETS:
        parts |= {str(one): pd.concat([inside, outside[outside["source"] == one]]) for one in sets}
    for title, part in parts.items():
        charts = []
        if part["label"].nunique() == 2:
            charts += [draw(part, title, detectors, thresholds) for draw in (roc_chart, precision_chart)]
        for detector, group in part.groupby("detector", sort=False):
            decision = decisions.get(str(detector))
            line = () if decision is None else (decision.threshold, decision.level_in_words("α"))
            charts.append(histogram_chart(first_seed(group), f"{detector}: {title}", colours, *line))
        yield _View(title, charts)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100) if value else ""
