# SPDX-License-Identifier: Apache-2.0
"""Raw scores and maps in [0, 1], with 0.5 at a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = 2**24
"""Values of a large map."""
_AT_ONCE = 2**20
"""Those of its values that are mapped at once."""
_JUST_ABOVE_HALF = 0.5 + 2**-24
"""The next float32 after 0.5."""


def squash(raw: Tensor, threshold: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Map raw values to [0, 1], with 0.5 at the threshold, and say which lie above; NaN counts as infinite.

    The map of a single large image goes row by row, some at once, since what is computed between takes several times
    its memory. It is overwritten.
    """
    # anomalib's batches have maps without the axis of channels.
    if raw.ndim in {3, 4} and not torch.compiler.is_compiling() and len(raw) == 1 and raw.numel() > _LARGE:
        above = torch.empty_like(raw, dtype=torch.bool)
        rows = max(1, _AT_ONCE // raw.shape[-1])
        for values, marks in zip(raw.split(rows, dim=-2), above.split(rows, dim=-2), strict=True):
            squashed, marked = squash_values(values, threshold, unit)
            values.copy_(squashed)
            marks.copy_(marked)
        return raw, above
    return squash_values(raw, threshold, unit)


def squash_values(raw: Tensor, threshold: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Map all values at once, as :func:`squash` does."""
    raw = torch.where(torch.isnan(raw), torch.full_like(raw, float("inf")), raw)
    above = raw > threshold
    x = (raw - threshold).abs() / unit
    # One reciprocal for both sides, and no quotient: OpenVINO computes that of two tensors as a general power.
    part = 0.5 * torch.where(above, (1 + 4 * x).sqrt().sqrt(), 1 + x).reciprocal()
    return torch.where(above, (1 - part).clamp(min=_JUST_ABOVE_HALF), part), above
