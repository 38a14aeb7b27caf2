# SPDX-License-Identifier: Apache-2.0
"""What the defaults are held to, on folders that are known by name, and what they reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from benchmarks.contest.detectors import TRAINED

from .cells import signed
from .selections import behind_best_rival, by_folder, gains, is_rival, of_part, usual_fit

CHOSEN = ("casting", "elpv_mono", "magnetic_tile", "mtoc")
"""Folders over which image AUROC is averaged. On deeppcb, of which every image shows another layout, all
detectors guess."""

SMALL_SETS = {
    ("one_class", "fashion_mnist"): 0.958,
    ("one_class", "mnist"): 0.992,
    ("left_out", "fashion_mnist"): 0.756,
    ("left_out", "mnist"): 0.926,
}
"""AUROC of `EmbeddingFlow` of version 0.1.0 on small images, below which no later one may fall by more than 0.002."""


class Bar(NamedTuple):
    """One figure and what it must be.

    Attributes:
        figure: What is measured.
        bar: What it must be.
        reached: What it is.
        held: Whether it is.
    """

    figure: str
    bar: str
    reached: str
    held: bool


def _mean(rows: pd.DataFrame, detector: str, least: float, *, above_rivals: bool) -> Bar | None:
    table = by_folder(of_part(rows, "industrial"))
    if detector not in table.index or not set(CHOSEN) <= set(table.columns):
        return None
    means = table[list(CHOSEN)].mean(axis=1)
    rivals = means[[is_rival(name) for name in means.index]]
    reached, held = f"{means[detector]:.3f}", means[detector] >= least
    bar = f"≥ {least:.3f}"
    if above_rivals and len(rivals):
        held &= means[detector] > rivals.max()
        bar += ", above every rival"
        reached += f" ({rivals.idxmax()} {rivals.max():.3f})"
    return Bar(f"{detector}: image AUROC, mean over {', '.join(CHOSEN)}", bar, reached, bool(held))


def _worst(rows: pd.DataFrame) -> Bar | None:
    table = by_folder(of_part(rows, "industrial"))
    behind = behind_best_rival(table)
    if "FeatureMapFlow" not in table.index or behind.loc["FeatureMapFlow"].isna().all():
        return None
    own = behind.T["FeatureMapFlow"].dropna()
    folder, distance = str(own.idxmax()), float(own.max())
    rival = table[folder][[is_rival(name) for name in table.index]].idxmax()
    return Bar(
        "FeatureMapFlow: image AUROC, how far below the best rival on any folder",
        "≤ 0.015",
        f"{distance:.3f} ({folder}, {rival})",
        distance <= 0.015,
    )


def _aupro(rows: pd.DataFrame, folder: str, least: float) -> Bar | None:
    some = of_part(rows, "industrial")
    values = some.loc[(some["detector"] == "FeatureMapFlow") & (some["task"] == folder), "aupro"].dropna()
    if values.empty:
        return None
    return Bar(f"FeatureMapFlow: AUPRO on {folder}", f"≥ {least:.3f}", f"{values.mean():.3f}", values.mean() >= least)


def _flow(rows: pd.DataFrame, trained: str) -> list[Bar]:
    some = of_part(rows, "industrial")
    each = {metric: gains(some, trained, TRAINED[trained], metric).mean(axis=1) for metric in ("auroc", "aupro")}
    if each["auroc"].empty:
        return []
    found = [(values.min(), f"{metric.upper()} on {values.idxmin()}") for metric, values in each.items() if len(values)]
    worst = min(found)
    mean = each["auroc"].mean()
    name = f"{trained} against {TRAINED[trained]}"
    return [
        Bar(f"{name}: least gain on any folder", "≥ −0.002", f"{signed(worst[0])} ({worst[1]})", worst[0] >= -0.002),
        Bar(f"{name}: mean gain of image AUROC", "≥ +0.020", signed(mean), mean >= 0.02),
    ]


def _small(rows: pd.DataFrame) -> list[Bar]:
    bars = []
    for (part, name), before in SMALL_SETS.items():
        some = of_part(rows, part)
        table = by_folder(some[some["task"].str.startswith(f"{name} ")])
        if not {"EmbeddingFlow", "KNN"} <= set(table.index):
            continue
        means = table.mean(axis=1)
        ours, knn = means["EmbeddingFlow"], means["KNN"]
        what = "one class" if part == "one_class" else "nine classes against one"
        held = ours >= before - 0.002 and round(ours, 3) >= round(knn, 3)
        bar = f"≥ {before - 0.002:.3f} and ≥ KNN"
        bars.append(Bar(f"EmbeddingFlow: {name}, {what}", bar, f"{ours:.3f} (KNN {knn:.3f})", held))
    return bars


def _unified(rows: pd.DataFrame) -> list[Bar]:
    means = by_folder(of_part(rows, "unified")).mean(axis=1)
    each = by_folder(of_part(rows, "industrial")).mean(axis=1)
    if "FeatureMapFlow" not in means.index:
        return []
    ours = means["FeatureMapFlow"]
    bars = []
    rivals = means[[is_rival(name) for name in means.index]]
    if len(rivals):
        ahead = ours - rivals.max()
        said = f"{signed(ahead)} ({ours:.3f}, {rivals.idxmax()} {rivals.max():.3f})"
        bars.append(
            Bar("FeatureMapFlow, one model for all: above every rival by image AUROC", "≥ +0.070", said, ahead >= 0.07)
        )
    if "FeatureMapFlow" in each.index:
        apart = each["FeatureMapFlow"] - ours
        said = f"{signed(apart)} ({each['FeatureMapFlow']:.3f} to {ours:.3f})"
        bars.append(Bar("FeatureMapFlow, one model for all: below a model for each by", "≤ 0.020", said, apart <= 0.02))
    return bars


def _few(rows: pd.DataFrame, detector: str) -> Bar | None:
    few, full = (by_folder(of_part(rows, part)).mean(axis=1) for part in ("few", "industrial"))
    if detector not in few.index or detector not in full.index:
        return None
    lost = full[detector] - few[detector]
    said = f"{signed(lost)} ({full[detector]:.3f} to {few[detector]:.3f})"
    return Bar(f"{detector}: image AUROC lost with 40 training images", "≤ 0.030", said, lost <= 0.03)


def _fit(rows: pd.DataFrame) -> list[Bar]:
    fits = usual_fit(of_part(rows, "industrial"))
    bars = []
    if "FeatureMapFlow" in fits.index:
        seconds = float(fits["fit_s"]["FeatureMapFlow"])
        bars.append(Bar("FeatureMapFlow: seconds of a fit to 300 images", "≤ 180", f"{seconds:.0f}", seconds <= 180))
        passes = float(fits["passes"]["FeatureMapFlow"])
        if not math.isnan(passes):
            bars.append(
                Bar("FeatureMapFlow: the same in passes of the backbone", "≤ 1.5", f"{passes:.2f}", passes <= 1.5)
            )
    return bars


def bars(rows: pd.DataFrame) -> list[Bar]:
    """Return every bar of which the rows say something.

    Args:
        rows: Those of one backbone and size, as :func:`benchmarks.suite.selections.split_tasks` returns them.
    """
    single: list[Callable[[], Bar | None]] = [
        lambda: _mean(rows, "FeatureMapFlow", 0.95, above_rivals=True),
        lambda: _worst(rows),
        lambda: _aupro(rows, "mtoc", 0.85),
        lambda: _aupro(rows, "magnetic_tile", 0.9),
        lambda: _mean(rows, "EmbeddingFlow", 0.948, above_rivals=False),
        *(lambda name=name: _few(rows, name) for name in ("FeatureMapFlow", "EmbeddingFlow")),
    ]
    found = [bar for make in single if (bar := make()) is not None]
    flows = [bar for name in TRAINED for bar in _flow(rows, name)]
    return [*found, *flows, *_unified(rows), *_small(rows), *_fit(rows)]
