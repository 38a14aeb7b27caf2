# SPDX-License-Identifier: Apache-2.0
"""Stacks of coupling layers: the flows that the detectors use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from FrEIA.framework import SequenceINN

from anomalib_flowood.names import Registry

from .couplings import ChannelCoupling, MaskedCoupling, SubnetConstructor, check_scale
from .layers import ActNorm, FactorOut, InvertibleConv1x1, Squeeze, Unsqueeze
from .masks import MASKS, coupling_mask
from .pixels import LOGIT_ALPHA, Logit
from .subnets import SUBNETS, check_bottleneck, subnet_constructor, subnets_with


class _Net(NamedTuple):
    """The settings of a coupling's s,t-network, without the size of its input."""

    name: str
    hidden_channels: int
    bottleneck_dim: int
    scale: str
    num_blocks: int = 2
    batch_norm: bool = False

    def constructor(self, size: tuple[int, ...]) -> SubnetConstructor:
        arguments = self._asdict()
        check_scale(arguments.pop("scale"))
        return subnet_constructor(size=size, **arguments)


class _Stack(NamedTuple):
    """The arguments of :func:`pixel_flow` that an architecture needs, with its defaults filled in."""

    architecture: str
    scales: int
    mask: str | None
    native: bool
    net: _Net
    coupling_layers: int


_Append = Callable[[SequenceINN, _Stack], None]


@dataclass(frozen=True)
class Architecture:
    """A way to stack couplings, and its defaults.

    Attributes:
        append: Appends the layers to a flow on images.
        subnet: Default s,t-network.
        coupling_layers: Default number of coupling layers.
        hidden_channels: Default width of the networks.
    """

    append: _Append
    subnet: str
    coupling_layers: int
    hidden_channels: int


ARCHITECTURES: Registry[Architecture] = Registry("architecture")
"""Architectures of :func:`pixel_flow` by the names that users type."""


def _register(name: str, *, subnet: str, coupling_layers: int, hidden_channels: int) -> Callable[[_Append], _Append]:
    def register(append: _Append) -> _Append:
        ARCHITECTURES.add(name, Architecture(append, subnet, coupling_layers, hidden_channels), append)
        return append

    return register


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
    scale: str = "tanh",
    logit_alpha: float = LOGIT_ALPHA,
) -> SequenceINN:
    """Build a flow on dequantised images: logit, then the couplings of an architecture.

    - ``single_scale``: couplings of one mask family, as in the comparison of masks by Kirichenko et al. (2020,
      section 6).
    - ``realnvp`` (Dinh et al. 2017, section 3.6): at each scale checkerboard couplings, a squeeze, channel
      couplings, and half of the channels factored out; at the last scale checkerboard couplings alone.
    - ``glow`` (Kingma and Dhariwal 2018, section 3): at each scale a squeeze, steps of ActNorm, invertible 1×1
      convolution and channel coupling, and, except at the last scale, half of the channels factored out.

    Args:
        shape: ``(C, H, W)`` of the images.
        architecture: One of :data:`ARCHITECTURES`.
        scales: Number of scales of ``realnvp`` and ``glow``. The first halves the height and width ``scales - 1``
            times, the other ``scales`` times; they must be multiples of 2 to that power.
        mask: Mask family of ``single_scale``, one of :data:`~anomalib_flowood.flows.MASKS`; ``cycle`` by default.
            An image with fewer channels than the mask needs is squeezed 2×2 first. The other architectures have masks
            of their own.
        native: Whether the networks see only the values that feed them, where the mask has such a native form
            (:func:`~anomalib_flowood.flows.native_form`); other masks have the zero-masked form only.
        subnet: One of :data:`~anomalib_flowood.flows.SUBNETS`; by default ``bottleneck`` for ``single_scale``,
            ``resnet`` for ``realnvp``, ``highway`` for ``glow``. The latter two take convolutional ones only.
        coupling_layers: Number of couplings (``single_scale``; 8 by default), of couplings in each group
            (``realnvp``; the paper's 3 by default, at least 2, and one more at the last scale), or of steps at each
            scale (``glow``; 8 by default).
        hidden_channels: Width of the s,t-networks; 256 by default for ``single_scale``, 64 for the others.
            ``realnvp`` doubles it with every squeeze.
        bottleneck_dim: Width of the squeeze in the ``bottleneck`` and ``conv_bottleneck`` networks.
        num_blocks: Blocks of the ``resnet`` and ``highway`` networks.
        batch_norm: Whether the ``resnet`` networks use batch normalisation.
        scale: Log-scales of the couplings, one of :data:`~anomalib_flowood.flows.SCALES`; ``none`` for additive
            couplings, which leave all scaling to the logit and, in ``glow``, to ActNorm and the 1×1 convolutions.
        logit_alpha: Alpha of the :class:`~anomalib_flowood.flows.Logit`; 0.05 in the literature.

    Returns:
        The flow: ``flow(x) -> (z, log_det)`` with ``x`` in the open unit cube and ``z`` of the same shape,
        ``(N, C, H, W)``.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense for this shape.
    """
    defaults = ARCHITECTURES[architecture]
    net = _Net(
        name=defaults.subnet if subnet is None else subnet,
        hidden_channels=defaults.hidden_channels if hidden_channels is None else hidden_channels,
        bottleneck_dim=bottleneck_dim,
        scale=scale,
        num_blocks=num_blocks,
        batch_norm=batch_norm,
    )
    layers = defaults.coupling_layers if coupling_layers is None else coupling_layers
    _at_least("scales", scales)
    flow = SequenceINN(*shape)
    flow.append(Logit, alpha=logit_alpha)
    defaults.append(flow, _Stack(architecture, scales, mask, native, net, layers))
    return flow


