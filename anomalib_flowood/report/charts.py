# SPDX-License-Identifier: Apache-2.0
"""Charts of a page: a Vega-Lite specification each, drawn here as SVG and by the page's script as what can be explored.

Colours are the page's variables and its text colour, so that a chart is right on a light page, a dark one and in print.
"""

from __future__ import annotations

import math
import re
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import vl_convert

from anomalib_flowood.look import BLUE, PALETTE, short_names

from .plots import shown_names, whiskers

VEGA_LITE = "6.1"
"""Version of Vega-Lite, of those that vl-convert bundles."""

TEXT = "currentColor"
"""The colour of the text around a chart."""
_LEGEND = 46
"""Characters of a line of a legend, in a wide font."""
_TITLE = 44
"""Characters of a line of a title, likewise."""
_SET = 20
"""Characters of a set's name, of which a line of a legend has two."""

_WIDTH, _HEIGHT = 360, 190
_BINS = 40
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_SHARES = {"tickCount": 4, "format": "%"}
_CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "padding": 4,
    "view": {"stroke": None},
    "axis": {
        **dict.fromkeys(("domainColor", "gridColor", "labelColor", "tickColor", "titleColor"), TEXT),
        "gridOpacity": 0.12,
        "domainOpacity": 0.5,
        "tickOpacity": 0.5,
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titlePadding": 10,  # the reader's font may be wider than the one in which labels were measured
    },
    "legend": {
        **dict.fromkeys(("labelColor", "titleColor"), TEXT),
        "orient": "bottom",
        "columns": 1,
        "labelFontSize": 12,
        "labelLimit": 330,
        "rowPadding": 4,
        "title": None,
    },
    "title": {"anchor": "start", "color": TEXT, "fontSize": 13, "fontWeight": 600, "limit": 350, "offset": 10},
}


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: What it shows.
        spoken: The same and its main numbers, for those who do not see it.
        spec: The Vega-Lite specification, which holds its data.
    """

    title: str
    spoken: str
    spec: dict[str, Any]

    @cached_property
    def svg(self) -> str:
        """The chart as an ``svg`` element of a page, whose colours it takes."""
        text = vl_convert.vegalite_to_svg(self.spec, vl_version=VEGA_LITE, allowed_base_urls=[])
        text = _unique(_slim(text[text.index("<svg") :]))
        return text.replace("<svg ", f'<svg role="img" aria-label="{escape(self.spoken)}" ', 1)

    @property
    def file(self) -> str:
        """The chart as a file of its own, in the colours of a light page."""
        return re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", self.svg)


@cache
def bundle() -> str:
    """Vega-Lite as one script, which defines ``vegaEmbed`` and fetches nothing."""
    # What ends an element must not stand in it.
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE).replace("</script", "<\\/script")


def histogram_chart(
    scores: pd.DataFrame, title: str, colours: Mapping[str, str], threshold: float = math.nan, level: str = ""
) -> Chart:
    """Draw one detector's histogram of scores inside and outside, and where its threshold is.

    Args:
        scores: One row per test image of one detector, data set and seed, with the columns ``source``, ``label`` and
            ``score``.
        title: The detector.
        colours: A colour for each source, as :func:`.plots.source_colours` chooses them.
        threshold: Images with a higher score raise an alarm; NaN if there is none.
        level: That of the threshold, in words; empty if it has none.
    """
    low, high = whiskers(part.to_numpy(float) for _, part in scores.groupby(["label", "source"])["score"])
    if math.isfinite(threshold):
        margin = 0.02 * (high - low)
        low, high = min(low, threshold - margin), max(high, threshold + margin)
    edges = np.linspace(low, high, _BINS + 1)
    names = shown_names(scores, colours)
    shown = {name: colour for name, colour in colours.items() if (names == name).any()}
    short = short_names(shown, _SET)
    bins: list[dict[str, Any]] = []
    for name in shown:
        values = scores.loc[names == name, "score"].to_numpy(float)
        counts, _ = np.histogram(np.clip(values, low, high), edges)
        bins += [
            {"name": short[name], "x": round(float(x), 6), "end": round(float(end), 6), "images": int(count)}
            | {"share": round(int(count) / len(values), 6)}
            for x, end, count in zip(edges[:-1], edges[1:], counts, strict=True)
            if count
        ]
    layers = [_bars(bins, {short[name]: colour for name, colour in shown.items()}, (low, high))]
    if len(shown) > 1:
        layers[0]["params"] = [pick("show", {short[name]: name for name in shown})]
    if math.isfinite(threshold):
        layers += _threshold_layers(threshold, level, (low, high))
    sides = {"inside": scores[scores["label"] == 0], "outside": scores[scores["label"] == 1]}
    spoken = [f"median {side} {rows['score'].median():.4g}" for side, rows in sides.items() if not rows.empty]
    if math.isfinite(threshold):
        spoken.append(f"threshold {threshold:.4g}")
    return Chart(title, f"Score histograms of {title}: {', '.join(spoken)}.", chart_spec(title, layers))


def _bars(bins: list[dict[str, Any]], colours: Mapping[str, str], ends: tuple[float, float]) -> dict[str, Any]:
    scale = {"domain": list(colours), "range": [_themed(colour) for colour in colours.values()]}
    axis = {"tickCount": 5, "format": ".5~g" if max(map(abs, ends)) < 1e5 else ".1e"}
    legend = {"columns": 2, "labelLimit": 150, "columnPadding": 14}
    name = {"field": "name", "type": "nominal", "scale": scale}
    number = {"type": "quantitative"}
    tooltip: list[dict[str, Any]] = [{"field": "name", "title": "of"}]
    for field, title, form in (("x", "from", ".4g"), ("end", "to", ".4g"), ("images", "images", ",d")):
        tooltip.append({"field": field, "title": title, "format": form, **number})
    tooltip.append({"field": "share", "title": "share", "format": ".1%", **number})
    ends_scale = {"domain": list(ends), "nice": False, "zero": False}
    bars: dict[str, Any] = {
        "data": {"values": bins},
        "mark": {"type": "bar", "fillOpacity": 0.45, "strokeWidth": 1, "binSpacing": 0, "aria": False},
        "encoding": {
            "x": {
                "field": "x",
                "title": "raw score (higher: more anomalous)",
                "scale": ends_scale,
                "axis": axis,
                **number,
            },
            "x2": {"field": "end"},
            "y": {"field": "share", "stack": None, "title": "share of images", "axis": _SHARES, **number},
            "y2": {"datum": 0},
            "color": {**name, "legend": legend},
            "stroke": {**name, "legend": legend},
            "tooltip": tooltip,
        },
    }
    if len(colours) > 1:
        bars["encoding"]["opacity"] = {"condition": {"param": "pick", "value": 1}, "value": 0.12}
    return bars


def _threshold_layers(threshold: float, level: str, ends: tuple[float, float]) -> list[dict[str, Any]]:
    """A line at the threshold, and its name on the side where there is room."""
    name = f"threshold, {level}" if level else "threshold"
    right = threshold < (ends[0] + ends[1]) / 2
    x = {"x": {"field": "threshold", "type": "quantitative"}}
    tip = {"tooltip": [{"field": "threshold", "title": name, "format": ".5g", "type": "quantitative"}]}
    data = {"values": [{"threshold": threshold, "name": name}]}
    line = {"type": "rule", "color": TEXT, "strokeDash": [5, 3], "strokeWidth": 1.6, "aria": False}
    text = {"type": "text", "color": TEXT, "align": "left" if right else "right", "dx": 5 if right else -5, "dy": 6}
    text["aria"] = False
    place = {"y": {"value": 0}, "text": {"field": "name"}}
    return [
        {"data": data, "mark": line, "encoding": x | tip},
        {"data": data, "mark": text, "encoding": x | place},
    ]


def speed_chart(summary: pd.DataFrame, column: str, label: str, detectors: Sequence[str]) -> Chart | None:
    """Draw how well each detector detects against what it costs.

    Args:
        summary: One row per detector on one data set with the columns ``detector``, ``AUROC`` and ``column``.
        column: What it costs; values that are missing are left out.
        label: The column in words, with its unit.
        detectors: All detectors of the page: each has the same colour and shape in every chart.

    Returns:
        The chart; ``None`` if no detector has both numbers.
    """
    known = summary[summary["AUROC"].notna() & summary[column].gt(0)]
    if known.empty:
        return None
    rows: dict[str, dict[str, Any]] = {}
    spoken, colours, shapes = [], [], []
    for detector, area, value in known[["detector", "AUROC", column]].itertuples(index=False):
        place = detectors.index(detector)
        number = f"{value:,.{1 if value < 10 else 0}f}"
        spoken.append(f"{detector} {number}")
        colours.append(colour_of(place))
        shapes.append(_SHAPES[place % len(_SHAPES)])
        name = legend_name(number, detector, detectors)
        rows[name] = {"name": name, "cost": float(value), "AUROC": float(area), "detector": str(detector)}
    ends = [known[column].min() / 1.7, known[column].max() * 1.7]
    cost: dict[str, Any] = {"field": "cost", "type": "quantitative", "title": label}
    auroc: dict[str, Any] = {"field": "AUROC", "type": "quantitative"}
    named: dict[str, Any] = {"field": "name", "type": "nominal"}
    # Thousands are k; thousandths, which would be m, are what they are.
    small = "datum.label && datum.value < 1 ? format(datum.value, '.2~g') : datum.label"
    axis = {"format": "~s", "tickCount": 4, "labelExpr": small}
    layer = {
        "data": {"values": list(rows.values())},
        "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1, "aria": False},
        "encoding": {
            "x": cost | {"scale": {"type": "log", "domain": ends, "nice": False}, "axis": axis},
            "y": auroc | {"scale": {"zero": False, "padding": 12}, "axis": {"tickCount": 5, "format": ".3~f"}},
            "color": named | {"scale": {"domain": list(rows), "range": colours}},
            "shape": named | {"scale": {"domain": list(rows), "range": shapes}},
            "tooltip": [{"field": "detector"}, auroc | {"format": ".3f"}, cost | {"format": ",.1f"}],
        },
    }
    title = f"AUROC against {label}"
    return Chart(title, f"{title}: {'; '.join(spoken)}.", chart_spec(title, [layer]))


def chart_spec(title: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Put layers, each with data, mark and encoding, under one title, in the look of all charts."""
    lines = textwrap.wrap(title, _TITLE, max_lines=2, placeholder="…")
    return {
        "config": _CONFIG,
        "title": lines if len(lines) > 1 else title,
        "width": _WIDTH,
        "height": _HEIGHT,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "layer": layers,
    }


