# SPDX-License-Identifier: Apache-2.0
"""Charts of how well detectors tell outside images from inside ones at all thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve

from anomalib_flowood.look import PALETTE

from .charts import TEXT, Chart, chart_spec, colour_of, legend_name, pick

# Each colour, then all again, dashed.
_DASHES = ((1, 0), (6, 3), (2, 2), (6, 2, 2, 2))
_RATES = np.unique(np.concatenate([[0.0], np.geomspace(1e-3, 1, 40), np.linspace(0, 1, 51)]))


def roc_chart(scores: pd.DataFrame, title: str, detectors: Sequence[str], thresholds: Mapping[str, float]) -> Chart:
    """Draw the ROC curve of every detector.

    Of several seeds the true-positive rates are averaged at each false-positive rate, so that the area below the curve
    is the mean of the seeds' AUROC.

    Args:
        scores: One row per test image of one data set with the columns ``detector``, ``seed``, ``label`` (both 0 and 1
            occur) and ``score``.
        title: What is told from what.
        detectors: All detectors of the page: each has the same colour in every chart.
        thresholds: Of the first seed of each detector that has one: a point marks where it is.
    """

    def curve(labels: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, float]:
        false, true, _ = roc_curve(labels, ranks, drop_intermediate=False)
        return np.interp(_RATES, false, true), float(auc(false, true))

    def place(labels: np.ndarray, alarm: np.ndarray) -> tuple[float, float]:
        return float(alarm[labels == 0].mean()), float(alarm[labels == 1].mean())

    lines, points, names, areas = _curves(scores, detectors, thresholds, curve, place)
    # At a false-positive rate of 0 a curve rises from 0.
    lines = [{"x": 0.0, "y": 0.0, "name": name} for name in names] + lines
    spec = _curve_spec(f"ROC: {title}", lines, points, names, detectors, ("false-positive rate", "true-positive rate"))
    mark = {"type": "line", "color": TEXT, "opacity": 0.3, "strokeWidth": 1, "aria": False}
    chance: dict[str, Any] = {"data": {"values": [{"x": 0, "y": 0}, {"x": 1, "y": 1}]}, "mark": mark}
    chance["encoding"] = {axis: {"field": axis, "type": "quantitative"} for axis in ("x", "y")}
    spec["layer"].insert(0, chance)
    return Chart(f"ROC: {title}", f"ROC curves, {title}. AUROC: {'; '.join(areas)}.", spec)


def precision_chart(
    scores: pd.DataFrame, title: str, detectors: Sequence[str], thresholds: Mapping[str, float]
) -> Chart:
    """Draw precision against recall of every detector, outside images being what is looked for.

    Of several seeds the precision is averaged at each recall. Arguments are those of :func:`roc_chart`.
    """

    def curve(labels: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, float]:
        precision, recall, _ = precision_recall_curve(labels, ranks)
        # Steps: what has to be accepted for at least so high a recall.
        order = np.searchsorted(recall[::-1], _RATES)
        return precision[::-1][order], float(average_precision_score(labels, ranks))

    def place(labels: np.ndarray, alarm: np.ndarray) -> tuple[float, float]:
        return float(alarm[labels == 1].mean()), float(labels[alarm].mean()) if alarm.any() else math.nan

    lines, points, names, areas = _curves(scores, detectors, thresholds, curve, place)
    share = float(scores["label"].mean())
    # At a recall of 1 a curve falls to where everything raises an alarm.
    lines += [{"x": 1.0, "y": round(share, 5), "name": name} for name in names]
    spec = _curve_spec(f"Precision and recall: {title}", lines, points, names, detectors, ("recall", "precision"))
    mark = {"type": "rule", "color": TEXT, "opacity": 0.3, "aria": False}
    y = {"field": "y", "type": "quantitative"}
    spec["layer"].insert(0, {"data": {"values": [{"y": share}]}, "mark": mark, "encoding": {"y": y}})
    spoken = f"Precision-recall curves, {title}. Average precision: {'; '.join(areas)}."
    return Chart(f"Precision and recall: {title}", spoken, spec)


def _curves(
    scores: pd.DataFrame, detectors: Sequence[str], thresholds: Mapping[str, float], curve: Any, place: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str], list[str]]:
    """Points of each detector's curve, where its threshold is, legends (to detectors), and its areas spoken."""
    lines: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    spoken = []
    for detector, group in scores.groupby("detector", sort=False):
        seeds = [one for _, one in group.groupby("seed", sort=False)]
        # Ranks, because scikit-learn refuses infinite scores.
        found = [curve(one["label"].to_numpy(int), one["score"].rank(method="dense").to_numpy()) for one in seeds]
        values, areas = zip(*found, strict=True)
        area = f"{np.mean(areas):.3f}" + (f" ± {np.std(areas, ddof=1):.3f}" if len(areas) > 1 else "")
        spoken.append(f"{detector} {area}")
        name = legend_name(area, detector, detectors)
        names[name] = str(detector)
        lines += [{"x": x, "y": y, "name": name} for x, y in _bends(_RATES, np.mean(values, axis=0))]
        if str(detector) in thresholds:
            first = seeds[0]
            alarm = (first["score"] > thresholds[str(detector)]).to_numpy()
            x, y = place(first["label"].to_numpy(int), alarm)
            if not math.isnan(y):
                points.append({"x": round(x, 5), "y": round(y, 5), "name": name})
    return lines, points, names, spoken


