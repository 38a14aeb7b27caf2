# SPDX-License-Identifier: Apache-2.0
"""One score from several kinds of evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from anomalib_flowood.flows import ForEachKind

_PRIOR_IMAGES = 4
"""Images that the common spread counts as much as: from few images a statistic's own is a guess."""

LEAST_DAMAGED = 10
"""Fewest damaged images by which statistics are weighted: with ten, an AUROC of 0.5 scatters by 0.13."""

_SURE = 0.98
"""Largest AUROC that is told from others: beyond it, single images decide, and the weight would grow without limit."""


class Evidence(ForEachKind):
    """The weighted mean of several statistics of an image, each by how far it lies above that of normal images.

    Each statistic is higher for what is more anomalous, and sees other things. With its mean m and standard deviation s
    over normal images, a statistic x counts as ``softplus((x - m) / s) - log 2``: 0 at the mean, and close to its
    distance from the mean, in standard deviations, where it is far above. Moderate evidence in several statistics adds
    up, strong evidence in a single one counts in full, and a statistic that is lower than usual makes up for little of
    it: it takes ``log 2`` off at most. Nothing else may have been fitted to these normal images: their statistics would
    be too small, most of all those with the most fitted numbers.

    What a statistic is worth depends on the images: where each shows another layout, one that knows what belongs where
    sees nothing. So there may be damaged images, too, which should be told from normal ones. A statistic's weight is
    multiplied by its separation d' of the two, by which independent Gaussian statistics of equal variance are to be
    weighted (Green and Swets 1966, "Signal Detection Theory and Psychophysics", chapter 9)::

        d' = sqrt(2) Phi^-1(A)

    where A is its AUROC, between 0.5 and 0.98, and Phi^-1 the standard normal quantile function.

    A standard deviation from n images has a relative error of 1 / sqrt(2 n). It is therefore averaged, relative to the
    mean, with a common one of all statistics that counts as much as 4 images. A statistic whose spread exceeds its mean
    has no scale to be relative to, and is left out of that.

    Args:
        kinds: E, the number of statistics.
    """

    location: Tensor
    """Mean of each statistic over normal images, ``(E,)``; a buffer, as the others."""
    spread: Tensor
    """Their standard deviations, ``(E,)``."""
    shares: Tensor
    """Their weights, whose sum is 1, ``(E,)``."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.of_kind = {"location": 1, "spread": 1, "shares": 1}
        self.register_buffer("location", torch.zeros(kinds))
        self.register_buffer("spread", torch.ones(kinds))
        self.register_buffer("shares", torch.full((kinds,), 1 / kinds))

    def fit(self, statistics: Tensor, weights: Sequence[float], normal: Tensor | None = None) -> None:
        """Set locations, spreads and weights.

        Args:
            statistics: Of images, ``(n, E)``.
            weights: What each counts for, if all tell damaged images equally well.
            normal: Whether images are normal, ``(n,)``; the others are damaged. By default all are.

        Raises:
            ValueError: If there are fewer than two normal images, or a statistic is NaN or infinite.
        """
        damaged = statistics[:0] if normal is None else statistics[~normal]
        statistics = statistics if normal is None else statistics[normal]
        n = len(statistics)
        if n < 2:
            msg = f"The spread of a score needs at least 2 normal images, got {n}."
            raise ValueError(msg)
        if not bool(torch.isfinite(statistics).all() and torch.isfinite(damaged).all()):
            msg = "A statistic of a normal image is NaN or infinite: has the flow diverged? Lower learning_rate."
            raise ValueError(msg)
        statistics = statistics.cpu().double()
        location = statistics.mean(0)
        size = location.abs().clamp(min=1e-12)
        own = (statistics.std(0) / size).square()
        sized = own < 1
        common = torch.where(sized, own[sized].mean(), own)
        shrunk = ((n - 1) * own + _PRIOR_IMAGES * common) / (n - 1 + _PRIOR_IMAGES)
        self.location = location.to(self.location)
        self.spread = (size * shrunk.sqrt()).clamp(min=1e-6).to(self.spread)
        shares = torch.tensor(weights, dtype=torch.float64)
        if len(damaged) >= LEAST_DAMAGED:
            weighted = shares * separations(statistics, damaged.cpu().double())
            shares = weighted if weighted.any() else shares
        self.shares = (shares / shares.sum()).to(self.shares)

    def forget(self) -> None:
        """Leave statistics unscaled, all with the same weight."""
        kinds = self.location.shape[-1]
        self.location, self.spread = self.location.new_zeros(kinds), self.spread.new_ones(kinds)
        self.shares = self.shares.new_full((kinds,), 1 / kinds)

    def forward(self, statistics: Tensor, kind: Tensor | None = None) -> Tensor:
        """Combine the statistics of images, ``(N, E)``, to ``(N,)``: 0 where all are at the normal mean of the kind."""
        return self.parts(statistics, kind).sum(1)

    def parts(self, statistics: Tensor, kind: Tensor | None = None) -> Tensor:
        """What each statistic, ``(N, E)``, adds to the combination: ``(N, E)``, which sum to it."""
        shares = self.shares if kind is None else self.shares[kind]
        return shares * (functional.softplus(self.standardised(statistics, kind)) - math.log(2))

    def standardised(self, statistics: Tensor, kind: Tensor | None = None) -> Tensor:
        """Bring statistics, ``(N, E)``, to standard deviations from the mean of normal images, of their kind."""
        location, spread = ((part if kind is None else part[kind]) for part in (self.location, self.spread))
        return (statistics - location) / spread


def separations(normal: Tensor, damaged: Tensor) -> Tensor:
    """How well each statistic tells damaged images from normal ones: d' of :class:`Evidence`.

    Args:
        normal: Statistics of normal images, ``(n, E)``.
        damaged: Of damaged images, ``(m, E)``.

    Returns:
        ``(E,)``, from 0, which is not at all.
    """
    difference = damaged[:, None] - normal
    auroc = (0.5 + 0.5 * difference.sign()).mean((0, 1))  # the share of pairs in order, of which ties are half
    return math.sqrt(2) * torch.special.ndtri(auroc.clamp(0.5, _SURE))
