# SPDX-License-Identifier: Apache-2.0
"""Raw scores and maps in [0, 1], with 0.5 at a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 2**22
"""Values of maps that are mapped at once."""
_JUST_ABOVE_HALF = 0.5 + 2**-24
"""The next float32 after 0.5."""


def squash(raw: Tensor, threshold: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Map raw values to [0, 1], with 0.5 at the threshold, and say which lie above; NaN counts as infinite.

    Large maps go row by row, some at once, since what is computed between takes several times their memory.
    """
    if raw.ndim == 4 and not torch.compiler.is_compiling() and raw.numel() > _AT_ONCE:
        squashed, above = torch.empty_like(raw), torch.empty_like(raw, dtype=torch.bool)
        rows = max(1, _AT_ONCE // (raw.numel() // raw.shape[2]))
        for some, *into in zip(*(part.split(rows, dim=2) for part in (raw, squashed, above)), strict=True):
            for target, value in zip(into, squash_values(some, threshold, unit), strict=True):
                target.copy_(value)
        return squashed, above
    return squash_values(raw, threshold, unit)


def squash_values(raw: Tensor, threshold: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Map all values at once, as :func:`squash` does."""
    raw = torch.where(torch.isnan(raw), torch.full_like(raw, float("inf")), raw)
    above = raw > threshold
    x = (raw - threshold).abs() / unit
    high = (1 - 0.5 / (1 + 4 * x).sqrt().sqrt()).clamp(min=_JUST_ABOVE_HALF)
    return torch.where(above, high, 0.5 / (1 + x)), above
