# SPDX-License-Identifier: Apache-2.0
"""Stacks of couplings: the flows that the detectors use."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from FrEIA.framework import SequenceINN

from anomalib_flowood.names import unknown_name

from .couplings import ChannelCoupling, MaskedCoupling, QuadrantCoupling, SubnetConstructor, quadrant_size
from .layers import ActNorm, FactorOut, InvertibleConv1x1, Squeeze, Unsqueeze
from .masks import MASKS, coupling_mask
from .pixels import LOGIT_ALPHA, Logit
from .subnets import BOTTLENECKS, FULLY_CONNECTED, check_bottleneck, subnet_constructor

ARCHITECTURES = ("single_scale", "realnvp", "glow")


class _Subnet(NamedTuple):
    """An s,t-network, but for the size of what it sees."""

    name: str
    hidden_channels: int
    bottleneck_dim: int
    num_blocks: int = 2
    batch_norm: bool = False

    def constructor(self, size: tuple[int, ...]) -> SubnetConstructor:
        return subnet_constructor(size=size, **self._asdict())


class _Usual(NamedTuple):
    """What an architecture takes where the user names nothing."""

    subnet: str
    coupling_layers: int
    hidden_channels: int


_USUAL = {
    "single_scale": _Usual("bottleneck", 8, 256),
    "realnvp": _Usual("resnet", 3, 64),
    "glow": _Usual("highway", 8, 64),
}


def pixel_flow(
    shape: tuple[int, int, int],
    *,
    architecture: str = "single_scale",
    scales: int = 2,
    mask: str | None = None,
    native: bool = True,
    subnet: str | None = None,
    coupling_layers: int | None = None,
    hidden_channels: int | None = None,
    bottleneck_dim: int = 5,
    num_blocks: int = 2,
    batch_norm: bool = False,
    logit_alpha: float = LOGIT_ALPHA,
) -> SequenceINN:
    """Build a flow on dequantised images: logit, then the couplings of an architecture.

    - ``single_scale``: couplings of one mask family, as Kirichenko et al. (2020, section 6) compare masks.
    - ``realnvp`` (Dinh et al. 2017, section 3.6): at each scale checkerboard couplings, a squeeze, channel
      couplings, and half of the channels factored out; at the last scale checkerboard couplings alone.
    - ``glow`` (Kingma and Dhariwal 2018, section 3): at each scale a squeeze, steps of ActNorm, invertible 1×1
      convolution and channel coupling, and, but for the last scale, half of the channels factored out.

    Args:
        shape: ``(C, H, W)`` of the images.
        architecture: One of :data:`ARCHITECTURES`.
        scales: Number of scales of ``realnvp`` and ``glow``. The first halves the height and width ``scales - 1``
            times, the other ``scales`` times; they must be multiples of 2 to that power.
        mask: Mask family of ``single_scale``, one of :data:`~anomalib_flowood.flows.MASKS`; ``cycle`` by default.
            ``channel`` couplings see the image after a 2×2 squeeze where it has one channel only. The other
            architectures have masks of their own.
        native: Let the networks see their quadrant (cycle mask) or half of the channels (channel mask) alone; the
            other masks have the zero-masked form only.
        subnet: One of :data:`~anomalib_flowood.flows.SUBNETS`; by default ``bottleneck`` for ``single_scale``,
            ``resnet`` for ``realnvp``, ``highway`` for ``glow``. The latter two take convolutional ones only.
        coupling_layers: Number of couplings (``single_scale``; 8 by default), of couplings in each of the groups
            (``realnvp``; the paper's 3 by default, at least 2, and one more at the last scale), or of steps at each
            scale (``glow``; 8 by default).
        hidden_channels: Width of the s,t-networks; 256 by default for ``single_scale``, 64 for the others.
            ``realnvp`` doubles it with every squeeze.
        bottleneck_dim: Numbers that pass the squeeze of the ``bottleneck`` and ``conv_bottleneck`` networks.
        num_blocks: Blocks of the ``resnet`` and ``highway`` networks.
        batch_norm: Batch normalisation in the ``resnet`` networks.
        logit_alpha: Alpha of the :class:`~anomalib_flowood.flows.Logit`; 0.05 in the literature.

    Returns:
        The flow: ``flow(x) -> (z, log_det)`` with ``x`` in the open unit cube and ``z`` of the same shape,
        ``(N, C, H, W)``.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense for this shape.
    """
    if architecture not in ARCHITECTURES:
        raise unknown_name("architecture", architecture, ARCHITECTURES)
    usual = _USUAL[architecture]
    net = _Subnet(
        name=usual.subnet if subnet is None else subnet,
        hidden_channels=usual.hidden_channels if hidden_channels is None else hidden_channels,
        bottleneck_dim=bottleneck_dim,
        num_blocks=num_blocks,
        batch_norm=batch_norm,
    )
    layers = usual.coupling_layers if coupling_layers is None else coupling_layers
    _at_least_one("scales", scales)

    flow = SequenceINN(*shape)
    flow.append(Logit, alpha=logit_alpha)
    if architecture == "single_scale":
        mask = "cycle" if mask is None else mask
        squeeze = mask == "channel" and shape[0] == 1
        if squeeze:
            _check_divisible(shape, 2, "Mask 'channel' on one channel", "choose another mask")
            flow.append(Squeeze)
        _append_couplings(flow, mask, native, net, layers)
        if squeeze:
            flow.append(Unsqueeze)
        return flow

    if mask is not None:
        if mask not in MASKS:
            raise unknown_name("mask", mask, MASKS)
        msg = (
            f"Architecture {architecture!r} has its own masks: leave mask out, or choose architecture 'single_scale' "
            f"for couplings with mask {mask!r}."
        )
        raise ValueError(msg)
    if net.name in FULLY_CONNECTED:
        msg = (
            f"Subnet {net.name!r} is fully connected, and architecture {architecture!r} rests on convolutions: choose "
            "subnet 'resnet', 'highway' or 'conv_bottleneck', or architecture 'single_scale'."
        )
        raise ValueError(msg)
    squeezes = scales if architecture == "glow" else scales - 1
    _check_divisible(shape, 2**squeezes, f"Architecture {architecture!r} with scales={scales}", "lower scales")
    if architecture == "glow":
        _append_glow(flow, scales, native, net, layers)
    else:
        if layers < 2:
            msg = (
                f"Architecture 'realnvp' needs coupling_layers of at least 2, got {layers}: each coupling changes only "
                "half of the values."
            )
            raise ValueError(msg)
        _append_realnvp(flow, scales, native, net, layers)
    return flow


def _append_realnvp(flow: SequenceINN, scales: int, native: bool, net: _Subnet, coupling_layers: int) -> None:
    if scales == 1:
        _append_couplings(flow, "checkerboard", native, net, coupling_layers + 1)
        return
    wider = net._replace(hidden_channels=2 * net.hidden_channels)
    _append_couplings(flow, "checkerboard", native, net, coupling_layers)
    flow.append(Squeeze)
    _append_couplings(flow, "channel", native, wider, coupling_layers)
    rest = partial(_append_realnvp, scales=scales - 1, native=native, net=wider, coupling_layers=coupling_layers)
    flow.append(FactorOut, fill=rest)
    flow.append(Unsqueeze)


def _append_glow(flow: SequenceINN, scales: int, native: bool, net: _Subnet, coupling_layers: int) -> None:
    _at_least_one("coupling_layers", coupling_layers)
    flow.append(Squeeze)
    for _ in range(coupling_layers):
        flow.append(ActNorm)
        flow.append(InvertibleConv1x1)
        # Always the same half: the convolution before it has mixed the channels.
        _append_couplings(flow, "channel", native, net, 1)
    if scales > 1:
        rest = partial(_append_glow, scales=scales - 1, native=native, net=net, coupling_layers=coupling_layers)
        flow.append(FactorOut, fill=rest)
    flow.append(Unsqueeze)


def _check_divisible(shape: tuple[int, int, int], factor: int, who: str, remedy: str) -> None:
    if shape[1] % factor or shape[2] % factor:
        height, width = (max(1, round(length / factor)) * factor for length in shape[1:])
        msg = (
            f"{who} needs a height and width divisible by {factor} to squeeze the image, got the shape {shape}: "
            f"{remedy}, or resize the images, for example to {height} x {width}."
        )
        raise ValueError(msg)


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
    _append_couplings(flow, mask, True, _Subnet(subnet, hidden_channels, bottleneck_dim), coupling_layers)
    return flow


def _append_couplings(flow: SequenceINN, mask: str, native: bool, net: _Subnet, coupling_layers: int) -> None:
    if mask not in MASKS:
        raise unknown_name("mask", mask, MASKS)
    _at_least_one("coupling_layers", coupling_layers)
    shape = tuple(flow.shapes[-1])
    coupling = {"cycle": QuadrantCoupling, "channel": ChannelCoupling}.get(mask) if native else None
    constructor = net.constructor(quadrant_size(*shape[1:]) if coupling is QuadrantCoupling else shape[1:])
    for layer in range(coupling_layers):
        sides = coupling_mask(mask, shape, layer)
        if net.name in BOTTLENECKS:
            # The network sees zeros and padding, too, which tell it nothing.
            check_bottleneck(net.bottleneck_dim, int(sides.feed.sum()))
        if coupling:
            flow.append(coupling, layer=layer, subnet_constructor=constructor)
        else:
            flow.append(MaskedCoupling, mask=sides, subnet_constructor=constructor)


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
