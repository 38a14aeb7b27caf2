# SPDX-License-Identifier: Apache-2.0
"""From 8-bit pixels to the unbounded space in which couplings work, and the likelihood's units."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor
from torch.nn import functional

LEVELS = 256
"""Grey levels of an 8-bit image."""

_MARGIN = 0.05
"""The logit sees values in [0.05, 0.95] (Dinh et al. 2017, section 4.1, with alpha = 0.05)."""


class Logit(InvertibleModule):
    """Maps the open unit cube to the whole space: ``y = logit((2x - 1) * 0.9 / 2 + 0.5)``.

    Source: Dinh et al. (2017), section 4.1. The log-determinant is counted, so that densities refer to the unit cube.

    Args:
        dims_in: One shape of any rank.
        dims_c: FrEIA's convention; none are supported.
    """

    def __init__(self, dims_in: Iterable[tuple[int, ...]], dims_c: Iterable[tuple[int, ...]] | None = None) -> None:
        super().__init__(dims_in, dims_c)

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shape of the output, which is that of the input."""
        return input_dims

    def forward(
        self,
        x_or_z: Iterable[Tensor],
        c: Iterable[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor], Tensor]:
        """Apply the logit; see :class:`FrEIA.modules.InvertibleModule` for the convention."""
        del c, jac
        (x,) = x_or_z
        squeeze = 1 - 2 * _MARGIN
        if rev:
            y = (torch.sigmoid(x) - _MARGIN) / squeeze
            return (y,), -self._log_det(x, squeeze)
        inner = _MARGIN + squeeze * x
        y = torch.log(inner) - torch.log1p(-inner)
        return (y,), self._log_det(y, squeeze)

    @staticmethod
    def _log_det(y: Tensor, squeeze: float) -> Tensor:
        # d logit(p) / dp = 1 / (p (1 - p)), and -log(p (1 - p)) = softplus(y) + softplus(-y).
        return (functional.softplus(y) + functional.softplus(-y) + math.log(squeeze)).flatten(1).sum(1)


def dequantize(images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Spread 8-bit images over the unit cube: ``(x_int + u) / 256`` (Theis et al. 2016, section 3.1).

    Args:
        images: Images in [0, 1], ``(N, C, H, W)``; rounded to 8 bits first.
        noise: ``u`` in [0, 1), of the same shape. Without it ``u = 1/2``, which makes a score deterministic.

    Returns:
        Values in (0, 1), of the same shape.
    """
    levels = torch.round(images * (LEVELS - 1)).clamp(0, LEVELS - 1)
    return (levels + (0.5 if noise is None else noise)) / LEVELS


def bits_per_dim(log_prob: Tensor, dims: int, levels: int = LEVELS) -> Tensor:
    """Convert a log-density to bits per dimension, as the literature reports it.

    Args:
        log_prob: Log-density in nats with respect to the unit cube, ``(N,)``.
        dims: Number of dimensions, ``C * H * W``.
        levels: Quantisation levels per dimension; 256 for 8-bit pixels, 1 for values that were never quantised.

    Returns:
        ``-log2 p / dims + log2 levels``, ``(N,)``.
    """
    return -log_prob / (dims * math.log(2)) + math.log2(levels)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Log-density of the standard normal, summed over all but the first dimension.

    Args:
        z: Latents, ``(N, ...)``.

    Returns:
        Nats, ``(N,)``.
    """
    z = z.flatten(1)
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))
