# SPDX-License-Identifier: Apache-2.0
"""Coupling masks: which values feed the s,t-network of a coupling layer, and which ones the layer changes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_flowood.names import unknown_name

MASKS = ("checkerboard", "channel", "horizontal", "cycle")


class CouplingMask(NamedTuple):
    """The two sides of a coupling layer.

    Attributes:
        feed: Boolean tensor of the input's shape; ``True`` where a value feeds the s,t-network.
        change: Boolean tensor of the same shape; ``True`` where the layer transforms the value. Never overlaps
            ``feed``. With the cycle mask, half of the values are in neither.
    """

    feed: Tensor
    change: Tensor


class Quadrant(NamedTuple):
    """Rows and columns of one quadrant of an image."""

    rows: slice
    columns: slice


def quadrants(height: int, width: int) -> tuple[Quadrant, ...]:
    """Split an image into four quadrants, clockwise from the top left.

    Odd sizes give the larger part to the bottom and the right.

    Args:
        height: Image height in pixels, at least 2.
        width: Image width in pixels, at least 2.

    Returns:
        Top left, top right, bottom right, bottom left.
    """
    top, bottom = slice(0, height // 2), slice(height // 2, height)
    left, right = slice(0, width // 2), slice(width // 2, width)
    return Quadrant(top, left), Quadrant(top, right), Quadrant(bottom, right), Quadrant(bottom, left)


def coupling_mask(name: str, shape: tuple[int, ...], layer: int) -> CouplingMask:
    """Build the mask of one coupling layer in a stack.

    ``checkerboard``, ``channel`` and ``horizontal`` split the values in two halves that swap their roles from
    layer to layer (Dinh et al. 2017, section 3.4; Kirichenko et al. 2020, section 5). ``cycle`` feeds quadrant
    ``layer % 4`` to the network and changes the next one clockwise, so that four layers pass before a quadrant's
    information returns to it (Kirichenko et al. 2020, section 6.1 and appendix).

    Args:
        name: One of :data:`MASKS`.
        shape: ``(C, H, W)`` of the image; for ``channel``, ``(D,)`` of a vector also works.
        layer: Index of the layer in its stack.

    Returns:
        The mask; boolean tensors of shape ``shape``.

    Raises:
        ValueError: If the name is unknown, or the shape leaves one side of the mask empty.
    """
    if name not in MASKS:
        raise unknown_name("mask", name, MASKS)
    if name != "channel" and len(shape) != 3:
        msg = f"Mask {name!r} is defined on images (C, H, W), not on the shape {shape}."
        raise ValueError(msg)

    if name == "cycle":
        _refuse_empty(name, shape, min(shape[1:]) < 2, "a height and a width of at least 2")
        parts = quadrants(shape[1], shape[2])
        feed, change = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
        for mask, quadrant in ((feed, parts[layer % 4]), (change, parts[(layer + 1) % 4])):
            mask[:, quadrant.rows, quadrant.columns] = True
        return CouplingMask(feed, change)

    if name == "checkerboard":
        _refuse_empty(name, shape, shape[1] * shape[2] < 2, "at least 2 pixels")
        rows, columns = torch.meshgrid(torch.arange(shape[1]), torch.arange(shape[2]), indexing="ij")
        half = ((rows + columns) % 2 == 0).expand(shape)
    elif name == "channel":
        _refuse_empty(name, shape, shape[0] < 2, "at least 2 channels; squeeze the image first")
        half = (torch.arange(shape[0]) < shape[0] // 2).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    else:
        _refuse_empty(name, shape, shape[1] < 2, "a height of at least 2")
        half = (torch.arange(shape[1]) < shape[1] // 2)[:, None].expand(shape)
    feed = half.clone() if layer % 2 == 0 else ~half
    return CouplingMask(feed, ~feed)


def _refuse_empty(name: str, shape: tuple[int, ...], empty: bool, need: str) -> None:
    if empty:
        msg = f"Mask {name!r} leaves nothing to change on the shape {shape}: it needs {need}."
        raise ValueError(msg)
