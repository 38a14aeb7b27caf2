# SPDX-License-Identifier: Apache-2.0
"""Data modules of the contest that neither anomalib nor this package has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset, MVTecAD
from torch.utils.data import DataLoader

from anomalib_flowood import CrossDataset, OneClass
from anomalib_flowood.data import Images
from anomalib_flowood.data.masks import GROUND_TRUTH, pair
from anomalib_flowood.data.sources import Source

from .reading import read_once

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
"""Of files that are images, in small letters."""

HELD_OUT: dict[str, Any] = {"val_split_mode": "from_train", "val_split_ratio": 0.1, "seed": 0, "num_workers": 0}
"""How normal images are held out of an industrial data module's training set."""


class LeftOut(OneClass):
    """All classes of a data set but one, to be told from that one.

    Args:
        dataset: Name of the data set.
        number: Label of the class that is left out.
        arguments: Those of :class:`OneClass`.
    """

    def __init__(self, dataset: str, number: int, **arguments: Any) -> None:
        super().__init__(dataset, "the others", **arguments)
        (source,) = self._sources
        self._sources = [_Relabelled(source, number)]


class _Relabelled:
    """A source with two classes, one of its own and all others."""

    def __init__(self, source: Source, number: int) -> None:
        self.name, self.key, self.prepare = source.name, source.key, source.prepare
        self.source, self.number = source, number

    def read(self, split: str) -> Images:
        images = self.source.read(split)
        names = images.class_names or tuple(np.unique(np.asarray(images.classes, dtype=str)))
        left_out = names[self.number]
        classes = np.where(images.classes == left_out, left_out, "the others").astype(object)
        return replace(images, classes=classes, class_names=())


def industrial_samples(folder: Path) -> pd.DataFrame:
    """List the images of a folder laid out as MVTec AD, as anomalib's data sets want them.

    Masks are ``ground_truth/KIND/NAME.png`` or ``NAME_mask.png`` for the image ``test/KIND/NAME.jpg``. Where there are
    none at all, what the images are for is to be classified.

    Raises:
        FileNotFoundError: If there are no images to fit to, or none of either side to test on.
        ValueError: If some anomalous images have masks, and some have not.
    """
    images = {split: _images(folder, f"{split}/{kinds}") for split, kinds in (("train", "good"), ("test", "*"))}
    normal = sum(path.parent.name == "good" for path in images["test"])
    counts = {"train/good": len(images["train"]), "test/good": normal, "test/KIND": len(images["test"]) - normal}
    for place, count in counts.items():
        if not count:
            msg = f"There are no images in {folder / place}. The folder must be laid out as MVTec AD."
            raise FileNotFoundError(msg)
    masks = _masks(folder, [path for path in images["test"] if path.parent.name != "good"])
    rows = []
    for split, paths in images.items():
        for path in paths:
            kind = path.parent.name
            rows.append((str(folder), split, kind, str(path), int(kind != "good"), masks.get(path, "")))
    samples = pd.DataFrame(rows, columns=["path", "split", "label", "image_path", "label_index", "mask_path"])
    samples.attrs["task"] = TaskType.SEGMENTATION if masks else TaskType.CLASSIFICATION
    return samples


def _masks(folder: Path, images: list[Path]) -> dict[Path, str]:
    """The mask of each anomalous image; none of any where there are none."""
    ground_truth = folder / GROUND_TRUTH
    if not ground_truth.is_dir():
        return {}
    masks, unmatched = pair([path.relative_to(folder / "test") for path in images], ground_truth)
    if not any(masks) and not unmatched:
        return {}
    for path, mask in zip(images, masks, strict=True):
        if not mask:
            wanted = ground_truth / path.parent.name / f"{path.stem}_mask.png"
            msg = f"{path} has no mask, other images of {folder} have: add {wanted}, or take ground_truth away."
            raise ValueError(msg)
    return dict(zip(images, masks, strict=True))


def _images(folder: Path, places: str) -> list[Path]:
    return sorted((path for path in folder.glob(f"{places}/*") if path.suffix.lower() in ENDINGS), key=str)


