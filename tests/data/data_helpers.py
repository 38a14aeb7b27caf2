# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(
    folder: Path,
    train: int = 20,
    test: int = 10,
    size: int = 8,
    classes: int = 2,
    zipped: bool = True,
    labels: bool = True,
) -> Path:
    """A folder of idx files; image i is filled with i, label i is i % classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in {"train": train, "t10k": test}.items():
        number = np.arange(count)
        images = np.broadcast_to(number[:, None, None], (count, size, size))
        arrays = {f"{split}-images-idx3-ubyte": images}
        if labels:
            arrays[f"{split}-labels-idx1-ubyte"] = number % classes
        for name, array in arrays.items():
            content = idx_bytes(np.asarray(array))
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder


def write_images(
    folder: Path, count: int, size: tuple[int, int] = (8, 8), mode: str = "RGB", suffix: str = ".png"
) -> Path:
    """Image files of random pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for i in range(count):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03d}{suffix}")
    return folder


def write_parts(folder: Path, train: int = 6, test: int = 4, **kwargs) -> Path:
    """A folder with train and test, the classes bad and good in each."""
    for split, count in {"train": train, "test": test}.items():
        for label in ("bad", "good"):
            write_images(folder / split / label, count, **kwargs)
    return folder
