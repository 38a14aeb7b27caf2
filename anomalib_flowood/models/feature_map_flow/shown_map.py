# SPDX-License-Identifier: Apache-2.0
"""The anomaly map that is shown, from those of several layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_flowood import flows


class ShownMap(nn.Module):
    """The mean of maps of several sizes, up-sampled to the image's (bicubic, which blurs less than bilinear).

    Finer maps say better where: each map's weight is in proportion to its rows, and to its share. Up-sampling is linear
    along both axes, so that it is one product with a matrix for each, ten times as fast on a CPU as interpolation.

    Args:
        sizes: Height and width of each map.
        shares: What each counts for beside others of its size.
        image_size: Height and width of the image.
    """

    rows: Tensor
    """Turns columns of all maps, one below the other, to those of the image, ``(H, sum of h)``; a buffer.

    It is not saved, nor are those for the columns: they follow from the sizes."""

    def __init__(self, sizes: Sequence[tuple[int, int]], shares: Sequence[float], image_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = image_size
        weights = [h * share for (h, _), share in zip(sizes, shares, strict=True)]
        self.weights = [weight / sum(weights) for weight in weights]
        self.register_buffer("rows", torch.cat([_bicubic(h, height) for h, _ in sizes], dim=1), persistent=False)
        for place, (_, w) in enumerate(sizes):
            self.register_buffer(f"columns{place}", _bicubic(w, width).T.contiguous(), persistent=False)

    @flows.full_precision
    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Average maps, one ``(N, h, w)`` for each size: ``(N, 1, H, W)``."""
        wide = [
            part * weight @ self.get_buffer(f"columns{place}")
            for place, (part, weight) in enumerate(zip(maps, self.weights, strict=True))
        ]
        return (self.rows @ torch.cat(wide, dim=1))[:, None]


def _bicubic(length: int, target: int) -> Tensor:
    """Return the matrix that up-samples one axis, ``(target, length)``: what becomes of each unit vector."""
    unit = torch.eye(length)[None, None]
    return functional.interpolate(unit, (target, length), mode="bicubic", align_corners=False)[0, 0]
