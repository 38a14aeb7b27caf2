# SPDX-License-Identifier: Apache-2.0
"""Items and batches that know their source."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem


@dataclass
class SourcedNumpyImageItem(NumpyImageItem):
    """A NumPy item with the name of the data set or class it comes from."""

    source: str | None = None


@dataclass
class SourcedNumpyImageBatch(NumpyImageBatch):
    """A NumPy batch with the name of the data set or class that each image comes from."""

    source: list[str] | None = None
    item_class: ClassVar[type[SourcedNumpyImageItem]] = SourcedNumpyImageItem


@dataclass
class SourcedImageItem(ImageItem):
    """An item with the name of the data set or class it comes from."""

    source: str | None = None
    numpy_class: ClassVar[type[SourcedNumpyImageItem]] = SourcedNumpyImageItem


@dataclass
class SourcedImageBatch(ImageBatch):
    """A batch with the name of the data set or class that each image comes from."""

    source: list[str] | None = None
    item_class: ClassVar[type[SourcedImageItem]] = SourcedImageItem
    numpy_class: ClassVar[type[SourcedNumpyImageBatch]] = SourcedNumpyImageBatch

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SourcedImageBatch:
        """Move the batch to a device.

        Lightning calls this where it exists. Else it walks through the fields, string by string, which takes longer
        than fetching the batch.

        Args:
            device: The device.
            non_blocking: Whether copies from pinned memory may run in the background.

        Returns:
            A batch with its tensors on the device.
        """
        moved = copy.copy(self)
        # Whatever the batch holds: its fields, and what a post-processor has put beside them.
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, value.to(device, non_blocking=non_blocking))
        return moved


def with_known_masks(batch: SourcedImageBatch, fields: Sequence[str]) -> Any:
    """Leave out the images whose pixels nobody has judged: anomalous ones with an empty mask.

    A mask of an anomalous image is empty if it has none, or if its defect is gone at the size of the batch: there is
    nothing to be found then, and taking all of its pixels for normal would count the defect as a false alarm.

    Args:
        batch: The batch.
        fields: What to keep of it.

    Returns:
        The batch if it has no masks or no labels, or if all of its images are judged; else these fields of those that
        are; nothing if none is.
    """
    if batch.gt_mask is None or batch.gt_label is None:
        return batch
    judged = ~batch.gt_label.bool() | batch.gt_mask.flatten(1).any(1)
    if judged.all():
        return batch
    if not judged.any():
        return None
    values = {name: getattr(batch, name, None) for name in fields}
    return SimpleNamespace(**{name: None if value is None else value[judged] for name, value in values.items()})
