# SPDX-License-Identifier: Apache-2.0
"""Scores that compare several flows, which train beside the detector's."""

from __future__ import annotations

import math

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from .score import FlowDensity, Inputs, Score


def perturb(x: Tensor, rate: float) -> Tensor:
    """Replace pixels by uniform noise, each with the same probability; all channels of a pixel together.

    Args:
        x: Dequantised images in the unit cube, ``(N, C, H, W)``.
        rate: The probability.

    Returns:
        Images of the same shape.
    """
    chosen = torch.rand_like(x[:, :1]) < rate
    return torch.where(chosen, torch.rand_like(x), x)


class LikelihoodRatio(Score):
    """log p of a background flow minus log p of the detector's, per dimension, nats.

    The background flow is another one of the same architecture, trained at the same time on the same images with a
    tenth of their pixels replaced by noise. It learns what all images have in common rather than what they show, which
    cancels in the ratio. Source: Ren, Liu, Fertig, Snoek, Poplin, DePristo, Dillon and Lakshminarayanan 2019
    (arXiv 1906.02845), equation 5 and section 3; mutation rates from 0.1 to 0.3 there.
    """

    name = "likelihood_ratio"
    pixels_only = True
    rate = 0.1
    """Probability that a pixel is replaced."""

    def __init__(self, density: FlowDensity) -> None:
        super().__init__(density)
        self.background = density.new_flow()

    @property
    def flows(self) -> list[InvertibleModule]:
        """The background flow."""
        return [self.background]

    def training_loss(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Mean −log p of perturbed images per dimension under the background flow."""
        noisy = (perturb(inputs[0], self.rate),)
        return -density.density(noisy, self.background).log_prob.mean() / density.dims

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Log p per dimension under the background flow and the detector's, ``(N, 2)``."""
        both = [density.density(inputs, flow).log_prob for flow in (self.background, None)]
        return torch.stack(both, dim=1) / density.dims

    def combine(self, statistics: Tensor) -> Tensor:
        """The log-ratio per dimension, ``(N,)``; +∞ where one of the flows overflowed."""
        ratio = statistics[:, 0] - statistics[:, 1]
        return torch.where(ratio == -math.inf, torch.full_like(ratio, math.inf), ratio)


class Ensemble(Score):
    """−WAIC per dimension: the variance of log p over several flows minus its mean, nats.

    Where flows that were trained alike disagree, none of them knows. The detector's flow and four more of the same
    architecture start from different weights, see the same batches and train at the same time. Source: Choi, Jang and
    Alemi 2018 (arXiv 1810.01392), equation 1: WAIC = E[log p] − Var[log p], over 5 models.
    """

    name = "ensemble"
    size = 5
    """Number of flows, the detector's included."""

    def __init__(self, density: FlowDensity) -> None:
        super().__init__(density)
        self.members = nn.ModuleList(density.new_flow() for _ in range(self.size - 1))

    @property
    def flows(self) -> list[InvertibleModule]:
        """All but the detector's own."""
        return list(self.members)

    def training_loss(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Mean −log p per dimension, summed over the flows."""
        losses = [-density.density(inputs, flow).log_prob.mean() / density.dims for flow in self.members]
        return torch.stack(losses).sum()

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """−WAIC per dimension, ``(N, 1)``."""
        log_prob = torch.stack([density.density(inputs, flow).log_prob for flow in (None, *self.members)])
        return (log_prob.var(0, correction=0) - log_prob.mean(0))[:, None] / density.dims
