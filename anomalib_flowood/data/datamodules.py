# SPDX-License-Identifier: Apache-2.0
"""Data modules for cross-dataset out-of-distribution detection and for one-class anomaly detection."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName, Split, ValSplitMode
from lightning.pytorch.trainer.states import TrainerFn
from torchvision.transforms.v2 import Transform

from anomalib_flowood.data.datasets import SourcedDataset
from anomalib_flowood.data.decoding import plain_max_value
from anomalib_flowood.data.sources import Images, Source, find_sources
from anomalib_flowood.names import unknown_name

logger = logging.getLogger(__name__)


class _ReadsSources:
    """What both data modules share: their sources, what memory they take, what white is in files of 16 bits."""

    max_value: int | None
    memory_limit_mib: int
    trainer: Any
    _sources: list[Source]
    _is_setup: bool
    _given_max_value: int | None
    _memory_left: float

    def prepare_data(self) -> None:
        """Download what is missing.

        Raises:
            FileNotFoundError: If a data set is neither on this machine nor to be had, with what helps.
        """
        if not self._is_setup:
            for position, source in enumerate(self._sources):
                source.prepare(["train", "test"] if position == 0 else ["test"])

    def _create_test_split(self) -> None:
        """Leave the test split as it is: anomalib would take the normal images out of it."""

    def read_for(self, max_value: int | None) -> None:
        """Read 16 bits as a detector's training images were read, unless the data module was told otherwise.

        Args:
            max_value: The detector's: what white was in the files of 16 bits that it was trained on, if any.
        """
        if max_value == self.max_value:
            return
        if self._given_max_value is not None:
            logger.warning(
                "The detector was trained with max_value %s, and the data module has %s: taking the latter.",
                max_value,
                self._given_max_value,
            )
            return
        self.max_value = max_value
        for part in ("train_data", "val_data", "test_data"):
            if hasattr(self, part):
                getattr(self, part).read_for(max_value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: ``max_value``."""
        return {"max_value": self.max_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read as the training images of a checkpoint were read, by any detector."""
        self.read_for(state_dict["max_value"])

    def _begin_reading(self, training: Images, stage: str | None) -> None:
        """Find out what white is in files of 16 bits: as given, as the detector has it, as the training files show."""
        self._memory_left = 0 if stage == TrainerFn.PREDICTING else self.memory_limit_mib  # each is read just once
        detector: Any = None if stage == TrainerFn.FITTING else getattr(self.trainer, "lightning_module", None)
        if self._given_max_value is not None:
            return
        if hasattr(detector, "max_value"):
            self.max_value = detector.max_value
        elif training.pixels is None:
            self.max_value = plain_max_value(training.paths)
            if self.max_value is not None:
                logger.info(
                    "Files of 16 bits: white is taken to be %d, from the training images (max_value).", self.max_value
                )

    def _in_memory(self, images: Images) -> Images:
        """Keep files in memory if all splits together stay within the limit."""
        kept = replace(images, max_value=self.max_value).in_memory(self._memory_left)
        if images.pixels is None and kept.pixels is not None:
            self._memory_left -= kept.pixels.numel() / 2**20
        return kept


class CrossDataset(_ReadsSources, AnomalibDataModule):
    """Train on one data set and tell its test images from those of others.

    * training and validation: the training split of the in-distribution data set;
    * test: its test split (label 0) and the test split of each out-of-distribution data set (label 1), mixed evenly,
      so that any run of batches (``trainer.limit_test_batches``) holds both.

    Each image's ``source`` is the name of its data set. A data set is a name (``fashion_mnist``, ``mnist``,
    ``kmnist``, ``emnist``, ``usps``, ``cifar10``, ``cifar100``, ``svhn``, ``stl10``, ``celeba``, ``dtd``,
    ``flowers102``, ``food101``), a folder of images or a folder of idx files. A known name always means that data set:
    write ``./mnist`` for a folder of that name.

    Args:
        in_distribution: The normal data set. A folder without ``train/`` and ``test/`` is divided by
            ``test_split_ratio``.
        out_of_distribution: One or more other data sets. Of a folder without ``train/`` and ``test/`` all images are
            used.
        root: Folder for the files of data sets that are given by name. A bare word that is no name and no folder here
            is looked for in it.
        train_limit: The most images to take from the training split, validation included. For one seed, the images of
            a smaller limit are among those of a larger one.
        test_limit: The most test images to take from each data set, likewise.
        test_split_ratio: Share of a folder without ``train/`` and ``test/`` that becomes its test split.
        val_split_ratio: Share of the training images that is held out for validation.
        memory_limit_mib: Image files of one size are kept in memory as long as all that are kept take no more than
            this, in MiB; all others are read from the disk when they are needed.
        max_value: What white is in files of 16 bits: 4095 if a camera of 12 bits wrote them. By default the largest
            value of the training images, rounded up to 255, 1023, 4095, 16383 or 65535; detectors of this package keep
            it in their checkpoints, and test and predict by it. See docs/images.md.
        train_batch_size: Images in a training batch.
        eval_batch_size: Images in a validation or test batch.
        num_workers: Worker processes. Images in memory need none.
        train_augmentations: Augmentations of the training images.
        val_augmentations: Augmentations of the validation images.
        test_augmentations: Augmentations of the test images.
        augmentations: Augmentations of all images for which none are given above.
        seed: Seed of all splits and limits.

    Raises:
        ValueError: If a limit or ratio is out of range, a name is unknown or a data set is named twice.

    Example:
        >>> from anomalib_flowood.data import CrossDataset
        >>> datamodule = CrossDataset("fashion_mnist", ["mnist", "kmnist"])
        >>> datamodule.category
        'fashion_mnist-mnist+kmnist'
    """

    def __init__(
        self,
        in_distribution: str | Path,
        out_of_distribution: list[str | Path] | str | Path,
        root: str | Path = "./datasets",
        train_limit: int | None = None,
        test_limit: int | None = None,
        test_split_ratio: float = 0.2,
        val_split_ratio: float = 0.1,
        memory_limit_mib: int = 512,
        max_value: int | None = None,
        train_batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=ValSplitMode.FROM_DIR,  # anomalib's word for "there is one already"
            val_split_ratio=val_split_ratio,
            test_split_ratio=test_split_ratio,
            seed=seed,
        )
        _check_ranges(train_limit, test_limit, memory_limit_mib, max_value, val_split_ratio, test_split_ratio)
        others = [out_of_distribution] if isinstance(out_of_distribution, str | Path) else list(out_of_distribution)
        if not others:
            msg = "out_of_distribution names no data set: at least one is needed."
            raise ValueError(msg)
        self.in_distribution = in_distribution
        self.out_of_distribution = others
        self.root = root
        self.train_limit = train_limit
        self.test_limit = test_limit
        self.memory_limit_mib = memory_limit_mib
        self.max_value = self._given_max_value = max_value
        held_out = [test_split_ratio] + [1.0] * len(others)
        self._sources = find_sources([in_distribution, *others], root, held_out, seed)
        keys = [source.key for source in self._sources]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                where = "in_distribution and out_of_distribution" if key == keys[0] else "out_of_distribution"
                msg = f"{where} name {key} twice: the data sets have to differ."
                raise ValueError(msg)
        names = [_slug(source.name) for source in self._sources]
        self._category = f"{names[0]}-{'+'.join(names[1:])}"

    def _setup(self, _stage: str | None = None) -> None:
        if self.trainer is None:  # set up by hand: a trainer would have prepared the data before
            self.prepare_data()
        normal, *others = self._sources
        train = normal.read("train")
        self.train_data, self.val_data = _train_and_val(
            self, _stage, train, np.arange(len(train)), normal.name, normal.name
        )
        parts = []
        for source in [normal, *others]:
            images = source.read("test")
            rows = _limited(np.arange(len(images)), self.test_limit, self.seed)
            parts.append(
                SourcedDataset(
                    self._in_memory(images.select(rows)),
                    label_index=LabelName.NORMAL if source is normal else LabelName.ABNORMAL,
                    split=Split.TEST.value,
                    source=source.name,
                    name=self.name,
                    category=self.category,
                )
            )
        test = parts[0]
        for part in parts[1:]:
            test += part
        self.test_data = test.subsample(_mixed(test.samples["source"].tolist()).tolist(), inplace=True)
        self._is_setup = True


class OneClass(_ReadsSources, AnomalibDataModule):
    """Train on one class of a data set and tell its test images from those of the other classes.

    * training and validation: the normal class in the training split;
    * test: the whole test split, the normal class with label 0 and all others with label 1, mixed evenly.

    Each image's ``source`` is the name of its class.

    Args:
        dataset: A data set with classes: a name, a folder with a sub-folder per class (below ``train/`` and ``test/``
            or directly), or a folder of idx files with labels. See :class:`CrossDataset`.
        normal_class: Name of the normal class, or its label (for a folder: its place among the sorted class names).
        root: Folder for the files of data sets that are given by name. A bare word that is no name and no folder here
            is looked for in it.
        train_limit: The most images to take from the normal class, validation included. For one seed, the images of a
            smaller limit are among those of a larger one.
        test_limit: The most test images to take from each class, likewise.
        test_split_ratio: Share of a folder without ``train/`` and ``test/`` that becomes its test split, class by
            class.
        val_split_ratio: Share of the training images that is held out for validation.
        memory_limit_mib: Image files of one size are kept in memory as long as all that are kept take no more than
            this, in MiB; all others are read from the disk when they are needed.
        max_value: What white is in files of 16 bits: 4095 if a camera of 12 bits wrote them. By default the largest
            value of the training images, rounded up to 255, 1023, 4095, 16383 or 65535; detectors of this package keep
            it in their checkpoints, and test and predict by it. See docs/images.md.
        train_batch_size: Images in a training batch.
        eval_batch_size: Images in a validation or test batch.
        num_workers: Worker processes. Images in memory need none.
        train_augmentations: Augmentations of the training images.
        val_augmentations: Augmentations of the validation images.
        test_augmentations: Augmentations of the test images.
        augmentations: Augmentations of all images for which none are given above.
        seed: Seed of all splits and limits.

    Raises:
        ValueError: If a limit or ratio is out of range or the data set's name is unknown.

    Example:
        >>> from anomalib_flowood.data import OneClass
        >>> datamodule = OneClass("fashion_mnist", normal_class=3)
        >>> datamodule.category
        'fashion_mnist-3'
    """

    def __init__(
        self,
        dataset: str | Path,
        normal_class: int | str,
        root: str | Path = "./datasets",
        train_limit: int | None = None,
        test_limit: int | None = None,
        test_split_ratio: float = 0.2,
        val_split_ratio: float = 0.1,
        memory_limit_mib: int = 512,
        max_value: int | None = None,
        train_batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=ValSplitMode.FROM_DIR,  # anomalib's word for "there is one already"
            val_split_ratio=val_split_ratio,
            test_split_ratio=test_split_ratio,
            seed=seed,
        )
        _check_ranges(train_limit, test_limit, memory_limit_mib, max_value, val_split_ratio, test_split_ratio)
        self.dataset = dataset
        self.normal_class = normal_class
        self.root = root
        self.train_limit = train_limit
        self.test_limit = test_limit
        self.memory_limit_mib = memory_limit_mib
        self.max_value = self._given_max_value = max_value
        self._sources = find_sources([dataset], root, [test_split_ratio], seed)
        self._category = f"{_slug(self._sources[0].name)}-{_slug(str(normal_class))}"

    def _setup(self, _stage: str | None = None) -> None:
        if self.trainer is None:  # set up by hand: a trainer would have prepared the data before
            self.prepare_data()
        (source,) = self._sources
        train, test = source.read("train"), source.read("test")
        if train.classes is None or test.classes is None:
            msg = f"The data set {source.name!r} has no classes: OneClass needs labels or a sub-folder per class."
            raise ValueError(msg)
        normal = _class_name(self.normal_class, train, test)
        rows = np.flatnonzero(train.classes == normal)
        if len(rows) == 0:
            classes = ", ".join(sorted(set(train.classes)))
            msg = f"The class {normal!r} has no training images in {source.name!r}. Classes that have: {classes}."
            raise ValueError(msg)
        what = f"class {normal!r} of {source.name}"
        self.train_data, self.val_data = _train_and_val(self, _stage, train, rows, normal, what)

        labels = np.where(test.classes == normal, LabelName.NORMAL, LabelName.ABNORMAL)
        if len(set(labels)) == 1:
            lacking = "normal" if labels[0] == LabelName.ABNORMAL else "anomalous"
            logger.warning("The test split of %s has no %s images: AUROC is undefined.", source.name, lacking)
        rows = np.sort(
            np.concatenate(
                [
                    _limited(np.flatnonzero(test.classes == name), self.test_limit, self.seed)
                    for name in set(test.classes)
                ]
            )
        )
        data = SourcedDataset(
            self._in_memory(test.select(rows)),
            label_index=labels[rows],
            split=Split.TEST.value,
            source=list(test.classes[rows]),
            name=self.name,
            category=self.category,
        )
        self.test_data = data.subsample(_mixed(test.classes[rows]).tolist(), inplace=True)
        self._is_setup = True


def _check_ranges(
    train_limit: int | None,
    test_limit: int | None,
    memory_limit_mib: int,
    max_value: int | None,
    val_ratio: float,
    test_ratio: float,
) -> None:
    """Refuse numbers that cannot work."""
    for name, limit in {"train_limit": train_limit, "test_limit": test_limit, "max_value": max_value}.items():
        if limit is not None and limit < 1:
            default = "as the files show" if name == "max_value" else "for all images"
            msg = f"{name} has to be at least 1 (or None, {default}), got {limit}."
            raise ValueError(msg)
    if memory_limit_mib < 0:
        msg = f"memory_limit_mib cannot be negative, got {memory_limit_mib}."
        raise ValueError(msg)
    for name, ratio in {"val_split_ratio": val_ratio, "test_split_ratio": test_ratio}.items():
        if not 0 < ratio < 1:
            msg = f"{name} has to lie between 0 and 1, got {ratio}."
            raise ValueError(msg)


def _slug(text: str) -> str:
    """Text as part of a folder's name: ``T-shirt/top`` has a slash."""
    return re.sub(r"[^\w.-]+", "_", text)


