# SPDX-License-Identifier: Apache-2.0
"""Data modules of the contest that neither anomalib nor this package has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
from anomalib.data import MVTecAD
from anomalib.data.datasets.image import mvtecad
from torch.utils.data import DataLoader

from anomalib_flowood import CrossDataset, OneClass
from anomalib_flowood.data import Images
from anomalib_flowood.data.sources import Source

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


class IndustrialFolder(MVTecAD):
    """A folder laid out as MVTec AD, whose images may be PNG, JPEG, BMP or TIFF files."""

    def __init__(self, *args: Any, limit: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit = limit

    def prepare_data(self) -> None:
        """Nothing is downloaded."""

    def _setup(self, _stage: str | None = None) -> None:
        endings = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
        with patch.object(mvtecad, "IMG_EXTENSIONS", (*endings, *map(str.upper, endings))):
            super()._setup(_stage)
        if self.limit:
            for data in (self.train_data, self.test_data):
                step = max(1, len(data) // self.limit)
                data.subsample(list(range(0, len(data), step)), inplace=True)


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
