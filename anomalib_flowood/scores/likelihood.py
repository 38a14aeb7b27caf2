# SPDX-License-Identifier: Apache-2.0
"""Scores that one evaluation of the flow gives."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .score import FlowDensity, Inputs, Score


class NegativeLogLikelihood(Score):
    """−log p per dimension, nats: what is unlikely is anomalous (Bishop 1994, IEE Proceedings 141, section 2)."""

    name = "nll"

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """−log p per dimension, ``(N, 1)``."""
        return -density.density(inputs).log_prob[:, None] / density.dims


class _FromMean(Score):
    """Distance of a statistic from its mean over training images: two-sided."""

    fit_images = 10_000

    mean: Tensor

    def __init__(self, density: FlowDensity) -> None:
        super().__init__(density)
        self.register_buffer("mean", torch.zeros(()))

    def fit_statistics(self, statistics: Tensor) -> None:
        """Learn the mean."""
        self.mean.copy_(statistics.mean())

    def combine(self, statistics: Tensor) -> Tensor:
        """Distances from the mean, ``(N,)``."""
        return (statistics[:, 0] - self.mean).abs()


class Typicality(_FromMean):
    """How far −log p per dimension is from its mean over training images, nats.

    The mean estimates the entropy; a typical image is as likely as that, neither less nor more. Source: Nalisnick,
    Matsukawa, Teh and Lakshminarayanan 2019 (arXiv 1906.02994), section 4, for batches of one image.
    """

    name: ClassVar[str] = "typicality"

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """−log p per dimension, ``(N, 1)``."""
        return -density.density(inputs).log_prob[:, None] / density.dims


class LatentNorm(_FromMean):
    """How far the latents are from the shell on which those of training images lie.

    Latents of dimension d that are standard normal lie near a sphere of radius √d (Nalisnick et al. 2019, section 3;
    Choi, Jang and Alemi 2018, arXiv 1810.01392, appendix). A trained flow's come near it only, so that the radius is
    their mean over training images. Where the base distribution is a mixture, distances are from its nearest mean.
    """

    name: ClassVar[str] = "latent_norm"

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Distances from the base's mean, ``(N, 1)``."""
        return density.density(inputs).radius[:, None]