def _limited(rows: np.ndarray, limit: int | None, seed: int | None) -> np.ndarray:
    """At most ``limit`` of ``rows``, ascending; the choice for a smaller limit is part of that for a larger one."""
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[:limit])


def _train_and_val(
    module: CrossDataset | OneClass, stage: str | None, images: Images, rows: np.ndarray, source: str, what: str
) -> tuple[SourcedDataset, SourcedDataset]:
    """Divide normal images into training and validation; both share one store.

    Validation images come from a part of ``rows`` that does not depend on ``train_limit``: those of one limit are never
    trained on with another.
    """
    count = len(rows) if module.train_limit is None else min(module.train_limit, len(rows))
    if count < 2:
        cause = f"train_limit={module.train_limit}" if len(rows) > 1 else f"the training split has {len(rows)}"
        msg = f"{what} needs at least 2 training images, of which one is for validation, but {cause}."
        raise ValueError(msg)

    def held_out(number: int) -> int:
        return min(max(1, round(module.val_split_ratio * number)), number - 1)

    order = np.random.default_rng(module.seed).permutation(rows)
    val = np.sort(order[: held_out(count)])
    train = np.sort(order[held_out(len(rows)) :][: count - len(val)])
    chosen = np.union1d(train, val)
    store = images.select(chosen)
    module._begin_reading(store, stage)
    store = module._in_memory(store)
    train_data, val_data = (
        SourcedDataset(
            store,
            label_index=LabelName.NORMAL,
            split=split.value,
            rows=np.searchsorted(chosen, part),
            source=source,
            name=module.name,
            category=module.category,
        )
        for split, part in ((Split.TRAIN, train), (Split.VAL, val))
    )
    return train_data, val_data


def _mixed(sources: Sequence[str] | np.ndarray) -> np.ndarray:
    """An order of N positions in which the sources are spread evenly."""
    names, code, counts = np.unique(np.asarray(sources, dtype=str), return_inverse=True, return_counts=True)
    place = np.empty(len(code))
    for number in range(len(names)):
        place[code == number] = (np.arange(counts[number]) + 0.5) / counts[number]
    return np.argsort(place, kind="stable")


def _class_name(normal_class: int | str, train: Images, test: Images) -> str:
    """The class that the user means by a name or a label."""
    known = train.class_names or tuple(sorted({*train.classes, *test.classes}, key=_natural))  # type: ignore[misc]
    text = str(normal_class)
    if text in known:
        return text
    if text.isdecimal() and int(text) < len(known):
        return known[int(text)]
    kind, hint = f"class of {train.name!r}", f"Labels from 0 to {len(known) - 1} work too."
    raise unknown_name(kind, normal_class, known, hint)


def _natural(text: str) -> tuple[int, str]:
    """Sort key under which 2 comes before 10."""
    return len(text) if text.isdecimal() else 0, text
