# SPDX-License-Identifier: Apache-2.0
"""Pictures of the stored rows and maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from anomalib_flowood.look import GREY, VERMILION

from .detectors import BASELINES, OURS
from .plan import TRAIN_LONG
from .selections import complete
from .tasks import PARTS


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
    shown = ["FeatureMapFlow", *[name for name in aupro.index if name not in OURS and name not in BASELINES][:1]]
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
        means = complete(some).groupby("detector")[["auroc", "fit_s"]].mean()
        for name, (score, seconds) in means.iterrows():
            ours = name in OURS
            axis.scatter(seconds, score, s=46 if ours else 24, color=VERMILION if ours else GREY, zorder=3)
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
