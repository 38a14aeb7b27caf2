# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown from the stored rows, and where they are shown with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.results import publish, rows_to_report
from benchmarks.tables import Column, markdown, short_number

from .detectors import (
    DETECTORS,
    OURS,
    PRODUCT_LAYERS,
    PRODUCT_MASKS,
    PRODUCT_NETWORKS,
    ablation,
    one_change,
    product_variant,
)
from .pictures import draw_cost, draw_maps
from .plan import TRAIN_LONG
from .selections import complete
from .tasks import PARTS

HERE = Path(__file__).parent
TRAINED = {name for name, detector in DETECTORS.items() if detector.held_out_loss}
_ORDER = {name: place for place, name in enumerate([*DETECTORS, *ablation()])}


def _place(name: str) -> tuple[int, str]:
    """Where a detector stands in tables: variants after that of which they are, those of other defaults, too."""
    return _ORDER.get(name.partition(" (")[0], len(_ORDER)), name


_TITLES = {
    "industrial": "Industrial images: defects, and where they are",
    "one_class": "One class of small images against the other nine",
    "left_out": "Nine classes of small images against the tenth",
    "cross": "Another data set",
    "ablation": "What `FeatureMapFlow` owes to what",
}


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


def _mean(values: pd.Series) -> str:
    """Mean alone, where the table has no room for more."""
    return "–" if values.dropna().empty else f"{values.mean():.3f}"


def _table(rows: pd.DataFrame, columns: Sequence[Column], head: str = "detector", ours: set[str] = OURS) -> str:
    """A Markdown table, a line for each detector in the contest's order, ours bold where it is the best."""
    names = sorted(rows["detector"].unique(), key=_place)
    values = {
        (name, column.title): column.values(rows[rows["detector"] == name]) for name in names for column in columns
    }
    best = {}
    for column in columns:
        means = pd.Series({name: values[name, column.title].mean() for name in names}).dropna()
        if column.best is not None and not means.empty:
            best[column.title] = round(column.best(means), 3)
    lines = []
    for name in names:
        cells = [name]
        for column in columns:
            text = column.show(values[name, column.title])
            first = name in ours and best.get(column.title) == round(values[name, column.title].mean(), 3)
            cells.append(f"**{text}**" if first else text)
        lines.append(cells)
    return markdown([head, *(column.title for column in columns)], lines)


_AUROC = Column("AUROC ↑", "auroc", best=max)
_FPR95 = Column("FPR95 ↓", "fpr95", _mean, best=min)
_COST = [
    Column("fit s", "fit_s", short_number),
    Column("images/s", "images_per_s", short_number),
    Column("GiB", "peak_gib", short_number),
]
_PIXELS = [
    Column("pixel", "pixel_auroc", _mean, best=max),
    Column("AUPRO ↑", "aupro", best=max),
    Column("AUPIMO", "aupimo", _mean, best=max),
]


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def _industrial(rows: pd.DataFrame) -> str:
    texts = []
    groups = rows["task"].str.partition("/")[0]
    for group in groups.unique():
        some = complete(rows[groups == group])
        count = some["task"].nunique()
        images = some.drop_duplicates("task")[["train_images", "test_images"]].sum().astype(int)
        of = f", mean over {count} categories" if count > 1 else ""
        texts += [
            f"{group}{of}: {images['train_images']:,} normal images to fit to, {images['test_images']:,} to test on.",
            _table(some, [_AUROC, _FPR95, *_PIXELS, *_COST]),
        ]
    return "\n\n".join([*texts, *_training(rows)])


def _training(rows: pd.DataFrame) -> list[str]:
    """How far the detectors got that train until their held-out loss levels off."""
    texts = []
    for name in sorted(TRAINED & set(rows["detector"]), key=_ORDER.__getitem__):
        some = rows[rows["detector"] == name]
        ends = ", ".join(f"{count} × {end}" for end, count in some["stopped_by"].value_counts().items())
        texts.append(f"{name}: {short_number(some['epochs'])} epochs, stopped by: {ends}.")
    return [" ".join(texts)] if texts else []


def _label(task: pd.Series) -> pd.Series:
    return task.str.extract(r"class (\d+)")[0].astype(float)


def _one_class(rows: pd.DataFrame) -> str:
    texts = []
    sets = rows["task"].str.partition(" class ")[0]
    for name in sets.unique():
        some = rows[sets == name]
        few, every = some[some["detector"].isin(TRAIN_LONG)], some[~some["detector"].isin(TRAIN_LONG)]
        columns = [
            Column("AUROC ↑, all", "auroc", best=max),
            Column("chosen on", "auroc", _mean, best=max, where=lambda part: _label(part["task"]) % 2 == 0),
            Column("confirmed on", "auroc", _mean, best=max, where=lambda part: _label(part["task"]) % 2 == 1),
            _FPR95,
            *_COST,
        ]
        if not every.empty:
            done = complete(every)
            texts += [f"{name}, mean over {done['task'].nunique()} classes:", _table(done, columns)]
        if not few.empty:
            tasks = few["task"].unique()
            both = complete(some[some["task"].isin(tasks) & (some["seed"] == some["seed"].min())])
            words = ", ".join(task.partition(" ")[2] for task in tasks)
            texts += [f"{name}, only {words}, one seed, with the detectors that train for long:"]
            texts += [_table(both, [_AUROC, _FPR95, *_COST]), *_training(both)]
    return "\n\n".join(texts)