def pick(label: str, names: Mapping[str, str]) -> dict[str, Any]:
    """A list to pick one name from, which fades the others.

    Args:
        label: What is picked.
        names: What the list shows for each value of the field ``name``.
    """
    options, labels = [None, *names], ["all", *names.values()]
    binding = {"input": "select", "options": options, "labels": labels, "name": f"{label}: "}
    return {"name": "pick", "select": {"type": "point", "fields": ["name"]}, "bind": {"name": binding}}


def legend_name(number: str, detector: object, detectors: Sequence[str]) -> str:
    """What a detector is called in a legend, after its number: different from all other detectors of the page."""
    return f"{number}  {short_names(detectors, _LEGEND - 2 - len(number))[str(detector)]}"


def colour_of(place: int) -> str:
    """The colour of the detector at a place among those of the page."""
    return _themed(PALETTE[place % len(PALETTE)])


def _themed(colour: str) -> str:
    """The page's variable for a colour: the blue is too dark for a dark page, which has a brighter one."""
    return f"var(--blue, {BLUE.lower()})" if colour == BLUE else colour


def _slim(svg: str) -> str:
    """Leave out what nobody sees of a drawing, which has a label of its own: half of it."""

    def slim(tag: re.Match[str]) -> str:
        kept = re.sub(r' (?:class|pointer-events|role|aria-[a-z]+)="[^"]*"', "", tag[0])
        return re.sub(
            r'( (?:d|transform)=")([^"]*)', lambda place: place[1] + re.sub(r"(\.\d\d)\d+", r"\1", place[2]), kept
        )

    start = svg.index(">") + 1
    seen = re.sub(r'<path [^<>]*\bopacity="0"[^<>]*/>', "", svg[start:])
    return svg[:start] + re.sub(r"<[a-z][^<>]*>", slim, seen)


def _unique(svg: str) -> str:
    """The same identifier must not stand twice in a page: each picture has its own."""
    prefix = f"p{zlib.crc32(svg.encode()):x}"
    svg = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)
