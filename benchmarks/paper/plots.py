# SPDX-License-Identifier: Apache-2.0
"""Plots of the stored rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from anomalib_flowood.explain.pictures import draw_images
from anomalib_flowood.look import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

from .fits import TEMPERATURES, sample_path
from .plan import PAIR
from .profiles import CHANNEL, CHECKERBOARD, CYCLE, CYCLE_BOTTLENECK, EMBEDDING, FLOWS, GLOW
from .selections import by_k, pixel_runs, values_of

_COLOURS = dict(zip((*FLOWS, EMBEDDING), (VERMILION, ORANGE, PURPLE, SKY, BLUE, GREEN, GREY), strict=True))
_MARKERS = dict(zip(FLOWS, "sDPv^o", strict=True))


def _spread(axis: Axes, position: float, values: pd.Series, colour: str, marker: str = "o") -> None:
    """A point for each value, and a line at their mean."""
    axis.plot([position] * len(values), values, marker, color=colour, alpha=0.6, markersize=6, linestyle="none")
    axis.plot([position - 0.25, position + 0.25], [values.mean()] * 2, color=colour, linewidth=2)


def draw_masks(rows: pd.DataFrame, path: Path) -> bool:
    """Draw AUROC at equal time and at equal epochs, and co-adaptation, by flow; returns whether there was anything."""
    wanted = [
        ("mask_time", "auroc", "AUROC, equal time"),
        ("mask_epochs", "auroc", "AUROC, equal epochs"),
        ("mask_time", "coadaptation", "co-adaptation, equal time"),
    ]
    panels = [panel for panel in wanted if panel[0] in set(rows["part"])]
    if not panels:
        return False
    figure = Figure(figsize=(3.9 * len(panels), 3.8), layout="constrained")
    for axis, (part, column, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for position, name in enumerate(FLOWS):
            values = values_of(rows, part, name, column)
            if not values.empty:
                _spread(axis, position, values, _COLOURS[name])
        axis.set_xticks(range(len(FLOWS)), FLOWS, rotation=35, ha="right", rotation_mode="anchor", fontsize=9)
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        if column == "auroc":
            axis.axhline(0.5, color="0.5", linewidth=0.8, linestyle="--")
    figure.savefig(path, dpi=110)
    return True


def draw_bottleneck(rows: pd.DataFrame, path: Path) -> bool:
    """Draw AUROC and bits per dimension over K (figure 7 of the paper); returns whether there was anything."""
    some = by_k(rows)
    if some.empty:
        return False
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = (("auroc", "AUROC", CYCLE_BOTTLENECK), ("bits_per_dim", "bits per dimension, clothes", CYCLE))
    for axis, (column, title, colour) in zip(figure.subplots(1, 2), panels, strict=True):
        groups = some.groupby("k")[column]
        axis.errorbar(
            groups.mean().index, groups.mean(), groups.std().fillna(0), marker="o", capsize=3, color=_COLOURS[colour]
        )
        axis.set_xscale("log")
        axis.set_xticks(sorted(some["k"].unique()))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set(xlabel="K, the numbers that pass the bottleneck", ylabel=title)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return True


def draw_likelihood(rows: pd.DataFrame, output: Path, path: Path) -> bool:
    """Draw every run as a point, bits per dimension against AUROC, beside it samples of the extremes.

    The extremes are the run with the fewest bits per dimension and the one with the highest AUROC.

    Returns:
        Whether there was anything to draw.
    """
    runs = pixel_runs(rows)
    runs = runs[np.isfinite(runs["bits_per_dim"])]
    if runs.empty:
        return False
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
    axis = figure.add_subplot(grid[:, 0])
    for name in FLOWS:
        some = runs[runs["flow"] == name]
        axis.plot(
            some["bits_per_dim"], some["auroc"], _MARKERS[name], color=_COLOURS[name], alpha=0.75,
            label=name if len(some) else None,
        )  # fmt: skip
    axis.set(xlabel="bits per dimension of clothes (fewer: better likelihood)", ylabel="AUROC, clothes against digits")
    axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    extremes = {"fewest bits per dimension": runs["bits_per_dim"].idxmin(), "highest AUROC": runs["auroc"].idxmax()}
    for line, (title, index) in enumerate(extremes.items()):
        row = runs.loc[index]
        panel = figure.add_subplot(grid[line, 1])
        panel.set_axis_off()
        what = row["flow"] if row["flow"] == row["detector"] else f"{row['flow']}, {row['detector']}"
        panel.set_title(
            f"samples, {title}:\n{what}\n{row['bits_per_dim']:.2f} bits/dim, AUROC {row['auroc']:.3f}", fontsize=9
        )
        file = sample_path(output, (row["part"], row["task"], row["detector"], int(row["seed"])))
        if file.is_file():
            panel.imshow(_mosaic(np.load(file)["1"]), cmap="gray", vmin=0, vmax=255)
        axis.annotate(
            "", (row["bits_per_dim"], row["auroc"]), (-18, 14 if row["auroc"] < 0.5 else -14),
            textcoords="offset points", arrowprops={"arrowstyle": "->", "lw": 1.0},
        )  # fmt: skip
    figure.savefig(path, dpi=110)
    return True


def _mosaic(images: np.ndarray, columns: int = 8) -> np.ndarray:
    """Images ``(N, H, W)`` in lines of ``columns``, a white line between them."""
    framed = np.pad(images, ((0, -len(images) % columns), (0, 1), (0, 1)), constant_values=255)
    lines = framed.reshape(-1, columns, *framed.shape[1:])
    return np.concatenate([np.concatenate(list(line), axis=1) for line in lines])


def draw_samples(rows: pd.DataFrame, output: Path, path: Path) -> bool:
    """Draw samples of RealNVP and Glow at each temperature below real images; returns whether there was anything.

    They are those of the part ``samples``, or of mask_epochs where the profile has no such part; of the first seed.
    """
    shown: dict[str, np.ndarray] = {}
    for name in (CHANNEL, GLOW):
        for part in ("samples", "mask_epochs"):
            seeds = rows.loc[(rows["part"] == part) & (rows["detector"] == name), "seed"]
            if len(seeds) and (file := sample_path(output, (part, PAIR, name, int(min(seeds))))).is_file():
                images = np.load(file)
                short = "RealNVP" if name == CHANNEL else name
                shown.setdefault("real", images["real"])
                shown |= {f"{short}, T = {value:g}": images[f"{value:g}"] for value in TEMPERATURES}
                break
    if not shown:
        return False
    count = min(map(len, shown.values()))  # a trial has few real ones
    lines = {name: torch.from_numpy(images[:count])[:, None] / 255 for name, images in shown.items()}
    draw_images(lines, [""] * count, path)
    return True


def draw_one_class(rows: pd.DataFrame, path: Path) -> bool:
    """Draw AUROC by class and detector; returns whether there was anything."""
    some = rows[rows["part"] == "one_class"]
    if some.empty:
        return False
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axis = figure.subplots()
    tasks = sorted(some["task"].unique())
    for name, marker in ((CHECKERBOARD, "s"), (CYCLE_BOTTLENECK, "o"), (EMBEDDING, "^")):
        values = some[some["detector"] == name].groupby("task")["auroc"].mean().reindex(tasks)
        axis.plot(range(len(tasks)), values, marker, color=_COLOURS[name], label=name, markersize=7, alpha=0.8)
        axis.axhline(values.mean(), color=_COLOURS[name], linewidth=1, alpha=0.6)
    axis.set_xticks(range(len(tasks)), [task.rpartition(" ")[2] for task in tasks])
    axis.set(xlabel="normal class of FashionMNIST (lines: means)", ylabel="AUROC", ylim=(None, 1.02))
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    return True
