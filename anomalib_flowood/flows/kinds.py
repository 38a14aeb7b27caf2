# SPDX-License-Identifier: Apache-2.0
"""What is fitted anew for each of several kinds of samples: one module, whose buffers have the kinds in front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .fitted import ShapedByFit


class ForEachKind(ShapedByFit):
    """Mixin for modules that hold one fit for all samples, or one for each of several kinds.

    A fit sets the buffers :attr:`of_kind`. Those of several fits are put together by :meth:`join`: then each has the
    kinds as its first dimension, and whoever calls the module says of which kind each sample is.
    """

    of_kind: ClassVar[tuple[str, ...]]
    """Names of the buffers that a fit sets, each as :attr:`shaped_by_fit`."""

    def fit_state(self) -> tuple[Tensor, ...]:
        """Return what the last fit has set, for :meth:`join`."""
        return tuple(getattr(self, name).clone() for name in self.of_kind)

    def join(self, fits: Sequence[tuple[Tensor, ...]]) -> None:
        """Hold several fits, one for each kind, as :meth:`fit_state` returned them."""
        for name, values in zip(self.of_kind, zip(*fits, strict=True), strict=True):
            setattr(self, name, torch.stack(values))

    def by_kind(self, compute: Callable[..., Tensor], x: Tensor, kind: Tensor | None) -> Tensor:
        """Compute samples, ``(N, ...)``, each with the buffers of its kind.

        Args:
            compute: Takes samples and the buffers :attr:`of_kind`, and returns a row for each sample. In an exported
                graph it gets the buffers of each sample, ``(N, ...)``.
            x: The samples.
            kind: Number of the kind of each, ``(N,)``; ``None`` where there is one fit.
        """
        buffers = [getattr(self, name) for name in self.of_kind]
        if kind is None:
            return compute(x, *buffers)
        if torch.compiler.is_compiling():  # a graph has no loop over those that a batch happens to hold
            return compute(x, *(buffer[kind] for buffer in buffers))
        kinds = kind.unique().tolist()
        if len(kinds) < 2:
            return compute(x, *(buffer[kinds[0] if kinds else 0] for buffer in buffers))
        found: Tensor | None = None
        for one in kinds:
            rows = (kind == one).nonzero().flatten()
            part = compute(x[rows], *(buffer[one] for buffer in buffers))
            found = part.new_empty(len(x), *part.shape[1:]) if found is None else found
            found[rows] = part
        assert found is not None
        return found
