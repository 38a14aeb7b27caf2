# SPDX-License-Identifier: Apache-2.0
"""Stacks of couplings: the flows that the detectors use."""

from __future__ import annotations

from FrEIA.framework import SequenceINN
from FrEIA.modules import IRevNetDownsampling

from anomalib_flowood.names import unknown_name

from .couplings import ChannelCoupling, MaskedCoupling, QuadrantCoupling, quadrant_size
from .masks import MASKS, coupling_mask
from .pixels import Logit
from .subnets import subnet_constructor


def pixel_flow(
    shape: tuple[int, int, int],
    *,
    mask: str = "cycle",
    native: bool = True,
    subnet: str = "bottleneck",
    coupling_layers: int = 8,
    hidden_channels: int = 256,
    bottleneck_dim: int = 5,
) -> SequenceINN:
    """Build a flow on dequantised images: logit, then couplings of one mask family.

    Args:
        shape: ``(C, H, W)`` of the images.
        mask: One of :data:`~anomalib_flowood.flows.MASKS`. ``channel`` couplings see the image after a 2×2 squeeze
            where it has one channel only.
        native: Let the networks see their quadrant (cycle mask) or half of the channels (channel mask) alone; the
            other masks have the zero-masked form only.
        subnet: One of :data:`~anomalib_flowood.flows.SUBNETS`.
        coupling_layers: Number of couplings.
        hidden_channels: Width of the s,t-networks.
        bottleneck_dim: Numbers that pass the squeeze of the ``bottleneck`` network.

    Returns:
        The flow: ``flow(x) -> (z, log_det)`` with ``x`` in the open unit cube, ``(N, C, H, W)``.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense for this shape.
    """
    flow = SequenceINN(*shape)
    flow.append(Logit)
    if mask == "channel" and shape[0] == 1:
        if shape[1] % 2 or shape[2] % 2:
            msg = f"Mask 'channel' on one channel needs an even height and width to squeeze, got {shape}."
            raise ValueError(msg)
        flow.append(IRevNetDownsampling)
    _append_couplings(flow, mask, native, subnet, coupling_layers, hidden_channels, bottleneck_dim)
    return flow


def map_flow(
    shape: tuple[int, int, int],
    *,
    mask: str = "cycle",
    subnet: str = "bottleneck",
    coupling_layers: int = 8,
    hidden_channels: int = 256,
    bottleneck_dim: int = 32,
) -> SequenceINN:
    """Build a flow on feature maps: couplings of one mask family, in their native form where there is one.

    Args:
        shape: ``(C, H, W)`` of the maps.
        mask: One of :data:`~anomalib_flowood.flows.MASKS`.
        subnet: One of :data:`~anomalib_flowood.flows.SUBNETS`.
        coupling_layers: Number of couplings.
        hidden_channels: Width of the s,t-networks.
        bottleneck_dim: Numbers that pass the squeeze of the ``bottleneck`` network.

    Returns:
        The flow: ``flow(x) -> (z, log_det)`` with ``x`` of shape ``(N, C, H, W)``.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense for this shape.
    """
    flow = SequenceINN(*shape)
    _append_couplings(flow, mask, True, subnet, coupling_layers, hidden_channels, bottleneck_dim)
    return flow


def _append_couplings(
    flow: SequenceINN,
    mask: str,
    native: bool,
    subnet: str,
    coupling_layers: int,
    hidden_channels: int,
    bottleneck_dim: int,
) -> None:
    if mask not in MASKS:
        raise unknown_name("mask", mask, MASKS)
    _at_least_one("coupling_layers", coupling_layers)
    shape = tuple(flow.shapes[-1])
    coupling = {"cycle": QuadrantCoupling, "channel": ChannelCoupling}.get(mask) if native else None
    size = quadrant_size(*shape[1:]) if coupling is QuadrantCoupling else shape[1:]
    constructor = subnet_constructor(subnet, hidden_channels=hidden_channels, bottleneck_dim=bottleneck_dim, size=size)
    for layer in range(coupling_layers):
        if coupling:
            flow.append(coupling, layer=layer, subnet_constructor=constructor)
        else:
            flow.append(MaskedCoupling, mask=coupling_mask(mask, shape, layer), subnet_constructor=constructor)


def vector_flow(
    dims: int,
    *,
    subnet: str = "mlp",
    coupling_layers: int = 8,
    hidden_channels: int = 256,
    bottleneck_dim: int = 16,
) -> SequenceINN:
    """Build a RealNVP flow on vectors: couplings whose halves swap their roles from layer to layer.

    Args:
        dims: Length of the vectors.
        subnet: ``mlp`` or ``bottleneck``.
        coupling_layers: Number of couplings.
        hidden_channels: Width of the s,t-networks.
        bottleneck_dim: Numbers that pass the squeeze of the ``bottleneck`` network.

    Returns:
        The flow: ``flow(x) -> (z, log_det)``, ``x`` of shape ``(N, dims)``.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense for this length.
    """
    _at_least_one("coupling_layers", coupling_layers)
    constructor = subnet_constructor(subnet, hidden_channels=hidden_channels, bottleneck_dim=bottleneck_dim)
    flow = SequenceINN(dims)
    for layer in range(coupling_layers):
        flow.append(ChannelCoupling, layer=layer, subnet_constructor=constructor)
    return flow


def _at_least_one(argument: str, value: int) -> None:
    if value < 1:
        msg = f"{argument} must be at least 1, got {value}."
        raise ValueError(msg)
