# SPDX-License-Identifier: Apache-2.0
"""The data module of one-class anomaly detection."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName, Split
from torchvision.transforms.v2 import Transform

from anomalib_flowood.data.datamodules.base import SourcedDataModule, folder_name
from anomalib_flowood.data.datamodules.normal_class import found_class, named_class, refuse_products
from anomalib_flowood.data.datamodules.splits import limited, mixed
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.masks import with_masks
from anomalib_flowood.data.sources import DATA_SETS, FolderSource, find_sources, what_folders_hold
from anomalib_flowood.names import lists_names

logger = logging.getLogger(__name__)


@lists_names(data_sets=DATA_SETS, layouts=what_folders_hold())
class OneClass(SourcedDataModule, AnomalibDataModule):
    """Train on one class of a data set and distinguish its test images from those of the other classes.

    * training and validation: the normal class in the training split;
    * test: the whole test split, the normal class with label 0 and all others with label 1, mixed evenly; with the
      masks of a folder in ``ground_truth/KIND/NAME.png`` or ``NAME_mask.png``, as in MVTec AD.

    Each image's ``source`` is the name of its class.

    Args:
        dataset: A data set with classes: {data_sets}, or a folder of {layouts}, with labels, or with a sub-folder per
            class, below ``train/`` and ``test/`` or directly.
        normal_class: Name of the normal class, or its label (for a folder: its index among the sorted class names). It
            need not be given for a folder whose training images have one class or none, or a class ``good``,
            ``normal`` or ``ok``.
        root: Folder for the files of data sets that are given by name. A bare word that is no name and no folder here
            is looked for in it.
        train_limit: The most images to take from the normal class, validation included. For one seed, the images of a
            smaller limit are among those of a larger one.
        test_limit: The most test images to take from each class, likewise.
        test_split_ratio: Share of the normal images of a folder without ``train/`` and ``test/`` that becomes its test
            split, beside all images of other classes.
        val_split_ratio: Share of the training images that is held out for validation. By default a tenth; of fewer than
            200 images 20, as many as labels at the default level take, but at most a quarter; none if a folder has
            normal images in ``validation/`` or ``val/`` beside ``train/``, which are used then. See docs/decisions.md.
        memory_limit_mib: Image files of one size are kept in memory up to this total, in MiB; all others are read from
            the disk when they are needed.
        max_value: The value of white in files of 16 bits: 4095 if a camera of 12 bits wrote them. By default the
            largest value of the training images, rounded up to 255, 1023, 4095, 16383 or 65535; checkpoints of this
            package's detectors hold it, for tests and predictions. See docs/images.md.
        train_batch_size: Images in a training batch.
        eval_batch_size: Images in a validation or test batch.
        num_workers: Worker processes. Images in memory need none; without any, files are read in up to four threads.
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
        normal_class: int | str | None = None,
        root: str | Path = "./datasets",
        train_limit: int | None = None,
        test_limit: int | None = None,
        test_split_ratio: float = 0.2,
        val_split_ratio: float | None = None,
        memory_limit_mib: int = 512,
        max_value: int | None = None,
        train_batch_size: int = 128,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root=root,
            train_limit=train_limit,
            test_limit=test_limit,
            test_split_ratio=test_split_ratio,
            val_split_ratio=val_split_ratio,
            memory_limit_mib=memory_limit_mib,
            max_value=max_value,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            seed=seed,
        )
        self.dataset = dataset
        self.normal_class = normal_class
        self._sources = find_sources([dataset], root, [test_split_ratio], seed)
        (source,) = self._sources
        if normal_class is None and not isinstance(source, FolderSource):
            msg = f"Which class of {source.name} is normal? Give its name or its label as normal_class."
            raise ValueError(msg)
        self._category = folder_name(source.name, *([] if normal_class is None else [str(normal_class)]))

    def _setup(self, _stage: str | None = None) -> None:
        if self.trainer is None:  # set up by hand: a trainer would have prepared the data before
            self.prepare_data()
        (source,) = self._sources
        normal, train, test = self._read_splits()
        assert train.classes is not None  # the normal one is among them
        classes = test.classes
        assert classes is not None
        rows = np.flatnonzero(train.classes == normal)
        if len(rows) == 0:
            have = ", ".join(sorted(set(train.classes)))
            remedy = f"Classes that have: {have}." if have else "What there is was left for the test: give more images."
            msg = f"The class {normal!r} has no training images in {source.name!r}. {remedy}"
            raise ValueError(msg)
        what = f"class {normal!r} of {source.name}"
        self._hold_out(train, rows, normal, what, _stage, normal)

        labels = np.where(classes == normal, LabelName.NORMAL, LabelName.ABNORMAL)
        if len(set(labels)) == 1:
            lacking = "normal" if labels[0] == LabelName.ABNORMAL else "anomalous"
            logger.warning("The test split of %s has no %s images: AUROC is undefined.", source.name, lacking)
        if isinstance(source, FolderSource):
            test = with_masks(test, source.folder, labels == LabelName.ABNORMAL)
        rows = np.sort(
            np.concatenate(
                [limited(np.flatnonzero(classes == name), self.test_limit, self.seed) for name in set(classes)]
            )
        )
        data = self._dataset(self._in_memory(test.select(rows)), labels[rows], Split.TEST, list(classes[rows]))
        self.test_data = data.subsample(mixed(classes[rows]).tolist(), inplace=True)
        self._is_setup = True

    def _read_splits(self) -> tuple[str, Images, Images]:
        """Name of the normal class; what there is to train on, and to test on."""
        (source,) = self._sources
        train, test = source.read("train"), source.read("test")
        if not isinstance(source, FolderSource):
            return named_class(self.normal_class, train, test), train, test
        if self.normal_class is None:
            normal, train, test = found_class(train, test, source.folder, source.divided)
        else:
            normal = named_class(self.normal_class, train, test)
            refuse_products(source.folder, [normal])
        if source.divided and train.classes is not None and len(set(train.classes)) > 1:
            test = source.read_one_class(normal)
        return normal, train, test
