# SPDX-License-Identifier: Apache-2.0
"""Flows on the single positions of a map: one density of a position's vector, with weights that all positions share.

An image has as many positions as its map is large, so that a flow of single positions learns from far more samples than
one of whole maps. What it is to know beside a position's vector it is told: where the position is, and what the rest of
the image is like.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from FrEIA.framework import SequenceINN
from torch import Tensor, nn

from anomalib_flowood.names import check_known

from .couplings import (
    AffineCoupling,
    SubnetConstructor,
    affine,
    check_scale,
    cycle_quadrants,
    join_quadrants,
    pad_to,
    quadrant_size,
    split_quadrants,
)
from .precision import full_precision
from .subnets import check_bottleneck, subnet_constructor

CONTEXTS = ("none", "mean", "quadrant")
"""What a layer is told of the rest of the image, by the names that users type; see :func:`position_flow`."""

_FREQUENCIES = 4
"""Octaves of the sines and cosines of a position, the first of half a period."""


def encode_places(height: int, width: int, frequencies: int = _FREQUENCIES) -> Tensor:
    """Describe the positions of a map by sines and cosines of their row and column (Vaswani et al. 2017, section 3.5).

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
    """Halve numbers by a binary digit of their place: the next digit for every second layer.

    So any two of them are in different halves after a few layers (Gao et al. 2020, "i-flow", section 3.2).

    Args:
        dims: How many numbers there are, at least 2.
        layer: Index of the layer in its stack; in the layers between, the halves swap their roles.

    Returns:
        The places of the numbers that feed the layer, and of those that it changes.
    """
    places = torch.arange(dims)
    digit = layer // 2 % (dims - 1).bit_length()
    feeds = (places >> digit) % 2 == layer % 2
    return places[feeds], places[~feeds]


