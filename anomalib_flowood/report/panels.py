# SPDX-License-Identifier: Apache-2.0
"""Small pictures for a page: one panel each, as SVG that takes its colours and its fonts from the page around it."""

from __future__ import annotations

import io
import itertools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from sklearn.metrics import auc, roc_curve

from anomalib_flowood.look import BLUE, PALETTE, heading, short_name

from .plots import draw_histogram

# Each colour, then all again, dashed.
_STYLES = [(colour, dash) for dash, colour in itertools.product(("-", "--", ":", "-."), PALETTE)]
_MARKERS = "os^DvPX*"
# matplotlib has no word for the page's text colour: this one stands for it and is replaced.
_TEXT = "#010203"
# The blue is too dark for a dark page, which has a brighter one.
_REPLACED = {_TEXT: "currentColor", BLUE.lower(): f"var(--blue, {BLUE.lower()})"}
_RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.borderaxespad": 0,
    "legend.labelspacing": 0.3,
    "svg.fonttype": "none",
    "svg.hashsalt": "flowood",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), _TEXT
    ),
}
# Inches. Fixed, so that the axes of all panels have one size and stand in line.
_WIDTH, _AXES_HEIGHT, _LEGEND_LINE = 4.0, 1.9, 0.17
_TITLE = 48  # characters in a line
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.62, 0.15, 0.45, 0.55
_RATES = np.unique(np.concatenate([[0.0], np.geomspace(1e-4, 1, 120), np.linspace(0, 1, 101)]))


def roc_panel(scores: pd.DataFrame, title: str, detectors: Sequence[str]) -> str:
    """Draw the ROC curve of every detector.

    Of several seeds the true-positive rates are averaged at each false-positive rate, so that the area below the curve
    is the mean of the seeds' AUROC.

    Args:
        scores: One row per test image of one data set with the columns ``detector``, ``seed``, ``label`` (both 0 and 1
            occur) and ``score``.
        title: What is told from what.
        detectors: All detectors of the page: each has the same colour in every panel.

    Returns:
        An ``svg`` element.
    """
    with mpl.rc_context(_RC):
        figure, axis = _figure(scores["detector"].nunique())
        axis.plot([0, 1], [0, 1], color=_TEXT, alpha=0.35, linewidth=0.8)
        areas = []
        for detector, group in scores.groupby("detector", sort=False):
            colour, dash = _STYLES[detectors.index(detector) % len(_STYLES)]
            curves, seeds = [], []
            for _, one in group.groupby("seed", sort=False):
                # Ranks, because scikit-learn refuses infinite scores.
                ranks = one["score"].rank(method="dense")
                false, true, _ = roc_curve(one["label"].astype(int), ranks, drop_intermediate=False)
                curves.append(np.interp(_RATES, false, true))
                seeds.append(auc(false, true))
            area = f"{np.mean(seeds):.3f}" + (f" ± {np.std(seeds, ddof=1):.3f}" if len(seeds) > 1 else "")
            areas.append(f"{detector} {area}")
            entry = f"{area}  {short_name(detector, 46)}"
            axis.plot([0, *_RATES], [0, *np.mean(curves, axis=0)], color=colour, linestyle=dash, label=entry)
        axis.set(xlabel="false-positive rate", ylabel="true-positive rate", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axis.set_title(heading(f"ROC: {title}", _TITLE))
        figure.legend(loc="lower left")
        return _svg(figure, f"ROC curves, {title}. AUROC: {'; '.join(areas)}.")


def histogram_panel(scores: pd.DataFrame, title: str, colours: Mapping[str, str]) -> str:
    """Draw one detector's histogram of scores inside and outside.

    Args:
        scores: One row per test image of one detector, data set and seed, with the columns ``source``, ``label`` and
            ``score``.
        title: The detector.
        colours: A colour for each source, as :func:`.plots.source_colours` chooses them.

    Returns:
        An ``svg`` element.
    """
    with mpl.rc_context(_RC):
        outside = scores.loc[scores["label"] == 1, "source"].nunique()
        figure, axis = _figure(math.ceil(min(1 + outside, len(colours)) / 2))
        handles = draw_histogram(axis, scores, dict(colours))
        axis.set(xlabel="raw score (higher: more anomalous)", ylabel="share of images")
        axis.set_title(heading(title, _TITLE))
        figure.legend(list(handles.values()), [short_name(name, 28) for name in handles], loc="lower left", ncols=2)
        sides = {"inside": scores[scores["label"] == 0], "outside": scores[scores["label"] == 1]}
        spoken = ", ".join(
            f"median {side} {rows['score'].median():.4g}" for side, rows in sides.items() if not rows.empty
        )
        return _svg(figure, f"Score histograms of {title}: {spoken}.")


def speed_panel(summary: pd.DataFrame, column: str, label: str, detectors: Sequence[str]) -> str | None:
    """Draw how well each detector detects against what it costs.

    Args:
        summary: One row per detector on one data set with the columns ``detector``, ``AUROC`` and ``column``.
        column: What it costs; values that are missing are left out.
        label: The column in words, with its unit.
        detectors: All detectors of the page: each has the same colour and marker in every panel.

    Returns:
        An ``svg`` element; ``None`` if no detector has both numbers.
    """
    known = summary[summary["AUROC"].notna() & summary[column].gt(0)]
    if known.empty:
        return None
    with mpl.rc_context(_RC):
        figure, axis = _figure(len(known))
        spoken = []
        for detector, area, value in known[["detector", "AUROC", column]].itertuples(index=False):
            place = detectors.index(detector)
            number = f"{value:,.{1 if value < 10 else 0}f}"
            spoken.append(f"{detector} {number}")
            entry = f"{number}  {short_name(detector, 46)}"
            colour, marker = PALETTE[place % len(PALETTE)], _MARKERS[place % len(_MARKERS)]
            axis.plot(value, area, marker, color=colour, markersize=7, linestyle="none", label=entry)
        axis.set_xscale("log")
        low, high = known[column].min() / 1.7, known[column].max() * 1.7
        axis.set_xlim(low, high)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(y=0.15)
        axis.set(xlabel=label, ylabel="AUROC")
        axis.set_title(f"AUROC against {label}")
        figure.legend(loc="lower left")
        return _svg(figure, f"AUROC against {label}: {'; '.join(spoken)}.")


def _figure(legend_lines: int) -> tuple[Figure, mpl.axes.Axes]:
    """An empty panel, with room for a legend below."""
    below = _BOTTOM + _LEGEND_LINE * legend_lines
    height = _TOP + _AXES_HEIGHT + below
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasSVG(figure)
    width = _WIDTH - _LEFT - _RIGHT
    axis = figure.add_axes((_LEFT / _WIDTH, below / height, width / _WIDTH, _AXES_HEIGHT / height))
    return figure, axis


def _svg(figure: Figure, spoken: str) -> str:
    """The figure as an element that can stand in a page beside others, and as a file of its own."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, replacement in _REPLACED.items():
        text = text.replace(colour, replacement)
    # The same identifier must not stand twice in a page: each picture has its own, and only where something refers.
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    prefix = f"p{zlib.crc32(text.encode()):x}"
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(spoken)}" ', 1)
