# SPDX-License-Identifier: Apache-2.0
"""What every coupling layer of a flow does to an image, and how far layers pass on what they are about to change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anomalib_flowood.flows import ActNorm, AffineCoupling, InvertibleConv1x1, Logit, MaskedCoupling
from anomalib_flowood.models.components.capabilities import PixelDensity

_CHUNK = 64
_SEED = 0
_CONSTANT = 1e-5
"""Values that vary by less than this share of their size are constant, for float32 leaves them no digits."""


class CouplingRecord(NamedTuple):
    """One pass through one coupling layer, ``y = (x + t) * exp(s)`` where it changes values.

    Attributes:
        x: The layer's input, ``(N, C, H, W)`` or ``(N, D)``.
        s: Log-scales, of the same shape; zero where nothing is changed.
        t: Shifts, likewise.
        changed: Boolean, of the shape of one input; ``True`` where the layer transforms the value.
    """

    x: Tensor
    s: Tensor
    t: Tensor
    changed: Tensor


@contextmanager
def record_couplings(flow: nn.Module) -> Iterator[list[CouplingRecord]]:
    """Record the coupling layers while images pass through a flow, however deep the layers are nested.

    Args:
        flow: A flow with :class:`~anomalib_flowood.flows.AffineCoupling` layers, to be run in the forward direction
            and in evaluation mode.

    Yields:
        A list that gets one record for each layer of each pass, in order of application.

    Example:
        >>> import torch
        >>> from anomalib_flowood.flows import vector_flow
        >>> flow = vector_flow(6, coupling_layers=2)
        >>> with record_couplings(flow) as records:
        ...     z, log_det = flow(torch.rand(4, 6))
        >>> [int(record.changed.sum()) for record in records]
        [3, 3]
    """
    records: list[CouplingRecord] = []

    def keep(coupling: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del output
        assert isinstance(coupling, AffineCoupling)
        records.append(_record(coupling, args[0][0]))

    handles = [module.register_forward_hook(keep) for module in flow.modules() if isinstance(module, AffineCoupling)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _record(coupling: AffineCoupling, x: Tensor) -> CouplingRecord:
    changed = _changed(coupling, x)
    # What is changed never feeds the network. With zeros in its place the layer gives t * exp(s) there, in every form.
    y, s = coupling.couple(x * ~changed)
    s = coupling.spread(s)
    return CouplingRecord(x, s, y * torch.exp(-s) * changed, changed)


def _changed(coupling: AffineCoupling, x: Tensor) -> Tensor:
    """Where a coupling transforms its input, boolean of the shape of one input."""
    if isinstance(coupling, MaskedCoupling):
        return coupling.change.bool()
    return coupling.spread(torch.ones_like(coupling.couple(x[:1])[1]))[0].bool()


class Coadaptation(NamedTuple):
    """What the shifts of the coupling layers say about the values that they transform, a number for each layer.

    Attributes:
        coadaptation: The co-adaptation number: what −t says about transformed values that come from another image. In
            0..1, or NaN; see :func:`coadaptation`.
        prediction: What −t says about the transformed values of the image itself, in 0..1 or NaN.
    """

    coadaptation: list[float]
    prediction: list[float]


@torch.no_grad()
def coadaptation(model: PixelDensity, images: Tensor) -> Coadaptation:
    """Measure how far each coupling layer knows the values that it transforms, because layers before told it.

    A coupling layer's −t is its prediction of the values under its mask (Kirichenko et al. 2020, section 5). It may
    rest on what an image shows elsewhere: a sleeve on the left says that there is one on the right. Or an earlier
    layer has written the values to where this one sees them: that is co-adaptation. To tell them apart, the pixels
    that the layer transforms are replaced by those of another image, about which the rest of the image says nothing.
    The number is then the :func:`squared_correlation` of −t and the layer's transformed values, over all transformed
    positions and images.

    Args:
        model: A trained flow on pixels, in evaluation mode.
        images: Pre-processed images, ``(N, 3, H, W)`` or ``(N, C, H, W)``; each gets the pixels of another one, which
            is drawn at random, and always alike: neighbours in a folder often show the same.

    Returns:
        Numbers by layer, in order of application. 0 by construction, but for chance, for a layer in front of which the
        transformed values have reached nothing that it sees: the first one, with a cycle mask the first three.
        NaN for fewer than two images, where values are not finite, and, for ``coadaptation`` alone, after a 1×1
        convolution (Glow), which leaves no pixels that a layer transforms and others that it sees.

    Raises:
        ValueError: As the model's ``log_prob``.
    """
    pixels = model.pixels(images)
    regions = _transformed_pixels(model, pixels[:1])
    layers = [float("nan")] * len(regions)
    others = _others(pixels)
    for region in {tuple(region.flatten().tolist()): region for region in regions if region is not None}.values():
        mixed = torch.where(region, others, pixels)
        members = [i for i, other in enumerate(regions) if other is not None and torch.equal(other, region)]
        for member, value in zip(members, _predictions(model, mixed, members), strict=True):
            layers[member] = value
    return Coadaptation(layers, _predictions(model, pixels, range(len(regions))))


def _others(images: Tensor) -> Tensor:
    """Another image in the place of each, all of them once: the one before it in a random order."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SEED))
    before = torch.empty_like(order)
    before[order] = order.roll(1)
    return images[before.to(images.device)]


