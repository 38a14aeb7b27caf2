# SPDX-License-Identifier: Apache-2.0
"""Stored features that replace images: where they are kept, and the batches that a detector trains on."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from anomalib.data.dataclasses.generic import UpdateMixin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from anomalib_flowood import processes

logger = logging.getLogger(__name__)


@dataclass
class FeatureBatch(UpdateMixin):
    """A batch of stored features instead of images, with the other fields of anomalib's batches.

    Attributes:
        features: What the detector extracted, a tuple of tensors whose first dimension is the batch.
        gt_label: 0 for normal and 1 for anomalous images, ``(N,)``.
        gt_mask: Their masks, ``(N, H, W)``, if there are any.
        anomaly_map: Without a channel dimension, as in anomalib's batches, ``(N, H, W)``.
        image_path: Their files, if they are known.
    """

    features: tuple[Tensor, ...]
    gt_label: Tensor | None = None
    gt_mask: Tensor | None = None
    pred_score: Tensor | None = None
    pred_label: Tensor | None = None
    anomaly_map: Tensor | None = None
    pred_mask: Tensor | None = None
    image_path: list[str] | None = None

    def __post_init__(self) -> None:
        """Give maps the shape of masks, as anomalib's batches do on every update."""
        if self.anomaly_map is not None and self.anomaly_map.ndim == 4:
            self.anomaly_map = self.anomaly_map.squeeze(1)


class FeatureDataset(Dataset):
    """Stored features, fetched a batch at a time.

    Args:
        features: Tensors with one row per image.
        labels: Labels of the images, ``(N,)``, or ``None`` if they have none.
        paths: Their files, or ``None`` if they are not known.
        masks: Their masks, ``(N, H, W)``, or ``None`` if they have none.
    """

    def __init__(
        self,
        features: tuple[Tensor, ...],
        labels: Tensor | None,
        paths: Sequence[str] | None = None,
        masks: Tensor | None = None,
    ) -> None:
        self.features, self.labels, self.paths, self.masks = features, labels, paths, masks

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.features[0])

    def __getitem__(self, index: int) -> FeatureBatch:
        """Return the features of one image, as a batch."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> FeatureBatch:
        """Return the features of several images as one batch; loaders call it for each batch."""
        index = torch.as_tensor(indices)
        labels, masks = (None if known is None else known[index] for known in (self.labels, self.masks))
        paths = None if self.paths is None else [self.paths[place] for place in indices]
        return FeatureBatch(tuple(feature[index] for feature in self.features), labels, masks, image_path=paths)


def feature_loader(
    dataset: FeatureDataset, batch_size: int, *, shuffle: bool, batches: int | None = None
) -> DataLoader:
    """Return a loader that takes whole batches out of stored features.

    Args:
        dataset: The features.
        batch_size: Images of a batch.
        shuffle: Draw a new order in every epoch.
        batches: Draw so many batches with replacement, instead of each image once; several processes share them.
    """
    order: Sampler[int] = SequentialSampler(dataset)
    if shuffle and batches is not None and processes.ranks() > 1:
        order = processes.DrawnShare(dataset, math.ceil(batches / processes.ranks()) * batch_size)
    elif shuffle:
        drawn = None if batches is None else batches * batch_size
        order = RandomSampler(dataset, replacement=drawn is not None, num_samples=drawn)
    # The loader knows the batch size, so that Lightning can replace the sampler.
    return DataLoader(dataset, batch_size, sampler=order, collate_fn=_ready)


def _ready(batch: Any) -> Any:
    """Collate nothing: the dataset gives batches."""
    return batch


class FeatureStore:
    """Features of many images, one row each: in memory, or mapped to a file where memory is short.

    Args:
        rows: The most rows that will be added.
        room_gib: The most memory to take, in GiB. Features that need more go to a temporary file, which the system
            removes when they are no longer used.
    """

    taken_gib: float = 0.0
    """Memory that the features take, in GiB; 0 if they are in a file."""

    def __init__(self, rows: int, room_gib: float) -> None:
        self.rows, self.room_gib = rows, room_gib
        self._columns: list[Tensor] = []
        self._filled = 0

    def append(self, features: tuple[Tensor, ...]) -> None:
        """Add the features of some images, tensors with one row per image.

        Raises:
            OSError: If there is no room for the file that they belong in.
        """
        if not self._columns:
            self._columns = self._allocate(features)
        end = self._filled + len(features[0])
        for column, feature in zip(self._columns, features, strict=True):
            column[self._filled : end] = feature
        self._filled = end

    @property
    def features(self) -> tuple[Tensor, ...]:
        """All features that were added."""
        return tuple(column[: self._filled] for column in self._columns)

    def _allocate(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        shapes = [(self.rows, *feature.shape[1:]) for feature in features]
        size = sum(math.prod(shape) * feature.element_size() for shape, feature in zip(shapes, features, strict=True))
        gib = size / 2**30
        if gib <= self.room_gib:
            self.taken_gib = gib
            return [_laid_out(feature, shape, torch.empty) for shape, feature in zip(shapes, features, strict=True)]
        logger.warning(
            "The features of %d images take %.1f GiB, and cache_gib leaves %.1f: they are kept in a temporary file.",
            self.rows,
            gib,
            max(0.0, self.room_gib),
        )
        return [_laid_out(feature, shape, _mapped) for shape, feature in zip(shapes, features, strict=True)]


def _laid_out(feature: Tensor, shape: tuple[int, ...], new: Callable[..., Tensor]) -> Tensor:
    """Make a tensor with the memory format of a feature, which makes copying fast."""
    if feature.ndim == 4 and feature.is_contiguous(memory_format=torch.channels_last):
        images, channels, height, width = shape
        return new((images, height, width, channels), dtype=feature.dtype).permute(0, 3, 1, 2)
    return new(shape, dtype=feature.dtype)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Map a tensor to a temporary file, whose room on the disk is reserved first."""
    size = math.prod(shape)
    with NamedTemporaryFile(prefix="flowood-features-") as file:  # The mapping outlives the name.
        try:
            if hasattr(os, "posix_fallocate"):  # writing to a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        except OSError as error:
            msg = (
                f"There is no room in {Path(file.name).parent} for {size * dtype.itemsize / 2**30:.1f} GiB of features "
                f"({error.strerror}): set TMPDIR to a folder with more, or raise cache_gib."
            )
            raise OSError(error.errno, msg) from error
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).reshape(shape)
