# SPDX-License-Identifier: Apache-2.0
"""A density over several statistics of a fitted flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anomalib_flowood.flows import bits_per_dim

from .complexity import compressed_bits_per_dim
from .orientation import ways_up
from .score import FlowDensity, Inputs, Score

_POINTS = 1000
"""Kernels of a statistic's density, at its quantiles over the training images."""


class DensityOfStates(Score):
    """−log density of several statistics of an image, nats: whatever is unusual about them is anomalous.

    For embeddings the statistics are the terms whose sum is −log p: the latents' share, the log-determinant, the rest
    outside of the subspace. For pixels they are the flow's bits under a robust base, its bits beyond a compressor's,
    and whether the image is the wrong way up (:class:`Orientation`, :class:`Complexity`). These have a good side:
    values below the median of the training images count as the median. Source: Morningstar, Ham, Gallagher,
    Lakshminarayanan, Alemi and Dillon 2021 (arXiv 2006.09273), section 3, with kernel densities; bandwidths by Scott's
    rule (1992).
    """

    name = "density_of_states"
    fit_images = 10_000

    floor: Tensor
    points: Tensor
    bandwidth: Tensor

    def __init__(self, density: FlowDensity) -> None:
        super().__init__(density)
        self.has_good_side = density.reads_pixels
        count = 3 if density.reads_pixels else density.parts
        self.register_buffer("floor", torch.full((count,), -math.inf))
        self.register_buffer("points", torch.zeros(count, _POINTS))
        self.register_buffer("bandwidth", torch.ones(count))

    @classmethod
    def exportable(cls, density: FlowDensity) -> bool:
        """Unless a compressor is needed for the statistics."""
        return not density.reads_pixels

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Terms of −log p per dimension, nats; for pixels bits per dimension; ``(N, S)``."""
        found = density.density(inputs)
        if not density.reads_pixels:
            return found.parts / density.dims
        robust, wrong_way = ways_up(density, inputs[0])
        beyond = bits_per_dim(found.log_prob, density.dims) - compressed_bits_per_dim(density, inputs)
        return torch.stack([robust, beyond, wrong_way], dim=1)

    def fit_statistics(self, statistics: Tensor) -> None:
        """Place the kernels."""
        if self.has_good_side:
            self.floor.copy_(statistics.median(0).values)
        statistics = self._raised(statistics)
        places = (torch.arange(_POINTS, dtype=statistics.dtype, device=statistics.device) + 0.5) / _POINTS
        # A statistic that is the same for all images differs by rounding alone, which must not count.
        std = torch.maximum(statistics.std(0), 1e-4 * statistics.mean(0).abs()).clamp(min=1e-12)
        self.points.copy_(statistics.quantile(places, dim=0).T)
        self.bandwidth.copy_(std * len(statistics) ** -0.2)

    def _raised(self, statistics: Tensor) -> Tensor:
        """Raise statistics on the good side to the median."""
        if not self.has_good_side:
            return statistics
        return statistics.clamp(min=self.floor.to(statistics.device).to(statistics.dtype))

    def combine(self, statistics: Tensor) -> Tensor:
        """−log of the product of the statistics' densities, nats, ``(N,)``."""
        distances = (self._raised(statistics)[:, :, None] - self.points) / self.bandwidth[:, None]
        log_kernels = torch.logsumexp(-0.5 * distances.square(), dim=2) - math.log(_POINTS)
        return (0.5 * math.log(2 * math.pi) + self.bandwidth.log() - log_kernels).sum(1)
