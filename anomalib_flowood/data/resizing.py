# SPDX-License-Identifier: Apache-2.0
"""Large images of bytes are resized in strips: as floats, four times as large, they would not be whole in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import InterpolationMode, Resize

from anomalib_flowood.data.items import in_unit_range

_STRIP = 2**20
"""Numbers of a strip: 4 MiB of floats."""


def is_antialiased(transform: object) -> bool:
    """Whether a transform resizes to a height and a width, as detectors do: bilinear, antialiased."""
    return (
        isinstance(transform, Resize)
        and transform.antialias is True
        and len(transform.size) == 2
        # A string or a member, depending on torchvision's version.
        and InterpolationMode(transform.interpolation) == InterpolationMode.BILINEAR
    )


def resize_bytes(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images of bytes, antialiased, as torchvision's ``Resize`` does when they are floats, to the last bit.

    It resizes rows first, then columns; here rows are resized some at a time.

    Args:
        images: ``(N, C, H, W)``, ``uint8``.
        size: Height and width.

    Returns:
        Floats in [0, 1], ``(N, C, *size)``.
    """
    rows = max(1, _STRIP // (images.shape[-1] * images.shape[:-2].numel()))
    # Written to what is there already: strips that stayed would break the heap up.
    narrow = torch.empty(*images.shape[:-1], size[1])
    for strip, done in zip(images.split(rows, dim=-2), narrow.split(rows, dim=-2), strict=True):
        done.copy_(_resized(in_unit_range(strip), (strip.shape[-2], size[1])))
    return _resized(narrow, size)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == size:
        return images
    return functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