@_register("single_scale", subnet="bottleneck", coupling_layers=8, hidden_channels=256)
def _append_single_scale(flow: SequenceINN, stack: _Stack) -> None:
    _at_least("coupling_layers", stack.coupling_layers)
    mask = "cycle" if stack.mask is None else stack.mask
    squeeze = flow.shapes[-1][0] < MASKS[mask].channels
    if squeeze:
        _check_divisible(flow, 2, f"Mask {mask!r} on one channel", "choose another mask")
        flow.append(Squeeze)
    _append_couplings(flow, mask, stack.native, stack.net, stack.coupling_layers)
    if squeeze:
        flow.append(Unsqueeze)


@_register("realnvp", subnet="resnet", coupling_layers=3, hidden_channels=64)
def _append_realnvp(flow: SequenceINN, stack: _Stack) -> None:
    _check_multi_scale(flow, stack, squeezes=stack.scales - 1)
    if stack.coupling_layers < 2:
        msg = (
            f"Architecture 'realnvp' needs coupling_layers of at least 2, got {stack.coupling_layers}: each coupling "
            "changes only half of the values."
        )
        raise ValueError(msg)
    _append_realnvp_scale(flow, stack)


def _append_realnvp_scale(flow: SequenceINN, stack: _Stack) -> None:
    if stack.scales == 1:
        _append_couplings(flow, "checkerboard", stack.native, stack.net, stack.coupling_layers + 1)
        return
    wider = stack.net._replace(hidden_channels=2 * stack.net.hidden_channels)
    _append_couplings(flow, "checkerboard", stack.native, stack.net, stack.coupling_layers)
    flow.append(Squeeze)
    _append_couplings(flow, "channel", stack.native, wider, stack.coupling_layers)
    rest = stack._replace(scales=stack.scales - 1, net=wider)
    flow.append(FactorOut, fill=partial(_append_realnvp_scale, stack=rest))
    flow.append(Unsqueeze)


@_register("glow", subnet="highway", coupling_layers=8, hidden_channels=64)
def _append_glow(flow: SequenceINN, stack: _Stack) -> None:
    _check_multi_scale(flow, stack, squeezes=stack.scales)
    _at_least("coupling_layers", stack.coupling_layers)
    _append_glow_scale(flow, stack)


def _append_glow_scale(flow: SequenceINN, stack: _Stack) -> None:
    flow.append(Squeeze)
    for _ in range(stack.coupling_layers):
        flow.append(ActNorm)
        flow.append(InvertibleConv1x1)
        # Always the same half of the channels, since the convolution has mixed them.
        _append_couplings(flow, "channel", stack.native, stack.net, 1)
    if stack.scales > 1:
        flow.append(FactorOut, fill=partial(_append_glow_scale, stack=stack._replace(scales=stack.scales - 1)))
    flow.append(Unsqueeze)


