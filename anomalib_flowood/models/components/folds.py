# SPDX-License-Identifier: Apache-2.0
"""Cross-validation folds: images are scored by fits to the others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .rotations import rows_of

_FOLDS = 5
"""Number of folds."""
SCORED = 100
"""Images that are enough to know scales: after these no further fold is scored."""


def folds(rows: int, copies: int = 1, first: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows to fit to and those to score, as indices, until enough images are scored; always the same.

    Args:
        rows: Number of rows.
        copies: Rows of each image, one after the other: they are never on both sides.
        first: Indices of images that are scored before the others.
    """
    count = rows // copies
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    if first is not None:
        sooner = torch.isin(order, first)
        order = torch.cat([order[sooner], order[~sooner]])
    parts = order.chunk(min(_FOLDS, count))
    scored = 0
    for number, part in enumerate(parts):
        if scored >= SCORED:
            return
        rest = torch.cat([*parts[:number], *parts[number + 1 :]])
        yield rows_of(rest, copies), rows_of(part, copies)
        scored += len(part)
