# SPDX-License-Identifier: Apache-2.0
"""What became of the paper's claims, from the stored rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from benchmarks.tables import mean_sd

from .plan import with_bottleneck
from .profiles import CHANNEL, CHECKERBOARD, CYCLE, CYCLE_BOTTLENECK, EMBEDDING, GLOW, HORIZONTAL, MULTI_SCALE
from .selections import beside, by_k, pixel_runs, values_of

TITLES = {
    "mask_time": "Masks at equal training time",
    "mask_epochs": "Masks at equal epochs",
    "logit": "A flatter logit",
    "bottleneck": "The bottleneck",
    "multi_scale": "Bottlenecks in RealNVP and Glow",
    "samples": "Samples",
    "embedding": "Pixels against pretrained features",
    "one_class": "One class of clothes against the other nine",
}
"""What tables call the parts."""


class Claim(NamedTuple):
    """One claim and what was measured.

    Attributes:
        text: What the paper, or this project's bar, says.
        measured: The numbers.
        held: Whether they agree.
    """

    text: str
    measured: str
    held: bool


def _apart(lower: pd.Series, higher: pd.Series) -> bool:
    """Whether one mean exceeds the other by more than the two standard deviations together."""
    spread = sum(float(values.std()) for values in (lower, higher) if len(values) > 1)
    return float(higher.mean() - lower.mean()) > spread


def _order(rows: pd.DataFrame) -> Claim | None:
    names = (CHECKERBOARD, HORIZONTAL, CYCLE_BOTTLENECK)
    values = [values_of(rows, "mask_time", name) for name in names]
    if any(some.empty for some in values):
        return None
    held = all(_apart(lower, higher) for lower, higher in pairwise(values))
    text = f"AUROC: {' < '.join(names)}, at equal time, gaps larger than the spreads"
    return Claim(text, " < ".join(map(mean_sd, values)) if held else ", ".join(map(mean_sd, values)), held)


def _plain(rows: pd.DataFrame) -> Claim | None:
    values = {name: values_of(rows, "mask_time", name).mean() for name in (CHECKERBOARD, CHANNEL, GLOW)}
    if any(np.isnan(value) for value in values.values()):
        return None
    measured = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    return Claim(
        "Plain flows rate digits as more likely than clothes: AUROC below 0.5",
        measured,
        all(value < 0.5 for value in values.values()),
    )


def _best_bottleneck(rows: pd.DataFrame) -> Claim | None:
    means = by_k(rows).groupby("k")["auroc"].mean()
    if means.empty:
        return None
    best = int(means.index[int(means.argmax())])
    text = f"AUROC of {CYCLE_BOTTLENECK}, best K, −log p alone: at least 0.90"
    return Claim(text, f"K = {best}: {mean_sd(values_of(rows, 'bottleneck', f'K = {best}'))}", bool(means[best] >= 0.9))


def _coadaptation(rows: pd.DataFrame) -> Claim | None:
    horizontal, cycle = (values_of(rows, "mask_time", name, "coadaptation") for name in (HORIZONTAL, CYCLE))
    if horizontal.empty or cycle.empty:
        return None
    return Claim(
        "Co-adaptation: horizontal at least twice that of cycle, same subnet",
        f"{mean_sd(horizontal)} and {mean_sd(cycle)}: {horizontal.mean() / cycle.mean():.2f} times",
        bool(horizontal.mean() >= 2 * cycle.mean()),
    )


def _small_detects(rows: pd.DataFrame) -> Claim | None:
    ks = sorted(by_k(rows)["k"].unique())
    if len(ks) < 2:
        return None
    small, large = (values_of(rows, "bottleneck", f"K = {k}") for k in (ks[0], ks[-1]))
    return Claim(
        "A smaller K detects better",
        f"K = {ks[0]}: {mean_sd(small)}, K = {ks[-1]}: {mean_sd(large)}",
        _apart(large, small),
    )


def _small_costs(rows: pd.DataFrame) -> Claim | None:
    ks = sorted(by_k(rows)["k"].unique())
    if len(ks) < 2:
        return None
    small, large = (values_of(rows, "bottleneck", f"K = {k}", "bits_per_dim") for k in (ks[0], ks[-1]))
    return Claim(
        "A smaller K has the worse likelihood: more bits per dimension",
        f"K = {ks[0]}: {mean_sd(small)}, K = {ks[-1]}: {mean_sd(large)}",
        _apart(large, small),
    )


def _multi_scale(rows: pd.DataFrame) -> Claim | None:
    some = beside(rows, "multi_scale", MULTI_SCALE)
    means = some.groupby("detector")["auroc"].mean()
    pairs = [(name, means.get(name, np.nan), means.get(with_bottleneck(name), np.nan)) for name in MULTI_SCALE]
    if np.isnan([values for _, *values in pairs]).any():
        return None
    return Claim(
        "Bottlenecks help multi-scale flows, too: a higher AUROC than with their usual networks, at equal time",
        ", ".join(f"{name} {usual:.3f} to {squeezed:.3f}" for name, usual, squeezed in pairs),
        all(usual < squeezed for _, usual, squeezed in pairs),
    )


def _likelihood(rows: pd.DataFrame) -> Claim | None:
    runs = pixel_runs(rows)
    if len(runs) < 3:
        return None
    found = spearmanr(runs["bits_per_dim"], runs["auroc"], alternative="greater")
    return Claim(
        "Better likelihood, worse detection: bits per dimension and AUROC rise together (Spearman, p below 0.05)",
        f"rank correlation {found.statistic:+.2f} over {len(runs)} runs, p = {found.pvalue:.2g}",
        bool(found.pvalue < 0.05),
    )


def _embedding(rows: pd.DataFrame) -> Claim | None:
    ours, runs = values_of(rows, "embedding", EMBEDDING), pixel_runs(rows)
    if ours.empty or runs.empty:
        return None
    means = runs.groupby(["part", "detector"])["auroc"].mean()
    part, best = means.index[int(means.argmax())]
    pixels = values_of(rows, part, best)
    return Claim(
        "A flow on pretrained features detects better than any on pixels",
        f"{mean_sd(ours)} against {mean_sd(pixels)} ({best}; {TITLES[part].lower()})",
        _apart(pixels, ours),
    )


def _one_class(rows: pd.DataFrame) -> Claim | None:
    names = (CHECKERBOARD, CYCLE_BOTTLENECK, EMBEDDING)
    values = [values_of(rows, "one_class", name).mean() for name in names]
    if any(np.isnan(value) for value in values):
        return None
    return Claim(
        f"One class, mean AUROC over the tasks: {' < '.join(names)}",
        ", ".join(f"{value:.3f}" for value in values),
        values[0] < values[1] < values[2],
    )


_CLAIMS: Sequence[Callable[[pd.DataFrame], Claim | None]] = (
    *(_order, _best_bottleneck, _coadaptation, _plain),
    *(_small_detects, _small_costs, _multi_scale, _likelihood, _embedding, _one_class),
)


def claims(rows: pd.DataFrame) -> list[Claim]:
    """Compare the claims for which there are rows with what was measured.

    Args:
        rows: Rows without failures.
    """
    return [claim for check in _CLAIMS if (claim := check(rows)) is not None]
