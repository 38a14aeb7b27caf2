# SPDX-License-Identifier: Apache-2.0
"""The density of a flow: invertible transforms, and a base distribution of their latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import InvertibleModule
from torch import Tensor

from .bases import Base
from .positions import PositionFlow


@dataclass(frozen=True)
class Density:
    """The density of a batch under a flow, in parts.

    Attributes:
        terms: The summands of the log-density: log p of the base distribution, the log-determinant, and the rest where
            there is one; nats, ``(N,)`` each.
        latents: Latents of each of the flows that are evaluated side by side, ``(N, ...)``.
        base: The base distribution of all of them.
    """

    terms: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]
    base: Base

    @property
    def log_prob(self) -> Tensor:
        """Log-density, nats, ``(N,)``."""
        return sum(self.terms[1:], self.terms[0])

    @property
    def parts(self) -> Tensor:
        """The terms of −log p side by side; nats, ``(N, P)``."""
        return -torch.stack(self.terms, dim=1)

    @property
    def radius(self) -> Tensor:
        """Distance of the latents from the mean of the base, or the nearest mean of a mixture; ``(N,)``."""
        return torch.stack([self.base.radius(z) for z in self.latents]).norm(dim=0)


def density(
    flow: InvertibleModule,
    base: Base,
    x: Tensor,
    rest: Tensor | None = None,
    condition: Tensor | None = None,
    *,
    after: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Density:
    """Evaluate ``log p(x) = log p_base(f(x)) + log|det df/dx|``, plus a rest that is known already.

    Args:
        flow: ``flow(x) -> (z, log_det)``; the identity if it has no layers.
        base: The distribution of z.
        x: ``(N, ...)``.
        rest: The part of the log-density that lies outside of x, nats, ``(N,)``: see
            :class:`~anomalib_flowood.flows.PrincipalSubspace`.
        condition: The flow's condition, ``(N, C)``; the density is that of x given this condition.
        after: A further transform of the flow's latents, which also returns its log-determinants, ``(N,)``.
    """
    z, log_det = flow(x) if condition is None else flow(x, c=[condition])
    if after is not None:
        z, log_det_after = after(z)
        log_det = log_det + log_det_after
    log_prob = base.log_prob(z)
    terms = (log_prob, torch.zeros_like(log_prob) + log_det)  # log_det of a flow without layers is the number 0
    return Density(terms if rest is None else (*terms, rest), (z,), base)


def independent(densities: Sequence[Density]) -> Density:
    """Combine densities of independent variables that share a base: their log-densities add up, term by term."""
    terms = tuple(sum(same[1:], same[0]) for same in zip(*(part.terms for part in densities), strict=True))
    return Density(terms, tuple(z for part in densities for z in part.latents), densities[0].base)


def couple(couplings: SequenceINN, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run couplings, and return the log-scale of each value instead of their sum, the log-determinant.

    Args:
        couplings: A flow of couplings only.
        x: ``(N, ...)``.
        condition: The condition of a :class:`~anomalib_flowood.flows.PositionFlow`, ``(N, C)``; by default the flow
            computes it from x.

    Returns:
        Latents, and the log-scales of each value, summed over all couplings; both of the shape of x.
    """
    if condition is None and isinstance(couplings, PositionFlow):
        condition = couplings.condition(x)
    given = {} if condition is None else {"condition": condition}
    scales = torch.zeros_like(x)
    for coupling in couplings:
        x, s = coupling.couple(x, **given)
        scales = scales + coupling.spread(s)
    return x, scales


class SideBySide(InvertibleModule):
    """Flows side by side, each with an input of its own: ``flow([x, …]) -> ([z, …], log_det)``.

    Args:
        flows: One flow for each input.
    """

    def __init__(self, flows: Iterable[SequenceINN]) -> None:
        flows = list(flows)
        super().__init__([flow.shapes[0] for flow in flows])
        self.flows = torch.nn.ModuleList(flows)

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shapes of the outputs, which are those of the inputs."""
        return input_dims

    def forward(
        self, x_or_z: Tensor | Sequence[Tensor], c: object = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor | list[Tensor], Tensor]:
        """Run all flows; with a single one, the input may be a tensor instead of a list, and so is the output."""
        del c, jac
        single = isinstance(x_or_z, Tensor)
        inputs = [x_or_z] if single else x_or_z
        outputs, log_dets = zip(*(flow(x, rev=rev) for flow, x in zip(self.flows, inputs, strict=True)), strict=True)
        log_det = sum(log_dets, outputs[0].new_zeros(outputs[0].shape[0]))
        return outputs[0] if single else list(outputs), log_det
