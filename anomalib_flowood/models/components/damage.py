# SPDX-License-Identifier: Apache-2.0
"""Damaged copies of normal images: what a detector should find, for want of anomalies."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from anomalib_flowood.data.items import in_unit_range

_AREA = (0.05, 0.3)
"""Least and largest share of the image that is damaged: small enough for a defect, large enough to change the whole."""
_LONGER = 1.2
"""Logarithm of the most that a patch's share of the height may exceed its share of the width, or fall short of it."""
_BRIGHTER = 0.2
"""By how much a patch's brightness may change, as a share of it."""


class DamagedImages(Dataset):
    """A data set of images with one damage each, always the same one for the same place in the data set.

    Args:
        images: The data set, whose items have an ``image``, ``(C, H, W)``.
    """

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """Return an item with its image damaged."""
        item = copy.copy(self.images[index])
        item.image = damaged(item.image, torch.Generator().manual_seed(index))
        return item


def damaged(image: Tensor, generator: torch.Generator) -> Tensor:
    """Paste a patch of an image to another place of it, brighter or darker, and perhaps mirrored.

    This is CutPaste (Li et al. 2021, "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization",
    section 2.1) with patches up to a third of the image.

    Args:
        image: ``(C, H, W)``, bytes or in [0, 1].
        generator: Draws the patch and its places.

    Returns:
        The damaged image, in [0, 1].
    """

    def drawn(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    area, longer = drawn(*_AREA), math.exp(drawn(-_LONGER, _LONGER))
    height, width = image.shape[-2:]
    rows = min(height, max(1, round(height * math.sqrt(area * longer))))
    columns = min(width, max(1, round(width * math.sqrt(area / longer))))
    above, left, to_above, to_left = (
        int(drawn(0, room + 1)) for room in (height - rows, width - columns, height - rows, width - columns)
    )
    changed = in_unit_range(image).clone()
    patch = changed[..., above : above + rows, left : left + columns] * drawn(1 - _BRIGHTER, 1 + _BRIGHTER)
    mirrored = ([], [], [-1], [-2])[int(drawn(0, 4))]
    changed[..., to_above : to_above + rows, to_left : to_left + columns] = patch.clamp_(max=1).flip(mirrored)
    return changed
