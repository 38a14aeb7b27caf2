# SPDX-License-Identifier: Apache-2.0
"""Files of the idx format, as MNIST has them."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from anomalib_flowood.data.images import Images, _array_images, _class_of


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