def _bends(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """The ends of a curve's straight parts."""
    slopes = np.diff(y) / np.diff(x)
    kept = np.concatenate([[True], ~np.isclose(slopes[1:], slopes[:-1], rtol=1e-6, atol=1e-9), [True]])
    return [(round(float(one), 5), round(float(other), 5)) for one, other in zip(x[kept], y[kept], strict=True)]


def _curve_spec(
    title: str,
    lines: list[dict[str, Any]],
    points: list[dict[str, Any]],
    names: Mapping[str, str],
    detectors: Sequence[str],
    axes: tuple[str, str],
) -> dict[str, Any]:
    places = [detectors.index(detector) for detector in names.values()]
    number, name = {"type": "quantitative"}, {"field": "name", "type": "nominal"}
    colours, dashes = zip(
        *((colour_of(place), _DASHES[place // len(PALETTE) % len(_DASHES)]) for place in places), strict=True
    )
    shown: dict[str, Any] = {"color": name | {"scale": {"domain": list(names), "range": colours}}}
    shown["tooltip"] = [{"field": "name", "title": "detector"}]
    for axis, title_of in zip("xy", axes, strict=True):
        shown[axis] = {"field": axis, "title": title_of, "scale": {"domain": [0, 1]}, **number}
        shown["tooltip"].append({"field": axis, "title": title_of, "format": ".3f", **number})
    dash = name | {"scale": {"domain": list(names), "range": dashes}}
    line: dict[str, Any] = {
        "data": {"values": lines},
        "mark": {"type": "line", "strokeWidth": 2, "aria": False},
        "encoding": {**shown, "strokeDash": dash, "order": {"value": 0}},
    }
    # Points that are not seen have tooltips, which lines do not.
    some = {"values": lines[:: max(1, len(lines) // (20 * len(names)))]}
    unseen = {"type": "point", "opacity": 0, "size": 120, "filled": True, "aria": False}
    layers: list[dict[str, Any]] = [line, {"data": some, "mark": unseen, "encoding": shown}]
    if points:
        mark = {"type": "point", "filled": True, "size": 60, "opacity": 1, "stroke": TEXT, "aria": False}
        layers.append({"data": {"values": points}, "mark": mark, "encoding": shown})
    if len(names) > 1:
        line["params"] = [pick("detector", names)]
        line["encoding"]["opacity"] = {"condition": {"param": "pick", "value": 1}, "value": 0.12}
    return chart_spec(title, layers)
