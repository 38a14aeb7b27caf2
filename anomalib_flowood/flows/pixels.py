# SPDX-License-Identifier: Apache-2.0
"""From 8-bit pixels to the space in which couplings work, and from nats to bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .layers import Layer

LEVELS = 256
"""Grey levels of an 8-bit image."""

LOGIT_ALPHA = 0.25
"""Margin of the logit at both ends of the unit interval. The smaller it is, the steeper the logit is at black and
white: with 0.05 (Dinh et al. 2017, section 4.1) a grey level at black is stretched 5.3 times as much as one in the
middle, with 0.25 1.3 times. A flow detects better by −log p behind a flatter logit: see benchmarks/paper."""

NOISE_DRAWS = 4
"""Draws of dequantisation noise over which bits per dimension are averaged."""


class Logit(Layer):
    """Stretch the unit interval towards black and white: ``y = logit(alpha + (1 - 2 alpha) x)``.

    Source: Dinh et al. (2017), section 4.1. The log-determinant is included, so that densities refer to the unit cube.
    The image of the cube lies between logit(alpha) and logit(1 - alpha), but nothing keeps a flow within these bounds:
    some of its mass lies beyond black and white, as far as ``-alpha / (1 - 2 alpha)`` and
    ``(1 - alpha) / (1 - 2 alpha)`` (-0.5 and 1.5 for 0.25), where there are no images, and is lost to the likelihood.

    Args:
        dims_in: One shape of any rank.
        dims_c: FrEIA's convention; none are supported.
        alpha: Margin at both ends of the unit interval, above 0 and below 1/2.

    Raises:
        ValueError: If alpha is out of range, there is more than one input, or there is a condition.
    """

    alpha: Tensor

    def __init__(
        self,
        dims_in: Iterable[tuple[int, ...]],
        dims_c: Iterable[tuple[int, ...]] | None = None,
        alpha: float = LOGIT_ALPHA,
    ) -> None:
        super().__init__(dims_in, dims_c)
        if not 0 < alpha < 0.5:
            msg = f"logit_alpha must be above 0 and below 0.5, got {alpha}."
            raise ValueError(msg)
        # With another alpha the same weights give another density, so checkpoints hold it.
        self.register_buffer("alpha", torch.tensor(alpha))

    def transform(self, x: Tensor, rev: bool) -> tuple[Tensor, Tensor]:
        """Apply the logit to ``x``, or undo it."""
        squeeze = 1 - 2 * self.alpha
        if rev:
            return (torch.sigmoid(x) - self.alpha) / squeeze, -self._log_det(x, squeeze)
        inner = self.alpha + squeeze * x
        y = torch.log(inner) - torch.log1p(-inner)
        return y, self._log_det(y, squeeze)

    @staticmethod
    def _log_det(y: Tensor, squeeze: Tensor) -> Tensor:
        # d logit(p) / dp = 1 / (p (1 - p)), and -log(p (1 - p)) = softplus(y) + softplus(-y).
        return (functional.softplus(y) + functional.softplus(-y) + squeeze.log()).flatten(1).sum(1)


def dequantize(images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Spread 8-bit images over the unit cube: ``(x_int + u) / 256`` (Theis et al. 2016, section 3.1).

    Args:
        images: Images in [0, 1], ``(N, C, H, W)``; rounded to 8 bits first.
        noise: ``u`` in [0, 1), ``(N, C, H, W)``, or ``(C, H, W)`` for all images. By default ``u = 1/2``, which makes a
            score deterministic.

    Returns:
        Values in (0, 1), of the same shape.
    """
    levels = torch.round(images * (LEVELS - 1)).clamp(0, LEVELS - 1)
    return (levels + (0.5 if noise is None else noise)) / LEVELS


def dequantization_noise(shape: Sequence[int], draws: int = NOISE_DRAWS, seed: int = 0) -> Tensor:
    """Draw noise for :func:`dequantize`: the same for every image, so that no value depends on the batch.

    A Latin hypercube (McKay, Beckman and Conover 1979, Technometrics 21): every draw is uniform, and at every position
    each of n draws falls into another one of n equal parts of [0, 1]. With four draws their mean varied half as much
    from seed to seed as that of independent draws.

    Args:
        shape: Shape of an image, ``(C, H, W)``.
        draws: Number of draws.
        seed: Random seed.

    Returns:
        ``(draws, C, H, W)``, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    stratum = torch.rand(draws, *shape, generator=generator).argsort(dim=0)
    return (stratum + torch.rand(draws, *shape, generator=generator)) / draws


def bits_per_dim(log_prob: Tensor, dims: int, levels: int = LEVELS) -> Tensor:
    """Convert a log-density to bits per dimension.

    The literature reports the mean of this over uniform noise, an upper bound on the bits per dimension of the discrete
    model of 8-bit images that the density defines (Theis et al. 2016, section 3.1):
    −E_u[log2 p(x + u)] ≥ −log2 E_u[p(x + u)]. At the centres of the bins it is lower, since a flow can concentrate its
    density there.

    Args:
        log_prob: Log-density in nats with respect to the unit cube, ``(N,)``.
        dims: Number of dimensions, ``C * H * W``.
        levels: Quantisation levels per dimension; 256 for 8-bit pixels, 1 for values that were never quantised.

    Returns:
        ``-log2 p / dims + log2 levels``, ``(N,)``.
    """
    return -log_prob / (dims * math.log(2)) + math.log2(levels)