def _check_multi_scale(flow: SequenceINN, stack: _Stack, squeezes: int) -> None:
    who = f"Architecture {stack.architecture!r}"
    if stack.mask is not None:
        MASKS[stack.mask]  # raises if the name is unknown, which is the more likely mistake
        msg = (
            f"{who} has its own masks: leave mask out, or choose architecture 'single_scale' for couplings with mask "
            f"{stack.mask!r}."
        )
        raise ValueError(msg)
    if SUBNETS[stack.net.name].fully_connected:
        others = subnets_with(lambda subnet: not subnet.fully_connected)
        msg = (
            f"Subnet {stack.net.name!r} is fully connected, and {who[0].lower()}{who[1:]} rests on convolutions: "
            f"choose subnet {others}, or architecture 'single_scale'."
        )
        raise ValueError(msg)
    _check_divisible(flow, 2**squeezes, f"{who} with scales={stack.scales}", "lower scales")


def _check_divisible(flow: SequenceINN, factor: int, who: str, remedy: str) -> None:
    shape = tuple(flow.shapes[-1])
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
    scale: str = "tanh",
) -> SequenceINN:
    """Build a flow on feature maps: couplings of one mask family, in their native form where there is one.

    Args:
        shape: ``(C, H, W)`` of the maps.
        mask: One of :data:`~anomalib_flowood.flows.MASKS`.
        subnet: One of :data:`~anomalib_flowood.flows.SUBNETS`.
        coupling_layers: Number of couplings; without any the flow is the identity.
        hidden_channels: Width of the s,t-networks.
        bottleneck_dim: Width of the squeeze in the ``bottleneck`` network.
        scale: Log-scales of the couplings, one of :data:`~anomalib_flowood.flows.SCALES`; ``none`` for additive
            couplings, whose log-determinant is 0.

    Returns:
        The flow: ``flow(x) -> (z, log_det)`` with ``x`` of shape ``(N, C, H, W)``.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense for this shape.
    """
    _at_least("coupling_layers", coupling_layers, 0)
    flow = SequenceINN(*shape)
    _append_couplings(flow, mask, True, _Net(subnet, hidden_channels, bottleneck_dim, scale), coupling_layers)
    return flow


def _append_couplings(flow: SequenceINN, mask: str, native: bool, net: _Net, coupling_layers: int) -> None:
    family = MASKS[mask]
    shape = tuple(flow.shapes[-1])
    form = family.native if native else None
    constructor = net.constructor((form or MaskedCoupling).subnet_size(shape))
    for layer in range(coupling_layers):
        sides = coupling_mask(mask, shape, layer)
        if SUBNETS[net.name].squeezes:
            # Only values that feed the network count: zeros of the mask and padding carry no information.
            check_bottleneck(net.bottleneck_dim, int(sides.feed.sum()))
        if form:
            flow.append(form, layer=layer, subnet_constructor=constructor, scale=net.scale)
        else:
            flow.append(MaskedCoupling, mask=sides, subnet_constructor=constructor, scale=net.scale)


def vector_flow(
    dims: int,
    *,
    subnet: str = "mlp",
    coupling_layers: int = 8,
    hidden_channels: int = 256,
    bottleneck_dim: int = 16,
    scale: str = "tanh",
) -> SequenceINN:
    """Build a RealNVP flow on vectors: couplings whose halves swap their roles from layer to layer.

    Args:
        dims: Length of the vectors.
        subnet: A fully connected one of :data:`~anomalib_flowood.flows.SUBNETS`.
        coupling_layers: Number of couplings; without any the flow is the identity.
        hidden_channels: Width of the s,t-networks.
        bottleneck_dim: Width of the squeeze in the ``bottleneck`` network.
        scale: Log-scales of the couplings, one of :data:`~anomalib_flowood.flows.SCALES`; ``none`` for additive
            couplings, whose log-determinant is 0.

    Returns:
        The flow: ``flow(x) -> (z, log_det)`` with ``x`` of shape ``(N, dims)``.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense for this length.
    """
    _at_least("coupling_layers", coupling_layers, 0)
    constructor = _Net(subnet, hidden_channels, bottleneck_dim, scale).constructor(())
    flow = SequenceINN(dims)
    for layer in range(coupling_layers):
        flow.append(ChannelCoupling, layer=layer, subnet_constructor=constructor, scale=scale)
    return flow


def _at_least(argument: str, value: int, least: int = 1) -> None:
    if value < least:
        msg = f"{argument} must be at least {least}, got {value}."
        raise ValueError(msg)
