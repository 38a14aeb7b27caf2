# SPDX-License-Identifier: Apache-2.0
"""One score from several kinds of evidence."""

from __future__ import annotations

import torch
from torch import Tensor

from anomalib_flowood.flows import ForEachKind

_PRIOR_IMAGES = 4
"""Images that the common spread counts as much as: from few images each kind's own is a guess."""


class Evidence(ForEachKind):
    """The mean of several statistics of an image, each in units of its standard deviation over normal images.

    Each statistic is higher for what is more anomalous, and sees other things: what one image shows in all of them adds
    up, what is far out in a single one still counts by how far. The normal images are to be such that nothing else was
    fitted to, otherwise their statistics are too small, and more so those that were fitted with more numbers.

    From n images a standard deviation is uncertain by 1 / sqrt(2 n) of itself. It is a mean, therefore, of the
    statistic's own and of a common one, relative to what is normal, that counts as much as 4 images. A statistic whose
    mean is less than its spread, so that it has no size to compare, has no part in that.

    Args:
        kinds: E, the number of statistics.
    """

    of_kind = ("location", "spread")

    location: Tensor
    """Mean of each statistic over normal images, ``(E,)``; a buffer, as the other."""
    spread: Tensor
    """Their standard deviations, ``(E,)``."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.shaped_by_fit = {"location": 1, "spread": 1}
        self.register_buffer("location", torch.zeros(kinds))
        self.register_buffer("spread", torch.ones(kinds))

    def fit(self, statistics: Tensor) -> None:
        """Set locations and spreads from the statistics of normal images, ``(n, E)``.

        Raises:
            ValueError: If there are fewer than two images, or a statistic is NaN or infinite.
        """
        n = len(statistics)
        if n < 2:
            msg = f"The spread of a score needs at least 2 normal images, got {n}."
            raise ValueError(msg)
        if not bool(torch.isfinite(statistics).all()):
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

    def forget(self) -> None:
        """Leave statistics as they are."""
        kinds = self.location.shape[-1]
        self.location, self.spread = self.location.new_zeros(kinds), self.spread.new_ones(kinds)

    def forward(self, statistics: Tensor, kind: Tensor | None = None) -> Tensor:
        """Combine the statistics of images, ``(N, E)``, to ``(N,)``: 0 is the mean of normal images, of their kind."""
        return self._standardised(statistics, kind).mean(1)

    def parts(self, statistics: Tensor, kind: Tensor | None = None) -> Tensor:
        """What each statistic, ``(N, E)``, adds to the combination: ``(N, E)``, which sum to it."""
        return self._standardised(statistics, kind) / statistics.shape[1]

    def _standardised(self, statistics: Tensor, kind: Tensor | None) -> Tensor:
        location, spread = ((part if kind is None else part[kind]) for part in (self.location, self.spread))
        return (statistics - location) / spread
