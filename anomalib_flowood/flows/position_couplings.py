# SPDX-License-Identifier: Apache-2.0
"""Couplings on the single positions of a map, with weights that all positions share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .couplings import (
    AffineCoupling,
    SubnetConstructor,
    affine,
    cycle_quadrants,
    join_quadrants,
    pad_to,
    quadrant_size,
    split_quadrants,
)
from .precision import full_precision
from .subnets import check_bottleneck

_FREQUENCIES = 4
"""Octaves of the sines and cosines that encode a position; the first has half a period over the map."""


def encode_places(height: int, width: int, frequencies: int = _FREQUENCIES) -> Tensor:
    """Encode the positions of a map by sines and cosines of row and column (Vaswani et al. 2017, section 3.5).

    Args:
        height: Rows.
        width: Columns.
        frequencies: Octaves; the first has half a period over the map.

    Returns:
        ``(height * width, 4 * frequencies)``, positions in reading order.
    """
    angles = math.pi * 2.0 ** torch.arange(frequencies)
    sides = []
    for length in (height, width):
        phases = angles * ((torch.arange(length) + 0.5) / length)[:, None]
        sides.append(torch.cat([phases.sin(), phases.cos()], dim=1))
    rows, columns = sides
    return torch.cat([rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)], dim=1)


def split_by_digit(dims: int, layer: int) -> tuple[Tensor, Tensor]:
    """Split channels into halves by a binary digit of their index; every second layer uses the next digit.

    Any two channels are thus in different halves of some layer in a short stack (Gao et al. 2020, "i-flow",
    section 3.2).

    Args:
        dims: Number of channels, at least 2.
        layer: Index of the layer in its stack; odd layers swap the halves of the layer before.

    Returns:
        The indices of the channels that feed the network, and of those that the layer changes.
    """
    channels = torch.arange(dims)
    digit = layer // 2 % (dims - 1).bit_length()
    feeds = (channels >> digit) % 2 == layer % 2
    return channels[feeds], channels[~feeds]


class PositionCoupling(AffineCoupling):
    """Coupling on single positions: one network, shared by all positions, changes half of the channels of each.

    The network sees the other half, the encoded position, and the image's condition, if there is one. The halves are
    those of :func:`split_by_digit`.

    Args:
        dims_in: One map shape, ``[(D, h, w)]``, of at least two channels.
        layer: Index of the layer in its stack.
        subnet_constructor: Called as ``subnet_constructor(channels_in, channels_out)``; it works on vectors.
        dims_c: ``[(C,)]`` for a condition: C numbers for each image, which the flow does not change.
        scale: One of :data:`~anomalib_flowood.flows.SCALES`.
        context_dims: Further input channels of the network, for a subclass.

    Raises:
        ValueError: If the input is no map, has one channel only, or the condition is no vector.
    """

    places: Tensor
    """The encoded positions, ``(h * w, E)``; a buffer, like the others."""
    fed: Tensor
    """Indices of the channels that feed the network."""
    changed: Tensor
    """Indices of the channels that the layer changes."""
    order: Tensor
    """Puts the channels that feed the network, followed by the changed ones, back in order; ``(D,)``."""

    def __init__(
        self,
        dims_in: Iterable[tuple[int, ...]],
        layer: int,
        subnet_constructor: SubnetConstructor,
        dims_c: Iterable[tuple[int, ...]] | None = None,
        scale: str = "none",
        context_dims: int = 0,
    ) -> None:
        (shape,) = dims_in = list(dims_in)
        dims_c = list(dims_c or [])
        if len(shape) != 3 or shape[0] < 2:
            msg = f"Positions are those of a map (D, h, w) of at least 2 channels, got the shape {tuple(shape)}."
            raise ValueError(msg)
        if len(dims_c) > 1 or any(len(dims) != 1 for dims in dims_c):
            msg = f"{type(self).__name__} takes one condition (C,) at most, got {dims_c}."
            raise ValueError(msg)
        places = encode_places(*shape[1:])
        fed, changed = split_by_digit(shape[0], layer)
        channels_in = len(fed) + places.shape[1] + sum(dims[0] for dims in dims_c) + context_dims
        super().__init__(dims_in, subnet_constructor, channels=(channels_in, len(changed)), scale=scale)
        self.dims_c = dims_c
        if self.scale is not None:
            self.scale = nn.Parameter(self.scale.detach().flatten())  # the network works on vectors
        # Determined by the configuration, so kept out of checkpoints.
        self.register_buffer("places", places.to(torch.get_default_dtype()), persistent=False)
        for name, index in (("fed", fed), ("changed", changed), ("order", torch.cat([fed, changed]).argsort())):
            self.register_buffer(name, index, persistent=False)

    def at(self, x: Tensor, given: Sequence[Tensor], rev: bool = False) -> tuple[Tensor, Tensor]:
        """Transform the vectors of single positions.

        Args:
            x: ``(n, D)``.
            given: The network's further inputs, ``(n, ...)`` each: encoded positions, condition, context.
            rev: Undo the transformation.

        Returns:
            The vectors, ``(n, D)``, and the log-scales of the changed channels, ``(n, changed)``.
        """
        # The gradient of x[:, index] would take five times as long.
        fed, changed = x.index_select(1, self.fed), x.index_select(1, self.changed)
        s, t = self.scale_and_shift(torch.cat([fed, *given], dim=1))
        return torch.cat([fed, affine(changed, s, t, rev)], dim=1).index_select(1, self.order), s

    def couple(self, x: Tensor, rev: bool = False, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform half of the channels; see :meth:`AffineCoupling.couple`.

        Args:
            x: ``(N, D, h, w)``.
            rev: Undo the transformation.
            condition: ``(N, C)``, where the coupling takes one.
        """
        return self._on_map(x, [] if condition is None else [condition], rev)

    def _on_map(self, x: Tensor, of_images: list[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        """Transform the positions of maps, ``(N, D, h, w)``, given what holds for a whole image, ``(N, ...)`` each."""
        size = x.shape[2:]
        vectors = x.flatten(2).transpose(1, 2)  # (N, h * w, D)
        n, count = x.shape[0], self.places.shape[0]  # len() would fix the batch size of an exported model
        given = [self.places[None].expand(n, -1, -1), *(part[:, None].expand(-1, count, -1) for part in of_images)]
        out = self.at(vectors.flatten(0, 1), [part.flatten(0, 1) for part in given], rev)
        y, s = (part.unflatten(0, (-1, count)).transpose(1, 2).unflatten(2, size) for part in out)
        return y, s

    def spread(self, s: Tensor) -> Tensor:
        """Put the log-scales of the changed half among all channels; see :meth:`AffineCoupling.spread`."""
        fed = torch.zeros_like(s[:, :1]).expand(-1, self.fed.shape[0], *s.shape[2:])
        return torch.cat([fed, s], dim=1).index_select(1, self.order)


class QuadrantContextCoupling(PositionCoupling):
    """Coupling on the positions of one quadrant, given K numbers into which the previous quadrant is squeezed.

    The cycle mask and the bottleneck of Kirichenko et al. (2020, section 6) as context: layer k reads quadrant
    ``k % 4``, which it leaves unchanged, and changes half of the channels of each position in the next one clockwise.
    The halves are others after every round of four layers.

    Args:
        dims_in: One map shape, ``[(D, h, w)]``, of at least two channels and 2 × 2 positions.
        layer: Index of the layer in its stack.
        subnet_constructor: Called as ``subnet_constructor(channels_in, channels_out)``; it works on vectors.
        bottleneck_dim: K.
        hidden_channels: Width of the squeezing network.
        dims_c: ``[(C,)]`` for a condition; see :class:`PositionCoupling`.
        scale: One of :data:`~anomalib_flowood.flows.SCALES`.

    Raises:
        ValueError: As for :class:`PositionCoupling`; also if the map has one row or column only, or K is not smaller
            than the number of values in a quadrant.
    """

    def __init__(
        self,
        dims_in: Iterable[tuple[int, ...]],
        layer: int,
        subnet_constructor: SubnetConstructor,
        bottleneck_dim: int,
        hidden_channels: int,
        dims_c: Iterable[tuple[int, ...]] | None = None,
        scale: str = "none",
    ) -> None:
        super().__init__(dims_in, layer // 4, subnet_constructor, dims_c, scale, context_dims=bottleneck_dim)
        channels, height, width = self.shape
        if min(height, width) < 2:
            msg = f"Context from a quadrant needs a map of at least 2 x 2 positions, got the shape {self.shape}."
            raise ValueError(msg)
        self.source, self.target = cycle_quadrants(layer)
        self.size = quadrant_size(height, width)
        grid = self.places.T.reshape(1, -1, height, width)
        self.register_buffer("places", split_quadrants(grid)[self.target][0].flatten(1).T, persistent=False)
        values = channels * math.prod(self.size)
        check_bottleneck(bottleneck_dim, channels * (height // 2) * (width // 2))
        self.squeeze = nn.Sequential(
            nn.Linear(values, hidden_channels), nn.ReLU(), nn.Linear(hidden_channels, bottleneck_dim)
        )

    def couple(self, x: Tensor, rev: bool = False, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform half of the channels of one quadrant; see :meth:`PositionCoupling.couple`."""
        parts = split_quadrants(x)
        squeeze = self.squeeze if self.training else self._exact_squeeze
        context = squeeze(pad_to(parts[self.source], self.size).flatten(1)).to(x.dtype)
        of_images = [context] if condition is None else [condition, context]
        parts[self.target], s = self._on_map(parts[self.target], of_images, rev)
        return join_quadrants(parts), s

    @full_precision
    def _exact_squeeze(self, quadrant: Tensor) -> Tensor:
        return self.squeeze(quadrant)

    def spread(self, s: Tensor) -> Tensor:
        """Put the log-scales among all channels of the whole map; see :meth:`AffineCoupling.spread`."""
        parts = split_quadrants(s.new_zeros(s.shape[0], *self.shape))
        parts[self.target] = super().spread(s)
        return join_quadrants(parts)
