# SPDX-License-Identifier: Apache-2.0
"""Frozen features, extracted once per fit instead of once per epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import Batch
from anomalib.data.dataclasses.generic import UpdateMixin
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import track
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision.transforms import v2

from anomalib_flowood.trainers import train_on, training_loaders, validate_on, validation_loaders

from .flow_module import FlowModule

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = FlowModule
else:
    _Base = object

_DETERMINISTIC = (v2.Resize, v2.CenterCrop, v2.Pad, v2.Normalize, v2.Grayscale, v2.ToDtype, v2.ToImage, v2.Identity)


@dataclass
class FeatureBatch(UpdateMixin):
    """A batch of stored features in the place of images; same fields as anomalib's batches otherwise.

    Attributes:
        features: What the detector extracted, a tuple of tensors whose first dimension is the batch.
        gt_label: 0 for normal and 1 for anomalous images, ``(N,)``.
    """

    features: tuple[Tensor, ...]
    gt_label: Tensor | None = None
    gt_mask: Tensor | None = None
    pred_score: Tensor | None = None
    pred_label: Tensor | None = None
    anomaly_map: Tensor | None = None
    pred_mask: Tensor | None = None


class FeatureDataset(Dataset):
    """Stored features, fetched a batch at a time.

    Args:
        features: Tensors with one row per image.
        labels: Labels of the images, ``(N,)``, or ``None`` if they have none.
    """

    def __init__(self, features: tuple[Tensor, ...], labels: Tensor | None) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.features[0])

    def __getitem__(self, indices: Sequence[int]) -> FeatureBatch:
        """Return the features of several images as one batch."""
        index = torch.as_tensor(indices)
        labels = None if self.labels is None else self.labels[index]
        return FeatureBatch(tuple(feature[index] for feature in self.features), labels)


def feature_loader(dataset: FeatureDataset, batch_size: int, *, shuffle: bool) -> DataLoader:
    """Return a loader that takes whole batches out of stored features."""
    order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    return DataLoader(dataset, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)


class ImagesOnly(Callback):
    """Hands a pre-processor the batches that hold images, and spares it those that hold stored features.

    Args:
        pre_processor: anomalib's pre-processor, itself a callback.
    """

    def __init__(self, pre_processor: Callback) -> None:
        self.pre_processor = pre_processor

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Pre-process a training batch of images."""
        if not isinstance(batch, FeatureBatch):
            self.pre_processor.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Pre-process a validation batch of images."""
        del dataloader_idx  # anomalib's hook has no such argument
        if not isinstance(batch, FeatureBatch):
            self.pre_processor.on_validation_batch_start(trainer, pl_module, batch, batch_idx)

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Pre-process a test batch."""
        self.pre_processor.on_test_batch_start(*args, **kwargs)

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Pre-process a batch to predict."""
        self.pre_processor.on_predict_batch_start(*args, **kwargs)


class FrozenFeatures(_Base):
    """Mixin for detectors on a frozen backbone, to the left of :class:`FlowModule`.

    When a fit starts, the backbone sees every training and validation image once. The detector fits what it needs on
    the features (:meth:`fit_features`), and the trainer's loaders are replaced by ones over the stored features. With
    random training augmentations the training images differ from epoch to epoch, so that they are extracted anew.

    Stored features lie in main memory, whatever the device of the detector. What is computed of them is computed on
    that device, some rows at a time: torch models bring the features that they get to their own device and precision.

    The detector implements :meth:`extract`, :meth:`fit_features` and :meth:`prepare_features`.
    """

    cache_gib: float = 2.0
    """Memory for features, in GiB."""

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the features of pre-processed images; one row per image."""
        raise NotImplementedError

    def fit_features(self, features: tuple[Tensor, ...]) -> None:
        """Fit what comes before the flow on the features of all training images, which lie in main memory."""
        raise NotImplementedError

    def prepare_features(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Turn some features, on any device, into what the flow trains on, once and not at every step."""
        raise NotImplementedError

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's callbacks, with the pre-processor kept away from stored features."""
        callbacks: list[Callback] = list(super().configure_callbacks())  # type: ignore[arg-type]
        return [ImagesOnly(callback) if callback is self.pre_processor else callback for callback in callbacks]

    def on_fit_start(self) -> None:
        """Extract, fit, and train on what was stored."""
        super().on_fit_start()
        trainer: Trainer = self.trainer
        loader = _single(training_loaders(trainer), "training")
        features, labels = self._extract_all(loader, trainer.limit_train_batches, "training")
        if trainer.ckpt_path is None:  # A resumed fit goes on with what its checkpoint brought.
            self.fit_features(features)
        if _is_random(getattr(loader.dataset, "augmentations", None)):
            logger.warning("Training augmentations are on: the backbone extracts features anew in every epoch.")
        else:
            dataset = FeatureDataset(self._prepare_all(features), labels)
            train_on(trainer, feature_loader(dataset, loader.batch_size, shuffle=True))

        if loaders := validation_loaders(trainer):
            loader = _single(loaders, "validation")
            features, labels = self._extract_all(loader, trainer.limit_val_batches, "validation")
            dataset = FeatureDataset(self._prepare_all(features), labels)
            validate_on(trainer, feature_loader(dataset, loader.batch_size, shuffle=False))

    def inputs_of(self, batch: Any) -> tuple[Tensor, ...]:
        """Return the prepared features of a batch, stored or of images."""
        if isinstance(batch, FeatureBatch):
            return batch.features
        with torch.no_grad():
            return self.prepare_features(self.extract(batch.image))

    @torch.no_grad()
    def _extract_all(self, loader: DataLoader, limit: float, what: str) -> tuple[tuple[Tensor, ...], Tensor | None]:
        trainer: Trainer = self.trainer
        training = self.training
        self.eval()
        total = len(loader)
        if isinstance(limit, int):  # A share is applied to the stored features, by Lightning, at every epoch.
            total = min(total, limit)
        store, labels = FeatureStore(len(loader.dataset), self.cache_gib), []  # type: ignore[arg-type]
        batches: Iterable[Batch] = islice(loader, total)
        watchers = [watch for callback in trainer.callbacks if (watch := getattr(callback, "on_extract", None))]  # type: ignore[attr-defined]
        if trainer.progress_bar_callback is not None and trainer.is_global_zero:
            batches = track(batches, f"Extracting {what} features", total=total)
        for number, batch in enumerate(batches):
            for watch in watchers:
                watch(what, number, total)
            batch = trainer.strategy.batch_to_device(batch)
            image = batch.image
            transform = getattr(self.pre_processor, "transform", None)
            if transform is not None:
                image = transform(image)
            store.append(self.extract(image))
            labels.append(batch.gt_label)
        self.train(training)
        if not labels:
            msg = f"There are no {what} images to extract features from."
            raise ValueError(msg)
        stored = None if any(label is None for label in labels) else torch.cat(labels).cpu()
        return store.features, stored

    @torch.no_grad()
    def _prepare_all(self, features: tuple[Tensor, ...], chunk: int = 256) -> tuple[Tensor, ...]:
        store = FeatureStore(len(features[0]), self.cache_gib)
        for rows in zip(*(feature.split(chunk) for feature in features), strict=True):
            store.append(self.prepare_features(rows))
        return store.features


class FeatureStore:
    """Features of many images, one row each: in memory, or mapped to a file where memory is short.

    Args:
        rows: The most rows that will come.
        cache_gib: The most memory to take, in GiB; what needs more goes to a temporary file, which the system removes
            when the features are no longer used.
    """

    def __init__(self, rows: int, cache_gib: float) -> None:
        self.rows, self.cache_gib = rows, cache_gib
        self._columns: list[Tensor] = []
        self._filled = 0

    def append(self, features: tuple[Tensor, ...]) -> None:
        """Add the features of some images, tensors with one row per image."""
        if not self._columns:
            self._columns = self._allocate(features)
        end = self._filled + len(features[0])
        for column, feature in zip(self._columns, features, strict=True):
            column[self._filled : end] = feature
        self._filled = end

    @property
    def features(self) -> tuple[Tensor, ...]:
        """What was added."""
        return tuple(column[: self._filled] for column in self._columns)

    def _allocate(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        shapes = [(self.rows, *feature.shape[1:]) for feature in features]
        size = sum(math.prod(shape) * feature.element_size() for shape, feature in zip(shapes, features, strict=True))
        if size <= self.cache_gib * 2**30:
            return [torch.empty(shape, dtype=feature.dtype) for shape, feature in zip(shapes, features, strict=True)]
        logger.warning(
            "The features of %d images take %.1f GiB, more than cache_gib=%g: they are kept in a temporary file.",
            self.rows,
            size / 2**30,
            self.cache_gib,
        )
        columns = []
        for shape, feature in zip(shapes, features, strict=True):
            with NamedTemporaryFile(prefix="flowood-features-") as file:  # The mapping outlives the name.
                flat = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=feature.dtype)
            columns.append(flat.reshape(shape))
        return columns


def _single(loaders: list[Any], what: str) -> Any:
    if len(loaders) == 1 and hasattr(loaders[0], "dataset"):
        return loaders[0]
    found = ", ".join(type(loader).__name__ for loader in loaders) or "none"
    msg = f"A detector on a frozen backbone takes one DataLoader of {what} images, got {found}."
    raise ValueError(msg)


def _is_random(transform: Any) -> bool:
    """Whether a transform may give another image from one epoch to the next."""
    if transform is None or isinstance(transform, _DETERMINISTIC):
        return False
    if isinstance(transform, v2.Compose):
        return any(_is_random(part) for part in transform.transforms)
    return True
