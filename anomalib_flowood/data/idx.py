# SPDX-License-Identifier: Apache-2.0
"""Files of the idx format, as MNIST has them."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anomalib_flowood.data.images import Images

_MOST_BYTES = 2**32
"""The largest file that is read; MNIST's has 47 million."""


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of bytes, compressed if it ends in ``.gz``: an array of the shape that it states, ``uint8``.

    Raises:
        ValueError: If the file is not an idx file of bytes, damaged or cut short, with its path.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            sizes = file.read(4 * head[3]) if len(head) == 4 else b""
            # Two zero bytes, the type (8: unsigned byte), the number of dimensions, then each dimension as 4 bytes.
            if head[:3] != b"\x00\x00\x08" or len(head) < 4 or len(sizes) < 4 * head[3]:
                msg = f"{path} is not an idx file of bytes: it starts with {head.hex(' ') or 'nothing'}."
                raise ValueError(msg)
            shape = tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))
            expected = math.prod(shape)
            if expected > _MOST_BYTES:
                msg = f"{path} announces {expected:,} values; up to {_MOST_BYTES:,} are read into memory."
                raise ValueError(msg)
            content = bytearray(file.read(expected))
            more = bool(file.read(1))  # and no further: a small file may inflate to more than there is memory
    except (OSError, EOFError, zlib.error) as error:
        msg = f"Cannot read {path}: {error}"
        raise ValueError(msg) from error
    if more or len(content) != expected:
        holds = "more" if more else f"{len(content):,}"
        msg = f"{path} is damaged: its header announces {expected:,} values, it holds {holds}."
        raise ValueError(msg)
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def find_idx(folder: Path, split: str, kind: str) -> Path | None:
    """Find the idx file with a split's ``"images"`` or ``"labels"`` under any of the names in use, if it is there."""
    stem = f"{'train' if split == 'train' else 't10k'}-{kind}"
    dimensions = 3 if kind == "images" else 1
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = folder / f"{stem}{separator}idx{dimensions}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def read_idx_split(folder: Path, name: str, split: str, class_names: Sequence[str] = ()) -> Images:
    """Read images and, where they are there, labels.

    Args:
        folder: Where the files are.
        name: Name of the data set.
        split: ``"train"`` or ``"test"``.
        class_names: Names of the classes in the order of their labels; the labels themselves by default.

    Returns:
        The images.

    Raises:
        FileNotFoundError: If the folder has no images of that split.
        ValueError: If a file is damaged, or images and labels do not match, with its path.
    """
    path = find_idx(folder, split, "images")
    if path is None:
        msg = f"There are no {split} images among the idx files in {folder}."
        raise FileNotFoundError(msg)
    pixels = read_idx(path)
    if pixels.ndim != 3 or 0 in pixels.shape:
        msg = f"{path} should hold images (count, height, width), its shape is {pixels.shape}."
        raise ValueError(msg)
    label_path = find_idx(folder, split, "labels")
    if label_path is None:
        return Images.from_array(name, split, pixels)
    labels = read_idx(label_path)
    if labels.shape != pixels.shape[:1]:
        msg = f"{label_path} should hold {len(pixels):,} labels, one per image; its shape is {labels.shape}."
        raise ValueError(msg)
    return Images.from_array(name, split, pixels, labels, class_names)
