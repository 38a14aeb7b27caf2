# SPDX-License-Identifier: Apache-2.0
"""Items and batches that know their source."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem
from torch import Tensor
from torchvision.tv_tensors import Image


def in_unit_range(images: Tensor) -> Tensor:
    """Images in [0, 1], float32 where they were bytes; others as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def of_one_type(images: list[Tensor]) -> list[Tensor]:
    """Bring images in [0, 1] and images of bytes together: as they are where all are alike, else all in [0, 1]."""
    return images if len({image.dtype for image in images}) < 2 else [in_unit_range(image) for image in images]


def _validated(image: Tensor, validate: Callable[[Tensor], Tensor]) -> Tensor:
    """Check an image by anomalib's rule, which makes floats of bytes; of those it sees the first pixel alone."""
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        return validate(image)
    shape = validate(image[..., :1, :1]).shape[:-2]
    return Image(image.reshape(*shape, *image.shape[-2:]))


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

    @staticmethod
    def validate_image(image: Tensor) -> Tensor:
        """Check the image as anomalib does; one of bytes stays so, since it is large: ``SourcedDataset.keep_bytes``."""
        return _validated(image, ImageItem.validate_image)


@dataclass
class SourcedImageBatch(ImageBatch):
    """A batch with the name of the data set or class that each image comes from."""

    source: list[str] | None = None
    item_class: ClassVar[type[SourcedImageItem]] = SourcedImageItem
    numpy_class: ClassVar[type[SourcedNumpyImageBatch]] = SourcedNumpyImageBatch

    @staticmethod
    def validate_image(image: Tensor) -> Tensor:
        """Check the images as anomalib does; those of bytes stay so, as in an item."""
        return _validated(image, ImageBatch.validate_image)

    @property
    def items(self) -> list[ImageItem]:
        """Single items, in the memory of the batch: anomalib's are copies, of whole photographs for one picture."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [
            self.item_class(
                **{name: value[place] if hasattr(value, "__getitem__") else None for name, value in values.items()}
            )
            for place in range(self.batch_size)
        ]

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


def with_known_masks(batch: Any, fields: Sequence[str]) -> Any:
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
