# SPDX-License-Identifier: Apache-2.0
"""Images that are scored by what was fitted to others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .rotations import rows_of

_FOLDS = 5
"""Parts of the images: each is scored by what was fitted to the others."""
_SCORED = 100
"""Images from which scales are known well enough: no further part is scored after these."""


def folds(rows: int, copies: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some images and the others, as indices, until enough others came; drawn once for all.

    Args:
        rows: Number of rows.
        copies: Rows of each image, one after the other: they are never on both sides.
    """
    count = rows // copies
    parts = torch.randperm(count, generator=torch.Generator().manual_seed(0)).chunk(min(_FOLDS, count))
    scored = 0
    for number, part in enumerate(parts):
        if scored >= _SCORED:
            return
        rest = torch.cat([*parts[:number], *parts[number + 1 :]])
        yield rows_of(rest, copies), rows_of(part, copies)
        scored += len(part)
