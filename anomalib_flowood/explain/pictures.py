# SPDX-License-Identifier: Apache-2.0
"""The pictures of an explanation: histograms, lines, and mosaics of small images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, is_color_like, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional

from anomalib_flowood.files import whole_file
from anomalib_flowood.look import BLUE, PALETTE, SKY, short_name
from anomalib_flowood.report.plots import draw_shares, whiskers

from .coadaptation import Coadaptation

SHOWN_SETS = len(PALETTE)
"""The most sets that a picture shows, the inside one included."""

_DIVERGING = mpl.colormaps["RdBu_r"].with_extremes(bad="#c8c8c8")
_STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
DARK = "dark"
"""The folder of pictures for dark pages."""
_ON_DARK = {"#000000": "#e8eaed", "#ffffff": "#181c22", BLUE.lower(): SKY.lower()}
"""What colours are on a dark page."""
_BINS = 30
_NAME = 28  # characters of a set's name
_TILE = 0.8  # inches
_GAP = 0.08  # of a tile
_QUANTILE = 0.995
_LAYERS_PER_ROW = 4


def _save(figure: Figure, path: Path, **kwargs: Any) -> None:
    """Write a picture, and the same for a dark page into the folder ``dark`` beside it, where there is one."""
    with whole_file(path) as file:
        figure.savefig(file, dpi=130, **kwargs)
    dark = path.parent / DARK
    if dark.is_dir():
        figure.set_layout_engine("none")  # everything has its place already
        _darken(figure)
        with whole_file(dark / path.name) as file:
            figure.savefig(file, dpi=130, **kwargs)


def _darken(figure: Figure) -> None:
    """Give everything that is black, white or the dark blue the colours of a dark page."""
    for artist in figure.findobj():
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            value: Any = getattr(artist, f"get_{name}", lambda: None)()
            if is_color_like(value) and to_hex(value) in _ON_DARK:
                *_, alpha = to_rgba(value)
                getattr(artist, f"set_{name}")((_ON_DARK[to_hex(value)], alpha))


def draw_histograms(log_probs: Mapping[str, Tensor], aurocs: Mapping[str, float], path: Path) -> None:
    """Draw the log-likelihoods of the inside set against those of each outside set (Kirichenko et al. 2020, figure 1).

    Each panel has a range of its own. Values beyond both sets' whiskers (Tukey's, 1.5 interquartile ranges) are counted
    in the outermost bins.

    Args:
        log_probs: Log-likelihoods in nats by set, ``(N,)`` each, the inside set first; −inf and NaN count as the
            lowest.
        aurocs: AUROC by outside set.
        path: File to write.
    """
    numbers = {name: part.cpu().double().numpy() for name, part in log_probs.items()}
    values = {name: np.where(np.isnan(part), -np.inf, part) for name, part in numbers.items()}
    inside, *outside = values
    with mpl.rc_context(_STYLE):
        # Narrow: it is read on a phone, too.
        height = 3.4 if len(outside) == 1 else 2.2 * len(outside) + 0.5
        figure = Figure(figsize=(4.8, height), layout="constrained")
        axes = figure.subplots(len(outside), 1, squeeze=False).flatten()
        for axis, name, colour in zip(axes, outside, PALETTE[1:], strict=False):
            edges = np.linspace(*whiskers([values[inside], values[name]]), _BINS + 1)
            for part, shade, title in (
                (values[inside], PALETTE[0], f"{short_name(inside, _NAME)} (inside)"),
                (values[name], colour, f"{short_name(name, _NAME)} (AUROC {aurocs[name]:.3f})"),
            ):
                draw_shares(axis, part, edges, shade, title)
            axis.ticklabel_format(axis="x", style="plain", useOffset=False)
            axis.locator_params(axis="x", nbins=5)
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1, frameon=False)
        figure.supxlabel("log-likelihood log p(x) in nats (right: more likely)", fontsize=10)
        figure.supylabel("share of images", fontsize=10)
        _save(figure, path)


def draw_coadaptation(by_set: Mapping[str, Coadaptation], path: Path) -> None:
    """Draw the co-adaptation of each layer, and what it predicts, a line for each set.

    Args:
        by_set: Numbers by set, the inside set first; NaN leaves a gap.
        path: File to write.
    """
    panels = {"coadaptation": "co-adaptation", "prediction": "prediction, images as they are"}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 6.0), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True, sharey=True)
        for axis, (part, title) in zip(axes, panels.items(), strict=True):
            for (name, numbers), colour, marker in zip(by_set.items(), PALETTE, "os^Dvx", strict=False):
                values = getattr(numbers, part)
                named = {"label": short_name(name, _NAME)} if axis is axes[0] else {}
                axis.plot(range(1, len(values) + 1), values, color=colour, marker=marker, markersize=5, **named)
            axis.set_title(title, fontsize=10)
            axis.set_ylim(-0.03, 1.03)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
        figure.supylabel("squared correlation of −t and x", fontsize=10)
        figure.supxlabel("coupling layer, in order of application", fontsize=10)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        _save(figure, path)


def draw_latents(blocks: Mapping[str, tuple[Tensor, Mapping[str, Tensor]]], path: Path) -> None:
    """Draw images above their latents (Kirichenko et al. 2020, figure 2), one colour scale for all latents.

    Args:
        blocks: By set, images ``(N, 3, H, W)``, and by name maps ``(N, H, W)`` of the same images.
        path: File to write.
    """
    limit = _limit([values for _, latents in blocks.values() for values in latents.values()])
    images, latents = next(iter(blocks.values()))
    with mpl.rc_context(_STYLE):
        # One below the other: wide pictures are small on a phone.
        height = len(blocks) * ((1 + len(latents)) * _TILE + 0.5)
        figure = Figure(figsize=(len(images) * _TILE + 2.5, height), layout="constrained")
        axes = figure.subplots(len(blocks), 1, squeeze=False).flatten()
        size = tuple(images.shape[2:])
        for axis, (name, (images, latents)) in zip(axes, blocks.items(), strict=True):
            tiles = [_rgb(images, size), *(_coloured(values, limit, size) for values in latents.values())]
            _mosaic(axis, tiles, ["image", *latents], [""] * len(images))
            axis.set_title(short_name(name, _NAME), fontsize=10)
        _colourbar(figure, axes.tolist(), limit, "z")
        _save(figure, path, bbox_inches="tight")


def draw_layers(images: Mapping[str, Tensor], layers: Mapping[str, Sequence[Tensor]], symbol: str, path: Path) -> None:
    """Draw what every layer computes for one image of each set (Kirichenko et al. 2020, figure 3), on one colour scale.

    Args:
        images: By set, one image ``(3, H, W)``.
        layers: By set, one map ``(h, w)`` for each layer, NaN where the layer changes nothing.
        symbol: What is drawn, ``s`` or ``t``.
        path: File to write.
    """
    limit = _limit([values for maps in layers.values() for values in maps])
    count = len(next(iter(layers.values())))
    per_row = min(_LAYERS_PER_ROW, count)
    starts = range(0, count, per_row)
    size = tuple(next(iter(images.values())).shape[1:])
    blank = np.zeros((*size, 4))
    with mpl.rc_context(_STYLE):
        width = (per_row + 1) * _TILE + 2.2
        figure = Figure(figsize=(width, len(starts) * (len(images) * _TILE + 0.45)), layout="constrained")
        axes = figure.subplots(len(starts), 1, squeeze=False).flatten()
        for axis, start in zip(axes, starts, strict=True):
            numbers = range(start, min(start + per_row, count))
            rest = [blank] * (per_row - len(numbers))
            tiles = [
                [
                    *_rgb(images[name][None], size),
                    *(_coloured(maps[number][None], limit, size)[0] for number in numbers),
                    *rest,
                ]
                for name, maps in layers.items()
            ]
            titles = ["image", *(f"{symbol}, layer {number + 1}" for number in numbers), *[""] * len(rest)]
            _mosaic(axis, tiles, [short_name(name, 18) for name in images], titles)
        _colourbar(figure, axes.tolist(), limit, symbol)
        _save(figure, path, bbox_inches="tight")


def draw_images(rows: Mapping[str, Tensor], column_names: Sequence[str], path: Path) -> None:
    """Draw rows of images.

    Args:
        rows: By name, images ``(N, C, H, W)`` in [0, 1], N alike.
        column_names: A heading for each column; empty strings for none.
        path: File to write.
    """
    sizes = [tuple(images.shape[2:]) for images in rows.values()]
    with mpl.rc_context(_STYLE):
        headed = any(column_names)
        tile = 1.1 if headed else _TILE
        figure = Figure(
            figsize=(len(column_names) * tile + 1.6, len(rows) * tile + (0.6 if headed else 0.2)), layout="constrained"
        )
        tiles = [_rgb(images, sizes[0]) for images in rows.values()]
        _mosaic(figure.subplots(), tiles, [short_name(name, 22) for name in rows], column_names)
        _save(figure, path, bbox_inches="tight")


def _limit(maps: Sequence[Tensor]) -> float:
    """Colour scale that all maps share: symmetric, without the rarest extremes."""
    values = torch.cat([part.flatten() for part in maps]).abs()
    values = values[values.isfinite()]
    limit = float(np.quantile(values.cpu().numpy(), _QUANTILE)) if len(values) else 0.0
    return limit or 1.0


def _resized(images: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """``(N, C, h, w)`` to ``(N, H, W, C)``, each pixel kept a square."""
    if tuple(images.shape[2:]) != size:
        images = functional.interpolate(images, size, mode="nearest-exact")
    return images.float().cpu().permute(0, 2, 3, 1).numpy()


def _rgb(images: Tensor, size: tuple[int, ...]) -> list[np.ndarray]:
    """``(N, C, h, w)`` in [0, 1] to tiles; grey images get three channels, what is not finite becomes black."""
    return list(np.nan_to_num(_resized(images.expand(-1, 3, -1, -1), size), nan=0.0).clip(0, 1))


def _coloured(maps: Tensor, limit: float, size: tuple[int, ...]) -> list[np.ndarray]:
    """``(N, h, w)`` to tiles; NaN becomes grey."""
    return list(_DIVERGING(Normalize(-limit, limit)(_resized(maps[:, None], size)[..., 0]))[..., :3])


def _mosaic(axis: Axes, tiles: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[str]) -> None:
    """Draw a grid of tiles ``(H, W, 3)`` as one picture, with headings at its edges."""
    height, width = tiles[0][0].shape[:2]
    gap = max(1, round(_GAP * min(height, width)))
    # Between tiles the background of the page shows.
    canvas = np.zeros((len(tiles) * (height + gap) - gap, len(tiles[0]) * (width + gap) - gap, 4))
    for y, row in enumerate(tiles):
        for x, tile in enumerate(row):
            canvas[y * (height + gap) :, x * (width + gap) :][:height, :width, : tile.shape[2]] = tile
            canvas[y * (height + gap) :, x * (width + gap) :][:height, :width, 3] = tile.shape[2] == 3
    axis.imshow(canvas)
    axis.spines[:].set_visible(False)
    axis.xaxis.tick_top()
    axis.set_xticks([x * (width + gap) + width / 2 for x in range(len(columns))], columns, fontsize=8)
    axis.set_yticks([y * (height + gap) + height / 2 for y in range(len(rows))], rows, fontsize=9)
    axis.tick_params(length=0)


def _colourbar(figure: Figure, axes: list[Axes], limit: float, symbol: str) -> None:
    bar = figure.colorbar(ScalarMappable(Normalize(-limit, limit), _DIVERGING), ax=axes, fraction=0.03, aspect=25)
    bar.ax.set_title(symbol, fontsize=10)
    bar.locator = MaxNLocator(nbins=5)
    bar.ax.tick_params(labelsize=8)
    bar.ax.spines["outline"].set_visible(False)
