# SPDX-License-Identifier: Apache-2.0
"""Flows on the single positions of a map: the density of a position's vector, with weights that all positions share.

An image has many positions, so that a flow on single positions learns from far more samples than one on whole maps.
Beside a position's vector it is given where the position is and, on request, what the rest of the image is like.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from FrEIA.framework import SequenceINN
from torch import Tensor

from anomalib_flowood.names import check_known

from .couplings import check_scale
from .position_couplings import PositionCoupling, QuadrantContextCoupling
from .subnets import subnet_constructor

CONTEXTS = ("none", "mean", "quadrant")
"""What a layer knows of the rest of the image, by the names that users type; see :func:`position_flow`."""


class PositionFlow(SequenceINN):
    """A flow on single positions, built by :func:`position_flow`.

    It is called like any flow, ``flow(x) -> (z, log_det)``. With context ``mean`` the condition may be given in FrEIA's
    way, ``flow(x, c=[condition])``; by default :meth:`condition` computes it, which is impossible for the inverse.

    Args:
        shape: ``(D, h, w)`` of the maps.
        context: One of :data:`CONTEXTS`.
    """

    def __init__(self, shape: tuple[int, int, int], context: str) -> None:
        super().__init__(*shape)
        self.context = context

    def condition(self, x: Tensor) -> Tensor | None:
        """Return the condition of the layers.

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
        """Transform the vectors of single positions, of any images, as training does.

        Args:
            x: ``(n, D)``; see :func:`draw_positions`.
            places: Index of each vector's position in its map, in reading order; ``(n,)``, integers.
            condition: With context ``mean``, the :meth:`condition` of each vector's image, ``(n, D)``.
            rev: Undo the transformation.

        Returns:
            Latents, ``(n, D)``, and the log-determinant at each position, ``(n,)``.

        Raises:
            ValueError: If the context is ``quadrant``, which needs whole maps, or a condition is missing or not used.
        """
        if self.context == "quadrant":
            msg = "With context 'quadrant' the flow needs whole maps: flow(x), not flow.at(x, places)."
            raise ValueError(msg)
        if (condition is None) == (self.context == "mean"):
            msg = f"With context {self.context!r} positions have {'a' if condition is None else 'no'} condition."
            raise ValueError(msg)
        log_det = x.new_zeros(len(x))
        for coupling in reversed(self) if rev else self:
            given = [coupling.places[places]]
            x, s = coupling.at(x, given if condition is None else [*given, condition], rev)
            log_det = log_det + s.sum(1)
        return x, -log_det if rev else log_det


def draw_positions(maps: Tensor, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw positions of maps, with replacement.

    Args:
        maps: ``(N, D, h, w)``.
        count: Number of positions.
        generator: Source of randomness, on the maps' device.

    Returns:
        Their vectors, ``(count, D)``, the indices of the positions in their maps, in reading order, ``(count,)``, and
        the indices of their images, ``(count,)``.

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
    """Build a flow on the positions of maps: each position has its own density, with weights that all of them share.

    Each layer changes half of a position's channels, given the other half, the encoded position, and its context:

    - ``none``: nothing else.
    - ``mean``: the mean of the image's vectors before the flow, as a condition: the density of a position is that in
      images with such a mean. It tells one model for many kinds of images which kind an image is of.
    - ``quadrant``: ``bottleneck_dim`` numbers into which the previous quadrant is squeezed. A layer changes one
      quadrant of the map and leaves the others unchanged, so that it takes four layers to change every position.

    Args:
        shape: ``(D, h, w)`` of the maps.
        context: One of :data:`CONTEXTS`.
        subnet: A fully connected one of :data:`~anomalib_flowood.flows.SUBNETS`.
        coupling_layers: Number of couplings; without any the flow is the identity.
        hidden_channels: Width of the networks.
        bottleneck_dim: Numbers into which the previous quadrant is squeezed, and the width of the squeeze in the
            ``bottleneck`` network.
        scale: Log-scales of the couplings, one of :data:`~anomalib_flowood.flows.SCALES`; ``none``, the default, for
            additive couplings.

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
