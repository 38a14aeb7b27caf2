# SPDX-License-Identifier: Apache-2.0
"""Images that are scored by a whitening that was fitted to others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_FOLDS = 5
"""Parts of the images: each is scored by a whitening that was fitted to the others."""
_SCORED = 100
"""Images from which scales are known well enough: no further part is scored after these."""


def folds(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some images and the others, as indices, until enough others came; drawn once for all.

    Args:
        count: Number of images.
    """
    parts = torch.randperm(count, generator=torch.Generator().manual_seed(0)).chunk(min(_FOLDS, count))
    scored = 0
    for number, part in enumerate(parts):
        if scored >= _SCORED:
            return
        yield torch.cat([*parts[:number], *parts[number + 1 :]]), part
        scored += len(part)
