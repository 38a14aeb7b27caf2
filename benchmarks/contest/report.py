# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures from the stored rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from benchmarks.results import publish, rows_to_report
from benchmarks.tables import Column, markdown, short_number

from .baselines import MODELS
from .detectors import (
    DETECTORS,
    PRODUCT_LAYERS,
    PRODUCT_MASKS,
    PRODUCT_NETWORKS,
    ablation,
    one_change,
    product_variant,
)
from .plan import TRAIN_LONG
from .tasks import PARTS

HERE = Path(__file__).parent
OURS = {name for name, detector in DETECTORS.items() if detector.ours}
TRAINED = {name for name, detector in DETECTORS.items() if detector.held_out_loss}
_ORDER = {name: place for place, name in enumerate([*DETECTORS, *ablation()])}

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
    names = sorted(rows["detector"].unique(), key=lambda name: (_ORDER.get(name, len(_ORDER)), name))
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
        some = _complete(rows[groups == group])
        count = some["task"].nunique()
        images = some.drop_duplicates("task")[["train_images", "test_images"]].sum().astype(int)
        of = f", mean over {count} categories" if count > 1 else ""
        texts += [
            f"{group}{of}: {images['train_images']:,} normal images to fit to, {images['test_images']:,} to test on.",
            _table(some, [_AUROC, _FPR95, *_PIXELS, *_COST]),
        ]
    return "\n\n".join([*texts, *_training(rows)])


def _complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of those seeds of a detector that have every task, for means to be over the same tasks."""
    tasks = rows["task"].nunique()
    kept = [some for _, some in rows.groupby(["detector", "seed"], sort=False) if some["task"].nunique() == tasks]
    return pd.concat(kept) if kept else rows


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
            done = _complete(every)
            texts += [f"{name}, mean over {done['task'].nunique()} classes:", _table(done, columns)]
        if not few.empty:
            tasks = few["task"].unique()
            both = _complete(some[some["task"].isin(tasks) & (some["seed"] == some["seed"].min())])
            words = ", ".join(task.partition(" ")[2] for task in tasks)
            texts += [f"{name}, only {words}, one seed, with the detectors that train for long:"]
            texts += [_table(both, [_AUROC, _FPR95, *_COST]), *_training(both)]
    return "\n\n".join(texts)


def _left_out(rows: pd.DataFrame) -> str:
    texts = []
    sets = rows["task"].str.partition(" without ")[0]
    for name in sets.unique():
        done = _complete(rows[sets == name])
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


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def _choose(maps: dict[str, np.ndarray], count: int = 2) -> list[tuple[str, int]]:
    """Images to show, as (caption, row): of each defect typical ones and the hardest detected, then the failures.

    Ranks are those of our detector's scores among all test images; detected is what lies above 95 % of normal ones.
    """
    kinds = np.array([Path(path).parent.name for path in maps["paths"]])
    ranks = maps["scores"].argsort().argsort() / max(1, len(kinds) - 1)
    anomalous = maps["labels"] == 1
    chosen: list[tuple[str, int]] = []
    for kind in sorted(set(kinds[anomalous])):
        rows = np.flatnonzero((kinds == kind) & anomalous)
        rows = rows[ranks[rows].argsort()]
        typical = np.unique(np.linspace(len(rows) / 2, len(rows) * 0.9, count).astype(int))
        chosen += [(f"{kind}\ntypical", int(row)) for row in rows[typical[typical < len(rows)]]]
        if len(rows) > count:
            caught = rows[ranks[rows] > np.quantile(ranks[~anomalous], 0.95)]
            if len(caught):
                chosen.append((f"{kind}\nhardest detected", int(caught[0])))
    taken = {row for _, row in chosen}
    missed = [row for row in np.flatnonzero(anomalous)[ranks[anomalous].argsort()] if row not in taken]
    chosen += [(f"{kinds[row]}\nlowest score", int(row)) for row in missed[:count]]
    normal = np.flatnonzero(~anomalous)
    if len(normal):
        chosen.append(("normal\nhighest score", int(normal[ranks[normal].argmax()])))
    return chosen


def draw_maps(folder: Path, rows: pd.DataFrame, task: str, path: Path) -> bool:
    """Draw images, ground truth, our map and that of anomalib's best detector by AUPRO.

    Args:
        folder: Where the maps of a task's detectors are.
        rows: The rows.
        task: The task.
        path: The picture.

    Returns:
        Whether there was enough to draw.
    """
    some = rows[(rows["part"] == "industrial") & (rows["task"] == task) & rows["error"].isna()]
    aupro = some.groupby("detector")["aupro"].mean().dropna().sort_values(ascending=False)
    aupro = aupro[[name for name in aupro.index if (folder / f"{name}.npz").is_file()]]
    if "FeatureMapFlow" not in aupro.index:
        return False
    shown = ["FeatureMapFlow", *[name for name in aupro.index if name not in OURS and name not in MODELS][:1]]
    stored = {name: dict(np.load(folder / f"{name}.npz")) for name in shown}
    ours = stored["FeatureMapFlow"]
    chosen = _choose(ours)
    threshold = {name: _limits(maps) for name, maps in stored.items()}
    height = 2 + len(shown)
    figure = Figure(figsize=(1.25 * len(chosen) + 0.3, 1.25 * height + 0.5), layout="constrained")
    axes = figure.subplots(height, len(chosen), squeeze=False)
    labels = ["image", "ground truth", *(f"{name}\nAUPRO {aupro[name]:.3f}" for name in shown)]
    for column, (caption, row) in enumerate(chosen):
        with Image.open(str(ours["paths"][row])) as image:
            pixels = np.asarray(image.convert("RGB").resize((224, 224)))
        axes[0, column].imshow(pixels)
        axes[0, column].set_title(caption, fontsize=7)
        axes[1, column].imshow(ours["masks"][row], cmap="gray", vmin=0, vmax=1)
        for line, name in enumerate(shown, start=2):
            low, high = threshold[name]
            same = {str(path): place for place, path in enumerate(stored[name]["paths"])}
            values = stored[name]["maps"][same[str(ours["paths"][row])]].astype(np.float32)
            axes[line, column].imshow(values, cmap="inferno", vmin=low, vmax=high)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for line, label in enumerate(labels):
        axes[line, 0].set_ylabel(label, fontsize=7)
    figure.savefig(path, dpi=110)
    return True


def _limits(maps: dict[str, np.ndarray]) -> tuple[float, float]:
    """The colours' range: from the median of normal images to a value that few pixels of anomalous ones pass."""
    values = maps["maps"].astype(np.float32)
    normal = values[maps["labels"] == 0]
    low = float(np.median(normal if len(normal) else values))
    inside = values[maps["masks"]]
    high = float(np.quantile(inside if len(inside) else values, 0.9))
    return low, max(high, low + 1e-6)


