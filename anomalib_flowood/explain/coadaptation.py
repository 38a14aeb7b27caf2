# SPDX-License-Identifier: Apache-2.0
"""What every coupling layer of a flow does to an image, and how far its shifts merely repeat what they change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anomalib_flowood.flows import AffineCoupling, MaskedCoupling

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
    if isinstance(coupling, MaskedCoupling):
        changed = coupling.change.bool()
    else:
        changed = coupling.spread(torch.ones_like(coupling.couple(x[:1])[1]))[0].bool()
    # What is changed never feeds the network. With zeros in its place the layer gives t * exp(s) there, in every form.
    y, s = coupling.couple(x * ~changed)
    s = coupling.spread(s)
    return CouplingRecord(x, s, y * torch.exp(-s) * changed, changed)


def coadaptation(values: Tensor, shifts: Tensor) -> float:
    """Measure how well a coupling layer's −t predicts the values that it transforms.

    A layer that knows the values under its mask, because the layer before has written them to where they feed the
    network, subtracts them: −t = x (Kirichenko et al. 2020, section 5 and figure 3, call this co-adaptation). The
    number is the squared Pearson correlation of −t and x over all transformed positions and images, after the mean
    over the images has been taken from each position. So a bias, which repeats the mean image whatever it is shown,
    counts nothing.

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
        >>> round(coadaptation(x, -x), 3), coadaptation(x, torch.ones(8, 3))
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
