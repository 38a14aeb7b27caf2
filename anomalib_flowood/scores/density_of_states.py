# SPDX-License-Identifier: Apache-2.0
"""A density over several statistics of a fitted flow."""

from __future__ import annotations

import math

import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from anomalib_flowood.flows import bits_per_dim

from .complexity import compressed_bits, pixels_of
from .orientation import ways_up
from .score import FlowDensity, Inputs, Score

_COMPONENTS = 16
"""Most Gaussians of the mixture."""

_IMAGES_PER_COMPONENT = 50
"""A Gaussian is to stand for a kind of images, and not for a few of them."""


class DensityOfStates(Score):
    """−log of a density over several statistics of an image, nats: whatever is unusual about them is anomalous.

    For embeddings the statistics are the terms whose sum is −log p: the latents' share, the log-determinant, the rest
    outside of the subspace. For pixels they are −log p, what remains of it beside a compressor's bits, and whether the
    image is the wrong way up (:class:`Complexity`, :class:`Orientation`). These have a good side: what is below the
    median of the training images counts as the median. A mixture of Gaussians is fitted to the statistics of training
    images. Source: Morningstar, Ham, Gallagher, Lakshminarayanan, Alemi and Dillon 2021 (arXiv 2006.09273), section 3;
    kernel densities of each statistic there, one joint density here, since how
    statistics go together tells more than each alone.
    """

    name = "density_of_states"
    fit_images = 10_000

    floor: Tensor
    mean: Tensor
    std: Tensor
    centres: Tensor
    precisions: Tensor
    log_weights: Tensor

    def __init__(self, density: FlowDensity) -> None:
        super().__init__(density)
        self.has_good_side = density.reads_pixels
        count = 3 if density.reads_pixels else density.parts
        self.register_buffer("floor", torch.full((count,), -math.inf))
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("std", torch.ones(count))
        self.register_buffer("centres", torch.zeros(_COMPONENTS, count))
        self.register_buffer("precisions", torch.eye(count).repeat(_COMPONENTS, 1, 1))  # Cholesky factors
        self.register_buffer("log_weights", torch.full((_COMPONENTS,), -math.inf))

    @classmethod
    def exportable(cls, density: FlowDensity) -> bool:
        """Unless a compressor is needed for the statistics."""
        return not density.reads_pixels

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Terms of −log p per dimension, nats; for pixels bits per dimension; ``(N, S)``."""
        log_prob, _, parts = density.density(inputs)
        if not density.reads_pixels:
            return parts / density.dims
        bits = bits_per_dim(log_prob, density.dims)
        compressed = compressed_bits(pixels_of(inputs)).to(bits) / density.dims
        return torch.stack([bits, bits - compressed, ways_up(density, inputs[0])[1]], dim=1)

    def fit_statistics(self, statistics: Tensor) -> None:
        """Fit the mixture."""
        if self.has_good_side:
            self.floor.copy_(statistics.median(0).values)
        statistics = self._raised(statistics)
        mean = statistics.mean(0)
        # A statistic that is the same for all images differs by its rounding, which is to say nothing.
        std = torch.maximum(statistics.std(0), 1e-4 * mean.abs()).clamp(min=1e-12)
        components = max(1, min(_COMPONENTS, len(statistics) // _IMAGES_PER_COMPONENT))
        mixture = GaussianMixture(components, reg_covar=1e-3, random_state=0)
        mixture.fit(((statistics - mean) / std).cpu().numpy())
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.log_weights.fill_(-math.inf)
        self.centres[:components] = torch.from_numpy(mixture.means_).to(self.centres)
        self.precisions[:components] = torch.from_numpy(mixture.precisions_cholesky_).to(self.precisions)
        self.log_weights[:components] = torch.from_numpy(mixture.weights_).log().to(self.log_weights)

    def _raised(self, statistics: Tensor) -> Tensor:
        """Statistics, those on the good side brought to the median."""
        return statistics.clamp(min=self.floor.to(statistics)) if self.has_good_side else statistics

    def combine(self, statistics: Tensor) -> Tensor:
        """−log density of the standardised statistics, nats, ``(N,)``."""
        standardised = (self._raised(statistics) - self.mean) / self.std
        whitened = torch.einsum("nks,kst->nkt", standardised[:, None] - self.centres, self.precisions)
        log_det = self.precisions.diagonal(dim1=1, dim2=2).log().sum(1)
        kernels = self.log_weights + log_det - 0.5 * whitened.square().sum(2)
        return 0.5 * statistics.shape[1] * math.log(2 * math.pi) - torch.logsumexp(kernels, dim=1)
