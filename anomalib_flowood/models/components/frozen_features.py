# SPDX-License-Identifier: Apache-2.0
"""Frozen features, extracted once per fit instead of once per epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sized
from functools import partial
from typing import Any, ClassVar, cast

import torch
from anomalib.data import Batch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from anomalib_flowood import processes
from anomalib_flowood.flows import draw
from anomalib_flowood.flows.rows import AT_ONCE
from anomalib_flowood.trainers import callbacks_of, train_on, training_loaders, validate_on, validation_loaders

from . import rotations
from .flow_module import FlowModule
from .pre_processor import check_given, default_pre_processor, tell_of_other_normalisation
from .stored_features import FeatureBatch, FeatureDataset, FeatureStore, feature_loader

logger = logging.getLogger(__name__)

_PREPARED = 2**22
"""The most numbers that are prepared at a time: 16 MiB."""

_DETERMINISTIC = (v2.Resize, v2.CenterCrop, v2.Pad, v2.Normalize, v2.Grayscale, v2.ToDtype, v2.ToImage, v2.Identity)


class ImagesOnly(Callback):
    """Calls a pre-processor for batches of images, and not for those of stored features.

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


class FrozenFeatures(FlowModule):
    """Mixin for detectors on a frozen backbone, to the left of :class:`FlowModule`.

    When a fit starts, the backbone sees every training and validation image once, in the order of the data set;
    several processes share the work, and each gets the features of all images. The detector fits what it needs to the
    features (:meth:`fit_features`), and the trainer's loaders are replaced by loaders of the stored features. With
    random training augmentations, features are extracted anew in every epoch.

    If there are few training images (:attr:`few_images`), the backbone also sees copies turned by 180°, and by 90° and
    270° if images are square. They count as further training images where they are as near to the others as the images
    themselves (:func:`~.rotations.turns_that_fit`), as for parts without a fixed orientation. Of 128 images or more, a
    sample is turned first, and turns that clearly do not fit are dropped.

    Stored features lie in main memory, whatever the device of the detector. Computations on them run on that device,
    some rows at a time: torch models move features to their own device and precision.

    The detector implements :meth:`extract`, :meth:`fit_features` and :meth:`prepare_features`.
    """

    model: Any
    """With the methods ``extract`` and ``prepare``, unless the detector has :meth:`extract` and so on itself."""
    cache_gib: float = 2.0
    """Memory for all stored features, in GiB; what does not fit goes to a temporary file."""
    reference_images: ClassVar[int] = 0
    """The most images whose features :meth:`keep_reference` gets where features are not stored; 0 for none at all."""
    least_images: ClassVar[int] = 2
    """The fewest training images that can be fitted to."""

    may_change = FlowModule.may_change | {"rotations"}
    configure_pre_processor = staticmethod(default_pre_processor)

    rotations: bool = True
    """Whether turned copies are tried if training images are few."""
    few_images: ClassVar[int] = 500
    """The most images that turned copies are tried for: more gain little by them, and take long."""

    _kept_gib: float = 0.0
    """The part of it that the training features take."""

    def epoch_steps(self, images: int) -> int | None:
        """Return the steps of an epoch that draws images with replacement; ``None`` to see each image once."""
        del images
        return None

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the features of pre-processed images; one row per image."""
        return self.model.extract(images)

    def extract_training(self, images: Tensor, batch: int, total: int) -> tuple[Tensor, ...]:
        """Return the features of training images that are to be stored: a detector may store only some.

        Args:
            images: A batch of pre-processed images.
            batch: Its number.
            total: Number of training images.
        """
        del batch, total
        return self.extract(images)

    def fit_features(self, features: tuple[Tensor, ...], copies: int = 1) -> None:
        """Fit what comes before the flow.

        Args:
            features: Those of all training images, in main memory or a file.
            copies: Rows of each image, one after the other: itself, and turned copies of it.
        """
        raise NotImplementedError

    def prepare_features(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Turn features, on any device, into the flow's inputs, once and not at every step."""
        return self.model.prepare(features)

    def prepare_training(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same for training images, which a detector may store differently."""
        return self.prepare_features(features)

    def keep_reference(self, features: tuple[Tensor, ...], copies: int) -> None:
        """Keep prepared features of training images for what is fitted after the flow has been trained.

        It is called when a fit begins, and when it is resumed. With random augmentations the features are those of
        ``reference_images`` images at most.

        Args:
            features: In main memory or a file, rows as for :meth:`fit_features`.
            copies: Rows of each image.
        """

    def takes_default(self, pre_processor: Any) -> bool:
        """Whether images are pre-processed as the backbone wants: neither the user nor a subclass says otherwise.

        Args:
            pre_processor: The argument of the detector.
        """
        return pre_processor is True and type(self).configure_pre_processor is default_pre_processor

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's callbacks, with the pre-processor kept away from stored features."""
        callbacks = super().configure_callbacks()
        return [ImagesOnly(callback) if callback is self.pre_processor else callback for callback in callbacks]

    def begin_fit(self) -> None:
        """Extract, fit, and train on what was stored."""
        super().begin_fit()
        transform = getattr(self.pre_processor, "transform", None)
        tell_of_other_normalisation(transform, getattr(self.model, "backbone", None))
        self._train_on_stored()
        self._validate_on_stored()

    def _train_on_stored(self) -> None:
        trainer: Trainer = self.trainer
        count = self.reference_images
        loader = _single(training_loaders(trainer), "training")
        self.check_number(len(loader.dataset))
        anew = trainer.ckpt_path is None  # A resumed fit goes on with what its checkpoint brought.
        random = _is_random(getattr(loader.dataset, "augmentations", None))
        if random:
            logger.warning("Training augmentations are on: the backbone extracts features anew in every epoch.")
        if random and not anew and not count:
            return
        self._kept_gib = 0.0
        turns = 1 if random else self._turns_to_try(loader)
        extracted, labels, _ = self._extract_all(loader, trainer.limit_train_batches, "training", turns)
        features, copies = self._with_turns_that_fit(extracted.features, turns)
        if anew:
            self.fit_features(features, copies)
        if random and not count:
            return
        if random:
            reference = draw(len(features[0]), count)
            features = tuple(part[reference] for part in features)
        store = self._prepare_all(self.prepare_training, features, self.cache_gib - extracted.taken_gib)
        prepared = store.features
        if count:
            self.keep_reference(prepared, copies)
        if not random:
            self._kept_gib = store.taken_gib
            dataset = FeatureDataset(prepared, None if labels is None else labels.repeat_interleave(copies))
            batch_size, steps = processes.batch_size_of(loader), self.epoch_steps(len(dataset))
            train_on(trainer, feature_loader(dataset, batch_size, shuffle=True, batches=steps))

    def _turns_to_try(self, loader: DataLoader) -> int:
        """Return in how many rotations the backbone is to see each training image: 1, 2 or 4."""
        images = len(cast("Sized", loader.dataset))
        if not self.rotations or images > self.few_images:
            return 1
        height, width = self.input_size or (0, 1)
        turns = 4 if height == width else 2
        if images < turns * rotations.SAMPLE:
            return turns
        # A few images show most turns that do not fit, which saves turning the others.
        few = Subset(loader.dataset, draw(images, rotations.SAMPLE).tolist())
        sample = DataLoader(few, batch_size=rotations.SAMPLE // 4, collate_fn=loader.collate_fn)
        features = self._extract_all(sample, 1.0, "sampled training", turns)[0].features
        tried, aurocs = rotations.turns_that_fit(features, turns, rotations.SURE)
        if tried < turns:
            _report(aurocs, rotations.SURE, f"Measured on {len(few)} of them; {_rotations(tried)} will be tried.")
        return tried

    def _with_turns_that_fit(self, features: tuple[Tensor, ...], turns: int) -> tuple[tuple[Tensor, ...], int]:
        """Drop the turned copies that do not look normal; also return how many rows each image has left."""
        if turns == 1:
            return features, 1
        kept, aurocs = rotations.turns_that_fit(features, turns, rotations.LIMIT)
        _report(aurocs, rotations.LIMIT, f"Each is fitted to in {_rotations(kept)}.")
        return rotations.first_turns(features, turns, kept), kept

    def check_number(self, images: int) -> None:
        """Refuse too few training images before the backbone has seen any.

        Args:
            images: Their number, without those that are held out.

        Raises:
            ValueError: If there are too few.
        """
        if images < self.least_images:
            have = "there is 1" if images == 1 else f"there are {images}"
            msg = (
                f"{type(self).__name__} is fitted to at least {self.least_images} images, and {have} besides those "
                "that are held out for validation. 40 and more are better."
            )
            raise ValueError(msg)

    def _validate_on_stored(self) -> None:
        trainer: Trainer = self.trainer
        loaders = validation_loaders(trainer)
        if not loaders:
            return
        loader = _single(loaders, "validation")
        extracted, labels, masks = self._extract_all(loader, trainer.limit_val_batches, "validation")
        room = self.cache_gib - self._kept_gib - extracted.taken_gib
        samples = getattr(loader.dataset, "samples", None)  # anomalib's table
        paths = None if samples is None else getattr(samples, "image_path", None)
        prepared = self._prepare_all(self.prepare_features, extracted.features, room).features
        dataset = FeatureDataset(prepared, labels, None if paths is None else list(paths), masks)
        validate_on(trainer, feature_loader(dataset, processes.batch_size_of(loader), shuffle=False))

    def inputs_of(self, batch: Any) -> tuple[Tensor, ...]:
        """Return the prepared features of a batch, stored or of images."""
        if isinstance(batch, FeatureBatch):
            return batch.features
        with torch.no_grad():
            return self.prepare_features(self.extract(batch.image))

    @torch.no_grad()
    def _extract_all(
        self, loader: DataLoader, limit: float, what: str, turns: int = 1
    ) -> tuple[FeatureStore, Tensor | None, Tensor | None]:
        """Extract the features of all images; also return labels, and masks of validation images, if there are any."""
        trainer: Trainer = self.trainer
        training = self.training
        self.eval()
        # A limit that is a fraction is applied by Lightning, to the loader of stored features.
        own, counts = processes.shares(loader, limit if isinstance(limit, int) else None, self.images_at_once == 1)
        total = len(counts)
        images = sum(sum(of_one) for of_one in processes.gathered_objects(counts))
        store = FeatureStore(turns * images, self.cache_gib - self._kept_gib)
        labels: list[Tensor | None] = []
        masks: list[Tensor | None] = []
        batches: Iterable[Batch] = own
        watchers = [watch for callback in callbacks_of(trainer) if (watch := getattr(callback, "on_extract", None))]
        if trainer.progress_bar_callback is not None and trainer.is_global_zero:
            batches = track(batches, f"Extracting {what} features", total=total)
        for number, (count, batch) in enumerate(zip(counts, batches, strict=True)):
            for watch in watchers:
                watch(what, number, total)
            check_given(self.pre_processor, batch)
            batch = trainer.strategy.batch_to_device(batch)
            image, mask = batch.image, batch.gt_mask if what == "validation" else None
            transform = getattr(self.pre_processor, "transform", None)
            if transform is not None:
                image, mask = transform(image, mask)
            extract = partial(self.extract_training, batch=number, total=images) if what == "training" else self.extract
            features = rotations.together([extract(turned) for turned in rotations.turned(image, turns)])
            _check_finite(features, turns, batch, what)
            store.append(tuple(processes.gathered(part[: turns * count]) for part in features))
            labels.append(_of_all(batch.gt_label, count))
            masks.append(_of_all(mask, count))
        self.train(training)
        if not labels:
            msg = f"There are no {what} images to extract features from."
            raise ValueError(msg)
        return store, _joined(labels), _joined(masks)

    @torch.no_grad()
    def _prepare_all(
        self, prepare: Callable[..., tuple[Tensor, ...]], features: tuple[Tensor, ...], room_gib: float
    ) -> FeatureStore:
        store = FeatureStore(len(features[0]), room_gib)
        # Large batches if rows are short, since each batch reads the statistics of all kinds of image.
        numbers = sum(feature[0].numel() for feature in features)
        at_once = 1 if self.images_at_once == 1 else min(max(64, _PREPARED // numbers), AT_ONCE)  # 1: many tiles
        for rows in zip(*(feature.split(at_once) for feature in features), strict=True):
            store.append(prepare(rows))
        return store


def _of_all(known: Tensor | None, count: int) -> Tensor | None:
    """Gather labels or masks of a batch's first images from all processes."""
    return None if known is None else processes.gathered(known[:count].to(torch.uint8)).bool().cpu()


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Join the labels or masks of batches, if all of them have some."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _report(aurocs: list[float], limit: float, consequence: str) -> None:
    """Log how turned images compare, and what follows from it."""
    if not processes.rank():
        logger.info(
            "Turned by %s, training images are farther from the nearest other one with AUROC %s: 0.50 is no "
            "difference, %.2f the limit. %s",
            ", ".join(f"{90 * quarters}°" for quarters in rotations.QUARTERS[1 : len(aurocs)]),
            ", ".join(f"{auroc:.2f}" for auroc in aurocs[1:]),
            limit,
            consequence,
        )


def _rotations(count: int) -> str:
    return f"{count} rotation{'s' if count > 1 else ''}"


def _check_finite(features: tuple[Tensor, ...], turns: int, batch: Any, what: str) -> None:
    finite = torch.stack([torch.isfinite(part).flatten(1).all(1) for part in features]).all(0)
    finite = finite.unflatten(0, (-1, turns)).all(1)
    if bool(finite.all()):
        return
    broken = (~finite).nonzero().flatten().tolist()
    paths = batch.image_path
    named = ", ".join(paths[place] for place in broken[:3]) if paths else f"numbers {broken[:3]} of a batch"
    msg = (
        f"The backbone gives NaN or infinite features for {len(broken)} of {len(finite)} {what} images ({named}): are "
        "its weights whole? `flowood backbone` fetches them anew."
    )
    raise ValueError(msg)


def _single(loaders: list[Any], what: str) -> Any:
    if len(loaders) == 1 and isinstance(getattr(loaders[0], "dataset", None), Sized):
        return loaders[0]
    found = ", ".join(_described(loader) for loader in loaders) or "none"
    msg = f"A detector on a frozen backbone takes one DataLoader of {what} images that can be counted, got {found}."
    raise ValueError(msg)


def _described(loader: Any) -> str:
    """Name a loader's class, and that of a data set that has no length."""
    kind, data_set = type(loader).__name__, getattr(loader, "dataset", None)
    return kind if data_set is None or isinstance(data_set, Sized) else f"{kind} of {type(data_set).__name__}"


def _is_random(transform: Any) -> bool:
    """Whether a transform may change from one epoch to the next."""
    if transform is None or isinstance(transform, _DETERMINISTIC):
        return False
    if isinstance(transform, v2.Compose):
        return any(_is_random(part) for part in transform.transforms)
    return True
