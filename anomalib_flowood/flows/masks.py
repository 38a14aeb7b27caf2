# SPDX-License-Identifier: Apache-2.0
"""Coupling masks: which values feed the s,t-network of a coupling layer, and which values the layer changes.

A mask is one function, registered by :func:`register_mask` under the name that users type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from anomalib_flowood.names import Registry

if TYPE_CHECKING:
    from .couplings import AffineCoupling


class CouplingMask(NamedTuple):
    """The two sides of a coupling layer.

    Attributes:
        feed: Boolean tensor of the input's shape; ``True`` where a value feeds the s,t-network.
        change: Boolean tensor of the same shape; ``True`` where the layer transforms the value. Never overlaps
            ``feed``. With the cycle mask, half of the values are in neither.
    """

    feed: Tensor
    change: Tensor


MaskFunction = Callable[[tuple[int, ...], int], CouplingMask]
"""Takes the shape of the input without the batch and the index of the layer in its stack; returns the mask."""


@dataclass
class MaskFamily:
    """The masks of a stack of couplings.

    Attributes:
        mask: Returns the mask of a layer.
        needs: What a shape needs for neither side of the mask to be empty; for the error message.
        channels: Fewest channels; a flow on images squeezes those with fewer.
        vectors: Whether it is defined on vectors ``(D,)`` as well as on images ``(C, H, W)``.
        native: The coupling of its native form, if it has one; see :func:`~anomalib_flowood.flows.native_form`.
    """

    mask: MaskFunction
    needs: str
    channels: int
    vectors: bool
    native: type[AffineCoupling] | None = None


MASKS: Registry[MaskFamily] = Registry("mask")
"""Mask families by the names that users type."""


def register_mask(
    name: str, *, needs: str, channels: int = 1, vectors: bool = False
) -> Callable[[MaskFunction], MaskFunction]:
    """Register a function as a mask family.

    Args:
        name: The name that users type.
        needs: What a shape needs for neither side of the mask to be empty, as the error message says it.
        channels: Fewest channels; a flow on images squeezes those with fewer.
        vectors: Whether the function takes ``(D,)`` as well.

    Returns:
        Decorator of a function that takes the shape and the index of the layer, and returns its
        :class:`CouplingMask`.

    Raises:
        ValueError: If another module has registered a mask of that name.
    """

    def register(mask: MaskFunction) -> MaskFunction:
        MASKS.add(name, MaskFamily(mask, needs, channels, vectors), mask)
        return mask

    return register


def coupling_mask(name: str, shape: tuple[int, ...], layer: int) -> CouplingMask:
    """Build the mask of one coupling layer in a stack.

    Args:
        name: One of :data:`MASKS`.
        shape: ``(C, H, W)`` of the image, or ``(D,)`` if the mask is defined on vectors.
        layer: Index of the layer in its stack.

    Returns:
        The mask; boolean tensors of that shape.

    Raises:
        ValueError: If the name is unknown, or the shape leaves one side of the mask empty.
    """
    family = MASKS[name]
    if len(shape) != 3 and not family.vectors:
        msg = f"Mask {name!r} is defined on images (C, H, W), not on the shape {shape}."
        raise ValueError(msg)
    # The first layer is checked, too: a shape has to fit all layers of a stack.
    for mask in (family.mask(shape, 0), family.mask(shape, layer)):
        if not (mask.feed.any() and mask.change.any()):
            msg = f"Mask {name!r} leaves nothing to change on the shape {shape}: it needs {family.needs}."
            raise ValueError(msg)
    return mask


def halves(first: Tensor, layer: int) -> CouplingMask:
    """Let two halves swap their roles from layer to layer.

    Args:
        first: Boolean tensor; ``True`` where a value feeds the network in the first layer.
        layer: Index of the layer in its stack.

    Returns:
        The layer's mask: values that do not feed the network are changed.
    """
    feed = first.clone() if layer % 2 == 0 else ~first
    return CouplingMask(feed, ~feed)


@register_mask("checkerboard", needs="at least 2 pixels")
def checkerboard(shape: tuple[int, ...], layer: int) -> CouplingMask:
    """Every other pixel feeds the network, in all channels (Dinh et al. 2017, section 3.4)."""
    rows, columns = torch.meshgrid(torch.arange(shape[1]), torch.arange(shape[2]), indexing="ij")
    return halves(((rows + columns) % 2 == 0).expand(shape), layer)


@register_mask("channel", needs="at least 2 channels; squeeze the image first", channels=2, vectors=True)
def channel(shape: tuple[int, ...], layer: int) -> CouplingMask:
    """The first half of the channels feeds the network (Dinh et al. 2017, section 3.4)."""
    first = torch.arange(shape[0]) < shape[0] // 2
    return halves(first.reshape(-1, *[1] * (len(shape) - 1)).expand(shape), layer)


@register_mask("horizontal", needs="a height of at least 2")
def horizontal(shape: tuple[int, ...], layer: int) -> CouplingMask:
    """The upper half of the image feeds the network (Kirichenko et al. 2020, section 5)."""
    return halves((torch.arange(shape[1]) < shape[1] // 2)[:, None].expand(shape), layer)


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


@register_mask("cycle", needs="a height and a width of at least 2")
def cycle(shape: tuple[int, ...], layer: int) -> CouplingMask:
    """Quadrant ``layer % 4`` feeds the network, and the next one clockwise is changed.

    It takes four layers until a quadrant's information returns to it (Kirichenko et al. 2020, section 6.1 and
    appendix).
    """
    parts = quadrants(shape[1], shape[2])
    feed, change = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    for side, quadrant in ((feed, parts[layer % 4]), (change, parts[(layer + 1) % 4])):
        side[:, quadrant.rows, quadrant.columns] = True
    return CouplingMask(feed, change)
