# SPDX-License-Identifier: Apache-2.0
"""Descriptors of the positions of a feature map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_flowood.flows import draw, full_precision

_FIT_POSITIONS = 60_000
"""The most positions whose descriptors a fit looks at; more only take longer."""

_CHUNK = 64
"""Images whose maps are described at a time."""


class Descriptors(nn.Module):
    """Describes every position of one layer's maps by 2 C numbers.

    They are its feature vector, of C channels, and the mean of the L2-normalised vectors in the 3 × 3 positions around
    it (Roth et al. 2022, "Towards total recall in industrial anomaly detection", section 3.1, pool likewise). The two
    halves are scaled to a total variance of 1 each.

    Args:
        channels: C, the channels of the maps.
        layer: The layer's name, for errors.
    """

    scale: Tensor
    """The factor of each number, ``(2 C,)``; 1 before a fit."""

    def __init__(self, channels: int, layer: str) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("scale", torch.ones(2 * channels))

    @full_precision
    def fit(self, maps: Tensor) -> Tensor:
        """Scale both halves to a total variance of 1 over positions and images.

        Args:
            maps: The maps of all training images, ``(N, C, h, w)``; in main memory, if they are many.

        Returns:
            The scaled descriptors of the sampled positions, ``(n, 2 C)``, float64, in main memory.

        Raises:
            ValueError: If one of the halves does not vary, or a value is NaN or infinite.
        """
        drawn = self._draw(maps)
        half = len(self.scale) // 2
        squares = torch.stack([torch.linalg.vector_norm(part).square() for part in drawn.split(half, dim=1)])
        if not bool(torch.isfinite(squares).all()):
            msg = f"The maps of layer {self.layer} hold NaN or infinite values: are the backbone's weights whole?"
            raise ValueError(msg)
        totals = squares / len(drawn) - drawn.mean(0).square().reshape(2, half).sum(1)
        if totals.min() <= 1e-10:
            what = "features" if totals[0] <= 1e-10 else "directions of the features"
            msg = f"The {what} of layer {self.layer} do not vary: are the training images all the same, or constant?"
            raise ValueError(msg)
        scale = totals.rsqrt().repeat_interleave(half)
        self.scale.copy_(scale)
        return drawn.mul_(scale)

    @full_precision
    def forward(self, maps: Tensor) -> Tensor:
        """Describe maps.

        Args:
            maps: ``(N, C, h, w)``. They may lie on another device than the module, and have another precision.

        Returns:
            Scaled descriptors, ``(N, 2 C, h, w)``, on the module's device and in its precision.
        """
        return self.unscaled(maps) * self.scale[:, None, None]

    @full_precision
    def unscaled(self, maps: Tensor) -> Tensor:
        """Describe maps as :meth:`forward` does, without scaling, which the next step may do at no cost."""
        return _describe(maps.to(self.scale))

    def _draw(self, maps: Tensor) -> Tensor:
        """Sample descriptors, before scaling: at most ``(_FIT_POSITIONS, 2 C)``, float64, in main memory."""
        n, _, height, width = maps.shape
        positions = height * width
        drawn = draw(n * positions, _FIT_POSITIONS)
        found = torch.empty(len(drawn), len(self.scale), dtype=torch.float64)
        filled = 0
        for start, chunk in zip(range(0, n, _CHUNK), maps.split(_CHUNK), strict=True):
            inside = drawn[(drawn >= start * positions) & (drawn < (start + len(chunk)) * positions)]
            described = _describe(chunk.to(self.scale)).permute(0, 2, 3, 1).flatten(0, 2)
            found[filled : filled + len(inside)] = described[inside - start * positions].cpu()
            filled += len(inside)
        return found


def _describe(maps: Tensor) -> Tensor:
    """Return every position's descriptor, before scaling: ``(N, C, h, w)`` to ``(N, 2 C, h, w)``."""
    # functional.normalize() to the bit, without its expansion, in which an OpenVINO model would leave single precision.
    directions = maps / torch.linalg.vector_norm(maps, dim=1, keepdim=True).clamp_min(1e-12)
    return torch.cat([maps, functional.avg_pool2d(directions, 3, 1, 1, count_include_pad=False)], dim=1)