class IndustrialDataset(AnomalibDataset):
    """Images of a table of samples."""

    def __init__(self, samples: pd.DataFrame) -> None:
        super().__init__()
        self.samples = samples

    def __getitem__(self, index: int) -> Any:
        """Read an image, or have it read before."""
        sample = self.samples.iloc[index]
        key = (self.task, sample.image_path, sample.mask_path, sample.label_index)
        return read_once(key, self.augmentations, partial(super().__getitem__, index))


class IndustrialFolder(MVTecAD):
    """A folder laid out as MVTec AD, with or without masks, whose images may be PNG, JPEG, BMP or TIFF files.

    Args:
        *args: As for anomalib's MVTec AD.
        limit: About the most images to take of either split, spread over it.
        drawn: How many training images to draw; all by default.
        draw: What the generator starts with that draws them.
        **kwargs: As for anomalib's MVTec AD.
    """

    def __init__(
        self, *args: Any, limit: int | None = None, drawn: int | None = None, draw: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.limit, self.drawn, self.draw = limit, drawn, draw

    def prepare_data(self) -> None:
        """Nothing is downloaded."""

    def _setup(self, _stage: str | None = None) -> None:
        samples = industrial_samples(Path(self.root) / self.category)
        self.train_data, self.test_data = (
            IndustrialDataset(samples[samples["split"] == split].reset_index(drop=True)) for split in ("train", "test")
        )
        if self.limit:
            for data in (self.train_data, self.test_data):
                step = max(1, len(data) // self.limit)
                data.subsample(list(range(0, len(data), step)), inplace=True)
        if self.drawn is not None and self.drawn < len(self.train_data):
            chosen = np.random.default_rng(self.draw).choice(len(self.train_data), self.drawn, replace=False)
            self.train_data.subsample(sorted(chosen.tolist()), inplace=True)


class Together(AnomalibDataModule):
    """The normal images of several folders as one class; each folder's test is one of its own, see :meth:`test_of`.

    Args:
        folders: Of each the same images are held out as without the others.
    """

    def __init__(self, folders: Sequence[IndustrialFolder]) -> None:
        first = folders[0]
        super().__init__(
            first.train_batch_size, first.eval_batch_size, first.num_workers, val_split_mode="from_dir", seed=first.seed
        )
        self.folders = folders

    def _setup(self, _stage: str | None = None) -> None:
        for folder in self.folders:
            folder.setup()
        self.train_data, self.val_data, self.test_data = (
            self._joined([getattr(folder, part) for folder in self.folders])
            for part in ("train_data", "val_data", "test_data")
        )

    @staticmethod
    def _joined(parts: Sequence[AnomalibDataset]) -> IndustrialDataset:
        samples = pd.concat([part.samples for part in parts], ignore_index=True)
        samples.attrs["task"] = TaskType.CLASSIFICATION  # some have masks, some have not
        return IndustrialDataset(samples)

    def test_of(self, number: int) -> DataLoader:
        """The test images of one folder, with masks where it has them; after a fit, which brings them to one size."""
        data = copy.copy(self.folders[number].test_data)
        data.augmentations = self.test_data.augmentations
        return DataLoader(data, batch_size=self.eval_batch_size, collate_fn=data.collate_fn)


def with_others(datamodule: Any, other: str) -> DataLoader:
    """The normal test images among as many as 1,000 of another data set, mixed: some scores depend on their batch."""
    outside = CrossDataset(
        other, ["fashion_mnist" if other == "mnist" else "mnist"], root=datamodule.root, test_limit=1000
    )
    outside.prepare_data()
    outside.setup()
    data = outside.test_data
    data = data.subsample(np.flatnonzero(data.samples["label_index"] == 0).tolist())
    data.samples = data.samples.assign(label_index=1, label="abnormal")
    normal = np.flatnonzero(datamodule.test_data.samples["label_index"] == 0).tolist()
    both = datamodule.test_data.subsample(normal) + data
    both.subsample(np.random.default_rng(0).permutation(len(both)).tolist(), inplace=True)
    return DataLoader(both, batch_size=datamodule.eval_batch_size, collate_fn=both.collate_fn)