def _left_out(rows: pd.DataFrame) -> str:
    texts = []
    sets = rows["task"].str.partition(" without ")[0]
    for name in sets.unique():
        done = complete(rows[sets == name])
        texts += [f"{name}, mean over {done['task'].nunique()} tasks:", _table(done, [_AUROC, _FPR95, *_COST])]
    return "\n\n".join(texts)


def _cross(rows: pd.DataFrame) -> str:
    family = rows["task"].str.replace(r" class \d+", " class", regex=True)
    columns = []
    for name in family.unique():
        title = name.replace("fashion_mnist", "fashion").replace(" -> ", " → ").replace(" class", ", 1 class")
        columns.append(
            Column(title, "auroc", best=max, where=lambda part, name=name: family.loc[part.index] == name)  # type: ignore[misc]
        )
    # Detectors that have seen some of the classes only are not compared on a mean over others.
    counts = rows.groupby([family, "detector"])["task"].nunique()
    full = counts.groupby(level=0).max()
    keep = [counts[pair] == full[pair[0]] for pair in zip(family, rows["detector"], strict=True)]
    text = "AUROC; where it says *1 class*, the mean over the classes that the detectors were fitted to."
    return f"{text}\n\n{_table(rows[keep], columns)}"


def _ablation(rows: pd.DataFrame) -> str:
    columns = [_AUROC, _FPR95, *_PIXELS, *_COST]
    texts = []
    for task, some in rows.groupby("task", sort=False):
        single = some[some["detector"].isin(one_change())]
        texts += [f"{task}, one change at a time, one seed:", _table(single, columns, "change", set())]
        texts.append(f"{task}, every mask with every network, AUROC / AUPRO, one seed; K is `bottleneck_dim`:")
        texts += _product(some)
    return "\n\n".join(texts)


def _product(rows: pd.DataFrame) -> list[str]:
    """For each layer a table with a line for each mask and a column for each network."""
    results = rows.groupby("detector")[["auroc", "aupro"]].mean()
    texts = []
    for layer in PRODUCT_LAYERS:
        lines = []
        for mask in PRODUCT_MASKS:
            cells = [mask]
            for network in PRODUCT_NETWORKS:
                name = product_variant(mask, network, layer).name
                known = name in results.index
                cells.append("{auroc:.3f} / {aupro:.3f}".format(**results.loc[name]) if known else "–")
            lines.append(cells)
        texts.append(markdown([layer, *PRODUCT_NETWORKS], lines))
    return texts


_WRITERS = {
    "industrial": _industrial,
    "one_class": _one_class,
    "left_out": _left_out,
    "cross": _cross,
    "ablation": _ablation,
}


def tables(rows: pd.DataFrame) -> str:
    """Return all tables in Markdown.

    Args:
        rows: As :func:`benchmarks.results.read_rows` gives them.

    Returns:
        A section for each part that has rows.
    """
    good = rows[rows["error"].isna()]
    texts = []
    for part in PARTS:
        some = good[good["part"] == part]
        if not some.empty:
            texts.append(f"### {_TITLES[part]}\n\n{_WRITERS[part](some)}")
    failed = rows[rows["error"].notna()]
    if len(failed):
        names = sorted({f"{row.detector} on {row.task}" for row in failed.itertuples()})
        texts.append(f"Failed: {'; '.join(names)}.")
    return "\n\n".join(texts) + "\n"


def write(output: Path, into: Path = HERE) -> list[Path]:
    """Rebuild tables and pictures; a picture whose maps are not there is kept as it is.

    Args:
        output: Folder of the rows and maps.
        into: Folder of the pictures and a copy of the rows; the tables go between the markers of its README.md, where
            it has one.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If there are no rows.
    """
    rows = rows_to_report(output)
    into.mkdir(parents=True, exist_ok=True)
    pictures = []
    tasks = sorted(rows.loc[rows["part"] == "industrial", "task"].unique())
    for task in tasks:
        name = "maps.png" if len(tasks) == 1 else f"maps_{task.replace('/', '_')}.png"
        # Rows travel, maps do not: where they are missing, the picture drawn elsewhere is kept.
        if draw_maps(output / "maps" / task, rows, task, into / name) or (into / name).is_file():
            pictures.append((name, f"{task}: images, ground truth, maps"))
    if draw_cost(rows, into / "cost.png"):
        pictures.append(("cost.png", "image AUROC over the seconds of a fit"))
    return publish(output, into, "contest", tables(rows), pictures)
