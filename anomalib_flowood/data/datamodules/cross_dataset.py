# SPDX-License-Identifier: Apache-2.0
"""The data module of cross-dataset out-of-distribution detection."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName, Split
from torchvision.transforms.v2 import Transform

from anomalib_flowood.data.datamodules.base import SourcedDataModule, folder_name
from anomalib_flowood.data.datamodules.splits import limited, mixed
from anomalib_flowood.data.sources import DATA_SETS, find_sources, what_folders_hold
from anomalib_flowood.metrics.functional import GROUP, INSIDE, MEAN, OUTSIDE
from anomalib_flowood.names import lists_names


@lists_names(data_sets=DATA_SETS, layouts=what_folders_hold())
class CrossDataset(SourcedDataModule, AnomalibDataModule):
    """Train on one data set and distinguish its test images from those of others.

    * training and validation: the training split of the in-distribution data set;
    * test: its test split (label 0) and the test split of each out-of-distribution data set (label 1), mixed evenly,
      so that any run of batches (``trainer.limit_test_batches``) holds both.

    Each image's ``source`` is the name of its data set, or ``near: cifar100`` if that is in a group. A known name
    always means that data set: write ``./mnist`` for a folder of that name.

    Args:
        in_distribution: The normal data set: {data_sets}, or a folder of {layouts}. A folder without ``train/`` and
            ``test/`` is divided by ``test_split_ratio``.
        out_of_distribution: One or more other data sets; or groups of them by name, such as OpenOOD's ``near`` and
            ``far``, whose averages are reported, too. Of a folder without ``train/`` and ``test/`` all images are used.
        root: Folder for the files of data sets that are given by name. A bare word that is no name and no folder here
            is looked for in it.
        train_limit: The most images to take from the training split, validation included. For one seed, the images of
            a smaller limit are among those of a larger one.
        test_limit: The most test images to take from each data set, likewise.
        test_split_ratio: Share of a folder without ``train/`` and ``test/`` that becomes its test split.
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
        ValueError: If a limit or ratio is out of range, a name is unknown, a data set is named twice, or a group cannot
            be called so.

    Example:
        >>> from anomalib_flowood.data import CrossDataset
        >>> datamodule = CrossDataset("fashion_mnist", ["mnist", "kmnist"])
        >>> datamodule.category
        'fashion_mnist-mnist+kmnist'
    """

    def __init__(
        self,
        in_distribution: str | Path,
        out_of_distribution: dict[str, list[str | Path]] | list[str | Path] | str | Path,
        root: str | Path = "./datasets",
        train_limit: int | None = None,
        test_limit: int | None = None,
        test_split_ratio: float = 0.2,
        val_split_ratio: float | None = None,
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
        grouped = grouped_sets(out_of_distribution)
        others = [name for _, name in grouped]
        if not others:
            msg = "out_of_distribution names no data set: at least one is needed."
            raise ValueError(msg)
        self.in_distribution = in_distribution
        self.out_of_distribution = others
        self._groups = [group for group, _ in grouped]
        held_out = [test_split_ratio] + [1.0] * len(others)
        self._sources = find_sources([in_distribution, *others], root, held_out, seed)
        keys = [source.key for source in self._sources]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                where = "in_distribution and out_of_distribution" if key == keys[0] else "out_of_distribution"
                msg = f"{where} name {key} twice: the data sets have to differ."
                raise ValueError(msg)
        self._category = folder_name(*[source.name for source in self._sources])

    def _setup(self, _stage: str | None = None) -> None:
        if self.trainer is None:  # set up by hand: a trainer would have prepared the data before
            self.prepare_data()
        normal, *others = self._sources
        train = normal.read("train")
        self._hold_out(train, np.arange(len(train)), normal.name, normal.name, _stage)
        parts = []
        for source, group in zip([normal, *others], ["", *self._groups], strict=True):
            images = source.read("test")
            rows = limited(np.arange(len(images)), self.test_limit, self.seed)
            parts.append(
                self._dataset(
                    self._in_memory(images.select(rows)),
                    LabelName.NORMAL if source is normal else LabelName.ABNORMAL,
                    Split.TEST,
                    f"{group}{GROUP}{source.name}" if group else source.name,
                )
            )
        test = parts[0]
        for part in parts[1:]:
            test += part
        self.test_data = test.subsample(mixed(test.samples["source"].tolist()).tolist(), inplace=True)
        self._is_setup = True


def grouped_sets(given: Mapping[str, list[str | Path]] | list[str | Path] | str | Path) -> list[tuple[str, str | Path]]:
    """Return what ``out_of_distribution`` names, each data set with its group, empty where there is none.

    Raises:
        ValueError: If a group has no name, that of an average, or one with ``": "`` in it; or if it is empty.
    """
    if isinstance(given, str | Path):
        return [("", given)]
    if not isinstance(given, Mapping):
        return [("", name) for name in given]
    for group, names in given.items():
        if not group or group in {MEAN, INSIDE, OUTSIDE} or GROUP in group or "/" in group:
            msg = f"A group of out_of_distribution cannot be called {group!r}: call it, say, near or far."
            raise ValueError(msg)
        if not names:
            msg = f"The group {group!r} of out_of_distribution names no data set: at least one is needed."
            raise ValueError(msg)
    return [(group, name) for group, names in given.items() for _, name in grouped_sets(names)]