def _predictions(model: PixelDensity, pixels: Tensor, layers: Sequence[int]) -> list[float]:
    """Squared correlation of −t and x in some of the layers."""
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    for chunk in pixels.split(_CHUNK):
        with record_couplings(model.flow) as records:
            model.log_prob(chunk)
        for part, layer in zip(parts, layers, strict=True):
            record = records[layer]
            part.append((record.x[:, record.changed], record.t[:, record.changed]))
    return [squared_correlation(*(torch.cat(side) for side in zip(*part, strict=True))) for part in parts]


def _transformed_pixels(model: PixelDensity, pixels: Tensor) -> list[Tensor | None]:
    """Find the pixels that each layer transforms, boolean of the shape of an image; ``None`` where they are mixed.

    Numbered pixels are sent through the flow, past all layers but those that only reorder them.
    """
    regions: list[Tensor | None] = []
    mixed = False

    def skip(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal mixed
        del output
        (x,) = args[0]
        if isinstance(module, InvertibleConv1x1):
            mixed = True
        elif isinstance(module, AffineCoupling):
            region = torch.zeros(pixels.numel(), dtype=torch.bool, device=pixels.device)
            region[x[0][_changed(module, x)].long()] = True
            regions.append(None if mixed else region.reshape(pixels.shape[1:]))
        return (x,), x.new_zeros(len(x))

    kinds = (ActNorm, AffineCoupling, InvertibleConv1x1, Logit)
    handles = [module.register_forward_hook(skip) for module in model.flow.modules() if isinstance(module, kinds)]
    try:
        model.flow(torch.arange(pixels.numel(), dtype=pixels.dtype, device=pixels.device).reshape(pixels.shape))
    finally:
        for handle in handles:
            handle.remove()
    return regions


def squared_correlation(values: Tensor, shifts: Tensor) -> float:
    """Measure how well −t predicts the values x that a coupling layer transforms.

    The squared Pearson correlation of −t and x over all positions and images, after the mean over the images has been
    taken from each position. So a bias, which repeats the mean image whatever it is shown, counts nothing.

    Args:
        values: x at the transformed positions, ``(N, ...)``.
        shifts: t there, of the same shape.

    Returns:
        0 (−t says nothing about what tells x from other images; t that does not depend on the image gives 0 by
        definition) to 1 (−t is x, up to one scale and a bias for each position). NaN for fewer than two images, which
        leave no difference between images to predict, and where values are not finite.

    Example:
        >>> import torch
        >>> x = torch.randn(8, 3)
        >>> round(squared_correlation(x, -x), 3), squared_correlation(x, torch.ones(8, 3))
        (1.0, 0.0)
    """
    if len(values) < 2:
        return float("nan")
    centred = []
    for part in (values.detach().cpu().double(), shifts.detach().cpu().double()):
        deviation = (part - part.mean(0)).flatten()
        if bool(deviation.norm() <= _CONSTANT * part.norm()):
            return 0.0
        centred.append(deviation / deviation.norm())
    return min(float(centred[0] @ centred[1]) ** 2, 1.0)  # the first of the two if it is NaN
