# SPDX-License-Identifier: Apache-2.0
"""Flows on the single positions of a map: one density of a position's vector, with weights that all positions share.

An image has as many positions as its map is large, so that a flow of single positions learns from far more samples than
one of whole maps. What it is to know beside a position's vector it is told: where the position is, and what the rest of
the image is like.
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
"""What a layer is told of the rest of the image, by the names that users type; see :func:`position_flow`."""


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
