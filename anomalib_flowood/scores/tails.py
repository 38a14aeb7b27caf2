# SPDX-License-Identifier: Apache-2.0
"""The smallest p-value of several tests."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .score import FlowDensity, Score

_TAIL = 0.05
"""Share of the training images from which a test's tail is estimated."""


class SmallestPValue(Score):
    """−log of the smallest p-value of several one-sided tests, nats: one of them is enough.

    The smallest of several p-values counts (Tippett 1931), each divided by the weight of its test (Genovese, Roeder
    and Wasserman 2006, Biometrika 93): a test of a tenth of the weight needs ten times the evidence, and costs the
    others next to nothing where it finds nothing. A statistic's tail beyond the 95 % quantile of the training images
    is taken to be exponential. Below, the same straight line serves for the order.

    A subclass has the weights, and :meth:`statistics`: one for each test, higher for what is more anomalous.
    """

    fit_images = 10_000
    weights: ClassVar[tuple[float, ...]]

    threshold: Tensor
    scale: Tensor

    def __init__(self, density: FlowDensity) -> None:
        super().__init__(density)
        self.register_buffer("threshold", torch.zeros(len(self.weights)))
        self.register_buffer("scale", torch.ones(len(self.weights)))

    def fit_statistics(self, statistics: Tensor) -> None:
        """Learn where each tail begins, and its mean excess."""
        threshold = statistics.quantile(1 - _TAIL, dim=0)
        excess = (statistics - threshold).clamp(min=0)
        scale = excess.sum(0) / (excess > 0).sum(0).clamp(min=1)
        self.threshold.copy_(threshold)
        self.scale.copy_(torch.maximum(scale, 1e-6 * threshold.abs()).clamp(min=1e-12))

    def combine(self, statistics: Tensor) -> Tensor:
        """−log of the smallest p-value, nats, ``(N,)``."""
        tails = (statistics - self.threshold) / self.scale
        weights = torch.tensor(self.weights, dtype=tails.dtype, device=tails.device)
        return (tails + weights.log() - math.log(_TAIL)).amax(1)