def _label_points(axis: Axes, means: pd.DataFrame) -> None:
    """Write each point's name above it, and higher where another name is already."""
    placed: list[tuple[float, float]] = []
    for name, (score, seconds) in means.sort_values("auroc").iterrows():
        x, y = axis.transData.transform((seconds, score))
        label = y + 8
        while any(abs(x - other) < 85 and abs(label - taken) < 11 for other, taken in placed):
            label += 1
        placed.append((x, label))
        axis.annotate(
            str(name),
            (seconds, score),
            (0, 72 * (label - y) / axis.figure.dpi),
            textcoords="offset points",
            fontsize=7,
            ha="center",
            weight="bold" if name in OURS else "normal",
            arrowprops={"arrowstyle": "-", "lw": 0.4} if label - y > 12 else None,
        )


def draw_cost(rows: pd.DataFrame, path: Path) -> bool:
    """Draw image AUROC over the seconds of a fit, a panel for each part.

    Returns:
        Whether there was anything to draw.
    """
    good = rows[rows["error"].isna() & rows["part"].isin(("industrial", "one_class"))]
    parts = [part for part in PARTS if part in set(good["part"])]
    if not parts:
        return False
    figure = Figure(figsize=(5.2 * len(parts), 3.8), layout="constrained")
    for axis, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        some = good[good["part"] == part]
        if part == "one_class":  # these have seen few of the classes
            some = some[~some["detector"].isin(TRAIN_LONG)]
        means = _complete(some).groupby("detector")[["auroc", "fit_s"]].mean()
        for name, (score, seconds) in means.iterrows():
            ours = name in OURS
            axis.scatter(seconds, score, s=46 if ours else 24, color="C3" if ours else "0.35", zorder=3)
        axis.set_xscale("log")
        axis.margins(x=0.18, y=0.1)
        low, high = axis.get_ylim()
        top = high + 0.45 * (high - low)  # labels of points that lie close are stacked above them
        axis.set_yticks([tick for tick in axis.get_yticks() if low <= tick <= 1])
        axis.set_ylim(low, top)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set(title=part.replace("_", " "), xlabel="seconds to fit", ylabel="image AUROC")
        axis.grid(alpha=0.3)
        figure.draw_without_rendering()
        _label_points(axis, means)
    figure.savefig(path, dpi=110)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


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