class PositionCoupling(AffineCoupling):
    """Coupling of single positions: one network for all of them changes half of a position's numbers.

    The network sees the other half, where the position is, and the image's condition, if there is one. The halves are
    those of :func:`split_by_digit`.

    Args:
        dims_in: One map shape, ``[(D, h, w)]``, of at least two channels.
        layer: Index of the layer in its stack.
        subnet_constructor: Called as ``subnet_constructor(numbers seen, numbers out)``; it works on vectors.
        dims_c: ``[(C,)]`` for a condition: C numbers for each image that the flow does not change.
        scale: One of :data:`~anomalib_flowood.flows.SCALES`.
        context_dims: Numbers that a subclass tells the network beside these.

    Raises:
        ValueError: If the input is no map, has one channel only, or the condition is none.
    """

    places: Tensor
    """What the network is told of each position, ``(h * w, E)``; a buffer, as the others."""
    fed: Tensor
    changed: Tensor
    order: Tensor
    """Puts the numbers that feed the network, followed by the changed ones, back to their places; ``(D,)``."""

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
        seen = len(fed) + places.shape[1] + sum(dims[0] for dims in dims_c) + context_dims
        super().__init__(dims_in, subnet_constructor, channels=(seen, len(changed)), scale=scale)
        self.dims_c = dims_c
        if self.scale is not None:
            self.scale = nn.Parameter(self.scale.detach().flatten())  # of vectors
        # Known from the configuration, so kept out of checkpoints.
        self.register_buffer("places", places.to(torch.get_default_dtype()), persistent=False)
        for name, index in (("fed", fed), ("changed", changed), ("order", torch.cat([fed, changed]).argsort())):
            self.register_buffer(name, index, persistent=False)

    def at(self, x: Tensor, told: Sequence[Tensor], rev: bool = False) -> tuple[Tensor, Tensor]:
        """Transform the vectors of single positions.

        Args:
            x: ``(n, D)``.
            told: What the network is told beside them, ``(n, ...)`` each: the places, the condition, the context.
            rev: Undo the transformation.

        Returns:
            The vectors, ``(n, D)``, and the log-scales of the changed numbers, ``(n, changed)``.
        """
        # Not by x[:, index], whose gradient takes five times as long.
        fed, changed = x.index_select(1, self.fed), x.index_select(1, self.changed)
        s, t = self.scale_and_shift(torch.cat([fed, *told], dim=1))
        return torch.cat([fed, affine(changed, s, t, rev)], dim=1).index_select(1, self.order), s

    def couple(self, x: Tensor, rev: bool = False, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform half of the channels; see :meth:`AffineCoupling.couple`.

        Args:
            x: ``(N, D, h, w)``.
            rev: Undo the transformation.
            condition: ``(N, C)``, where the coupling takes one.
        """
        told = [] if condition is None else [condition]
        return self._on_map(x, self.places, told, rev)

    def _on_map(self, x: Tensor, places: Tensor, images: list[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        """Transform the positions of a map, ``(N, D, h, w)``, told the places and what holds for each image."""
        size = x.shape[2:]
        vectors = x.flatten(2).transpose(1, 2)  # (N, h * w, D)
        n, count = x.shape[0], places.shape[0]  # len() would fix the number of images in an exported model
        told = [places[None].expand(n, -1, -1), *(what[:, None].expand(-1, count, -1) for what in images)]
        out = self.at(vectors.flatten(0, 1), [part.flatten(0, 1) for part in told], rev)
        y, s = (part.unflatten(0, (-1, count)).transpose(1, 2).unflatten(2, size) for part in out)
        return y, s

    def spread(self, s: Tensor) -> Tensor:
        """Place the scales of the half in all channels; see :meth:`AffineCoupling.spread`."""
        fed = torch.zeros_like(s[:, :1]).expand(-1, self.fed.shape[0], *s.shape[2:])
        return torch.cat([fed, s], dim=1).index_select(1, self.order)

    def forward(
        self,
        x_or_z: Iterable[Tensor],
        c: Iterable[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor], Tensor]:
        """Transform; see :class:`FrEIA.modules.InvertibleModule` for the convention."""
        del jac
        (x,) = x_or_z
        (condition,) = c or (None,)
        y, s = self.couple(x, rev, condition)
        log_det = s.flatten(1).sum(1)
        return (y,), -log_det if rev else log_det


class QuadrantContextCoupling(PositionCoupling):
    """Coupling of the positions of one quadrant, told K numbers that are squeezed out of the quadrant before.

    The cycle mask and the bottleneck of Kirichenko et al. (2020, section 6) as context: layer k reads quadrant
    ``k % 4``, which it leaves alone, and changes half of the numbers of each position in the next one clockwise. The
    halves change after every round of four layers.

    Args:
        dims_in: One map shape, ``[(D, h, w)]``, of at least two channels and 2 × 2 positions.
        layer: Index of the layer in its stack.
        subnet_constructor: Called as ``subnet_constructor(numbers seen, numbers out)``; it works on vectors.
        bottleneck_dim: K.
        hidden_channels: Width of the network that squeezes.
        dims_c: ``[(C,)]`` for a condition; see :class:`PositionCoupling`.
        scale: One of :data:`~anomalib_flowood.flows.SCALES`.

    Raises:
        ValueError: As for :class:`PositionCoupling`, if the map has one row or column only, or K is no fewer than the
            numbers of a quadrant.
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
        images = [context] if condition is None else [condition, context]
        parts[self.target], s = self._on_map(parts[self.target], self.places, images, rev)
        return join_quadrants(parts), s

    @full_precision
    def _exact_squeeze(self, quadrant: Tensor) -> Tensor:
        return self.squeeze(quadrant)

    def spread(self, s: Tensor) -> Tensor:
        """Place the scales in all channels of the whole map; see :meth:`AffineCoupling.spread`."""
        parts = split_quadrants(s.new_zeros(s.shape[0], *self.shape))
        parts[self.target] = super().spread(s)
        return join_quadrants(parts)


class PositionFlow(SequenceINN):
    """Couplings of single positions; :func:`position_flow` builds it.

    It is called as any flow, ``flow(x) -> (z, log_det)``. With context ``mean`` the image's condition may be given, as
    FrEIA does, ``flow(x, c=[condition])``; without it, it is that of :meth:`condition`, which the inverse cannot know.

    Args:
        shape: ``(D, h, w)`` of the maps.
        context: One of :data:`CONTEXTS`.
    """

    def __init__(self, shape: tuple[int, int, int], context: str) -> None:
        super().__init__(*shape)
        self.context = context

    def condition(self, x: Tensor) -> Tensor | None:
        """What the layers are told of images from outside of the flow.

        Args:
            x: Maps before the flow, ``(N, D, h, w)``.

        Returns:
            With context ``mean``, the mean over the positions, ``(N, D)``; ``None`` otherwise.
        """
        return x.mean((2, 3)) if self.context == "mean" else None

    def forward(
        self, x_or_z: Tensor, c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Transform maps, ``(N, D, h, w)``; the log-determinant is that of the map, ``(N,)``.

        Raises:
            ValueError: If the inverse of a flow with context ``mean`` is not given its condition.
        """
        condition = self.condition(x_or_z) if c is None else None
        if condition is not None:
            if rev:
                msg = "The inverse of a flow with context 'mean' needs c=[condition], the condition before the flow."
                raise ValueError(msg)
            c = [condition]
        return super().forward(x_or_z, c, rev, jac)

    def at(
        self, x: Tensor, places: Tensor, condition: Tensor | None = None, rev: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Transform the vectors of single positions, of whatever images: what training does.

        Args:
            x: ``(n, D)``; see :func:`draw_positions`.
            places: Index of each one's position in its map, in reading order; ``(n,)``, integers.
            condition: With context ``mean``, what :meth:`condition` gives for each one's image, ``(n, D)``.
            rev: Undo the transformation.

        Returns:
            Latents, ``(n, D)``, and the log-determinant at each position, ``(n,)``.

        Raises:
            ValueError: If the context is ``quadrant``, which only whole maps have, or a condition is missing.
        """
        if self.context == "quadrant":
            msg = "With context 'quadrant' the flow needs whole maps: flow(x), not flow.at(x, places)."
            raise ValueError(msg)
        if (condition is None) == (self.context == "mean"):
            msg = f"With context {self.context!r} positions have {'a' if condition is None else 'no'} condition."
            raise ValueError(msg)
        log_det = x.new_zeros(len(x))
        for coupling in reversed(self) if rev else self:
            told = [coupling.places[places]]
            x, s = coupling.at(x, told if condition is None else [*told, condition], rev)
            log_det = log_det + s.sum(1)
        return x, -log_det if rev else log_det


def draw_positions(maps: Tensor, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw positions of maps, with replacement.

    Args:
        maps: ``(N, D, h, w)``.
        count: How many.
        generator: Source of randomness, on the maps' device.

    Returns:
        Their vectors, ``(count, D)``, their places in the map in reading order, ``(count,)``, and the indices of their
        images, ``(count,)``.

    Example:
        A training step of a flow with context ``mean``:

        >>> import torch
        >>> from anomalib_flowood.flows import StandardNormal, draw_positions, position_flow
        >>> maps = torch.randn(8, 6, 4, 4)
        >>> flow = position_flow((6, 4, 4), context="mean", coupling_layers=2, hidden_channels=8)
        >>> x, places, images = draw_positions(maps, 32)
        >>> z, log_det = flow.at(x + 0.3 * torch.randn_like(x), places, flow.condition(maps)[images])
        >>> loss = -(StandardNormal().log_prob(z) + log_det).mean()
    """
    n, _, height, width = maps.shape
    drawn = torch.randint(n * height * width, (count,), generator=generator, device=maps.device)
    images, places = drawn // (height * width), drawn % (height * width)
    return maps[images, :, places // width, places % width], places, images


def position_flow(
    shape: tuple[int, int, int],
    *,
    context: str = "none",
    subnet: str = "mlp",
    coupling_layers: int = 10,
    hidden_channels: int = 256,
    bottleneck_dim: int = 16,
    scale: str = "none",
) -> PositionFlow:
    """Build a flow on the positions of maps: each has a density of its own, and all of them share their weights.

    Each layer changes half of a position's numbers from the other half, from where the position is, and from its
    context:

    - ``none``: nothing else.
    - ``mean``: the mean of the image's vectors before the flow, from outside of it. The density of a position is that
      for images with such a mean. Where one model is to know many kinds of images, it says which kind this is.
    - ``quadrant``: a layer changes one quadrant of the map, and is told ``bottleneck_dim`` numbers that are squeezed
      out of the quadrant before, which it leaves alone. It takes four layers to change every position once.

    Args:
        shape: ``(D, h, w)`` of the maps.
        context: One of :data:`CONTEXTS`.
        subnet: A fully connected one of :data:`~anomalib_flowood.flows.SUBNETS`.
        coupling_layers: Number of couplings; without any the flow is the identity.
        hidden_channels: Width of the networks.
        bottleneck_dim: Numbers that pass from the quadrant before, and the squeeze of the ``bottleneck`` network.
        scale: Log-scales of the couplings, one of :data:`~anomalib_flowood.flows.SCALES`; by default there are none.

    Returns:
        The flow: ``flow(x) -> (z, log_det)`` with ``x`` of shape ``(N, D, h, w)``.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense for this shape.
    """
    check_known("context", [context], CONTEXTS)
    check_scale(scale)
    if coupling_layers < 0:
        msg = f"coupling_layers must be at least 0, got {coupling_layers}."
        raise ValueError(msg)
    constructor = subnet_constructor(subnet, hidden_channels=hidden_channels, bottleneck_dim=bottleneck_dim)
    flow = PositionFlow(shape, context)
    for layer in range(coupling_layers):
        arguments = {"layer": layer, "subnet_constructor": constructor, "scale": scale}
        if context == "quadrant":
            squeezed = {"bottleneck_dim": bottleneck_dim, "hidden_channels": hidden_channels}
            flow.append(QuadrantContextCoupling, **arguments, **squeezed)
        elif context == "mean":
            flow.append(PositionCoupling, cond=0, cond_shape=(shape[0],), **arguments)
        else:
            flow.append(PositionCoupling, **arguments)
    return flow
