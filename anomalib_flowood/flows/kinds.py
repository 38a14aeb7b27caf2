# SPDX-License-Identifier: Apache-2.0
"""Modules that are fitted to samples: to all of them, or to each of several kinds on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ForEachKind(nn.Module):
    """Mixin for modules that hold one fit for all samples, or one for each of several kinds.

    A fit sets the buffers named in :attr:`of_kind`. :meth:`join` stacks those of several fits along a new first
    dimension, one entry for each kind; whoever calls the module then says which kind each sample is of.
    """

    of_kind: dict[str, int]
    """Names of the buffers that a fit sets, with the number of trailing dimensions that are known before the fit. The
    other dimensions depend on the data, so that a checkpoint may hold any size."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, known in self.of_kind.items():
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is None or saved.ndim < known:
                continue
            if saved.shape[saved.ndim - known :] == own.shape[own.ndim - known :]:  # else PyTorch refuses it
                setattr(self, name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit_state(self) -> tuple[Tensor, ...]:
        """Return copies of the buffers that the last fit has set, for :meth:`join`."""
        return tuple(getattr(self, name).clone() for name in self.of_kind)

    def join(self, fits: Sequence[tuple[Tensor, ...]]) -> None:
        """Hold several fits, one for each kind, as :meth:`fit_state` returned them."""
        for name, values in zip(self.of_kind, zip(*fits, strict=True), strict=True):
            setattr(self, name, torch.stack(values))

    def by_kind(self, compute: Callable[..., Tensor], x: Tensor, kind: Tensor | None) -> Tensor:
        """Compute something for each sample with the buffers of its kind.

        Args:
            compute: Takes samples and the buffers :attr:`of_kind`, and returns a row for each sample. In an exported
                graph the buffers are those of each sample, ``(N, ...)``.
            x: The samples, ``(N, ...)``.
            kind: The index of each sample's kind, ``(N,)``; ``None`` if there is one fit.
        """
        buffers = [getattr(self, name) for name in self.of_kind]
        if kind is None:
            return compute(x, *buffers)
        if torch.compiler.is_compiling():  # a graph cannot loop over the kinds that occur in a batch
            return compute(x, *(buffer[kind] for buffer in buffers))
        kinds = kind.unique().tolist()
        if len(kinds) < 2:
            return compute(x, *(buffer[kinds[0] if kinds else 0] for buffer in buffers))
        places = [(kind == one).nonzero().flatten() for one in kinds]
        parts = [
            compute(x[rows], *(buffer[one] for buffer in buffers)) for one, rows in zip(kinds, places, strict=True)
        ]
        return torch.cat(parts)[torch.cat(places).argsort()]
