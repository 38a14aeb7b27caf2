# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a benchmark's scores look like."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from anomalib_flowood.files import whole_file
from anomalib_flowood.look import PALETTE, heading, short_name
from anomalib_flowood.metrics import auroc, rate_text

IN_DISTRIBUTION, OTHERS = "in-distribution", "other anomalies"
"""What the inside images are called, and the rarest sources together."""
_INSIDE_COLOUR, *_OUTSIDE_COLOURS = PALETTE
_BINS = 40


def score_histograms(scores: pd.DataFrame, path: str | Path) -> Path:
    """Draw one panel per detector and data set: in-distribution scores against every out-of-distribution source.

    Of several seeds only the first is drawn: raw scores of two trainings have no common scale. Scores beyond every
    source's whiskers (Tukey's, 1.5 interquartile ranges) are counted in the outermost bins, so that a long tail does
    not squeeze everything else into a line.

    Args:
        scores: One row per test image with the columns ``detector``, ``data``, ``seed``, ``source``, ``label`` (0
            in-distribution, 1 out-of-distribution) and ``score`` (raw, higher is more anomalous).
        path: File to write; its suffix picks the format.

    Returns:
        The path written.

    Raises:
        ValueError: If there are no scores to draw.
    """
    if scores.empty:
        msg = "There are no scores to draw."
        raise ValueError(msg)
    panels = [
        (str(detector), str(data), first_seed(group))
        for (detector, data), group in scores.groupby(["detector", "data"], sort=False)
    ]
    colours = source_colours(scores)
    columns = min(len(panels), 2 if len(panels) in {2, 4} else 3)
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        # A figure of its own rather than pyplot's: no global state, no window, whatever backend the user chose.
        figure = Figure(
            figsize=(max(4.2 * columns, 5.5), 3.0 * rows + 0.9), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        handles: dict[str, Artist] = {}
        for axis, (detector, data, group) in zip(axes, panels, strict=False):
            handles |= draw_histogram(axis, group, colours)
            axis.set_title(_title(detector, data, group), fontsize=10)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        figure.supxlabel("raw score (higher: more anomalous)", fontsize=10)
        figure.supylabel("share of images", fontsize=10)
        ordered = [name for name in colours if name in handles]
        figure.legend(
            [handles[name] for name in ordered],
            [short_name(name, 40) for name in ordered],
            loc="outside upper center",
            ncols=min(len(ordered), columns + 1),
            frameon=False,
        )
        with whole_file(path) as file:
            figure.savefig(file, dpi=130)
    return Path(path)


def source_colours(scores: pd.DataFrame) -> dict[str, str]:
    """Choose a colour for each out-of-distribution source, the same in all panels; the rarest share the last one.

    Args:
        scores: One row per test image with the columns ``source`` and ``label``.

    Returns:
        Colours by name, the in-distribution images first.
    """
    names = list(_set_names(scores.loc[scores["label"] == 1, "source"]).value_counts(sort=True).index)
    colours = {IN_DISTRIBUTION: _INSIDE_COLOUR}
    if len(names) > len(_OUTSIDE_COLOURS):
        names = [*names[: len(_OUTSIDE_COLOURS) - 1], OTHERS]
    return colours | dict(zip(names, _OUTSIDE_COLOURS, strict=False))


def shown_names(scores: pd.DataFrame, colours: Mapping[str, str]) -> pd.Series:
    """What each image is called in a legend: one of the names that :func:`source_colours` has given a colour."""
    sources = _set_names(scores["source"])
    return sources.where(sources.isin(list(colours)), OTHERS).where(scores["label"] == 1, IN_DISTRIBUTION)


def _set_names(sources: pd.Series) -> pd.Series:
    """Sources as text; one that is called as what is drawn beside them becomes, say, ``in-distribution (set)``."""
    names = sources.astype(str)
    return names.where(~names.isin([IN_DISTRIBUTION, OTHERS]), names + " (set)")


def first_seed(scores: pd.DataFrame) -> pd.DataFrame:
    """The images of the first seed: raw scores of two trainings have no common scale."""
    return scores[scores["seed"] == scores["seed"].iloc[0]]


def _title(detector: str, data: str, group: pd.DataFrame) -> str:
    value = auroc(torch.tensor(group["score"].to_numpy(float)), torch.tensor(group["label"].to_numpy(int)))
    return f"{heading(detector, 40)}\n{heading(data, 40)}\nAUROC {rate_text(value)}"


def whiskers(parts: Iterable[np.ndarray]) -> tuple[float, float]:
    """Span the whiskers (Tukey's, 1.5 interquartile ranges) of all parts' finite values.

    The two ends always differ: constant values still deserve a bar.
    """
    ends: list[float] = []
    for part in parts:
        finite = part[np.isfinite(part)]
        if len(finite):
            quarter, three_quarters = np.quantile(finite, [0.25, 0.75])
            reach = 1.5 * (three_quarters - quarter)
            ends += [max(finite.min(), quarter - reach), min(finite.max(), three_quarters + reach)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 0.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def draw_shares(axis: mpl.axes.Axes, values: np.ndarray, edges: np.ndarray, colour: str, name: str) -> None:
    """Draw the share of the values in each bin; those beyond the outermost edges count in the outermost bins."""
    axis.hist(
        np.clip(values, edges[0], edges[-1]),
        bins=edges.tolist(),
        weights=np.full(len(values), 1 / len(values)),
        histtype="stepfilled",
        facecolor=(colour, 0.35),
        edgecolor=colour,
        linewidth=1.2,
        label=name,
    )


def draw_histogram(axis: mpl.axes.Axes, group: pd.DataFrame, colours: dict[str, str]) -> dict[str, Artist]:
    """Draw one panel, of test images with ``source``, ``label`` and ``score``; return a legend handle for each name."""
    values = group["score"].to_numpy(float)
    low, high = whiskers(part.to_numpy(float) for _, part in group.groupby(["label", "source"])["score"])
    edges = np.linspace(low, high, _BINS + 1)
    names = shown_names(group, colours)
    handles: dict[str, Artist] = {}
    for name, colour in colours.items():
        chosen = values[(names == name).to_numpy()]
        if len(chosen):
            draw_shares(axis, chosen, edges, colour, name)
            handles[name] = axis.patches[-1]
    axis.margins(x=0.02)
    axis.locator_params(axis="x", nbins=5)
    axis.locator_params(axis="y", nbins=4)
    axis.ticklabel_format(axis="x", style="sci", scilimits=(-3, 5), useMathText=True)
    axis.tick_params(labelsize=8)
    return handles
