# SPDX-License-Identifier: Apache-2.0
"""Reads each image of a folder once for each size, whichever detector asks.

A contest's detectors are shown the same images again and again, at the same size. Decoding and resizing them takes
longer than what some detectors do with them. As with the backbone's outputs, what that takes is measured, so that the
time saved can be put back on every detector's account.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torchvision.transforms import v2

from .stores import mapped

CHUNK = 64
"""Images to a file."""


class Reader:
    """Images that were read, in temporary files.

    Args:
        folder: Of the files.
        capacity: The most images to keep; what comes later is read every time.
    """

    def __init__(self, folder: Path = Path(), capacity: int = 5_000) -> None:
        self.folder, self.capacity = folder, capacity
        self.saved = 0.0
        """Seconds that reading would have taken."""
        self._items: dict[tuple, Any] = {}
        self._rooms: dict[tuple, list[torch.Tensor]] = {}
        self._seconds = 0.0
        self._files = 0

    @property
    def seconds_per_image(self) -> float:
        """What an image takes to read, in the mean."""
        return self._seconds / len(self._items) if self._items else 0.0

    def read(self, key: tuple, plain: Callable[[], Any]) -> Any:
        """Return an item as its data set gives it.

        Args:
            key: What tells it from others.
            plain: Reads it.
        """
        known = self._items.get(key)
        if known is not None:
            self.saved += self.seconds_per_image
            return copy.copy(known)
        start = time.perf_counter()
        item = plain()
        if len(self._items) < self.capacity:
            self._seconds += time.perf_counter() - start
            kept = self._room(item.image)
            kept.copy_(item.image)
            item.image = kept.as_subclass(type(item.image))
            self._items[key] = item
        return copy.copy(item)

    def _room(self, image: torch.Tensor) -> torch.Tensor:
        """Return a place for an image."""
        rooms = self._rooms.setdefault((tuple(image.shape), image.dtype), [])
        if not rooms:
            self._files += 1
            rooms += mapped(self.folder / f"{self._files}.bin", (CHUNK, *image.shape), image.dtype)
        return rooms.pop()


_reader: Reader | None = None


@contextmanager
def reading_once() -> Iterator[Reader]:
    """Let data sets of folders read each image once while it is entered."""
    global _reader  # anomalib's data modules make the data sets, and hand nothing through
    with TemporaryDirectory(prefix="flowood-images-") as folder:
        before, _reader = _reader, Reader(Path(folder))
        try:
            yield _reader
        finally:
            _reader = before


def reader() -> Reader | None:
    """Return the reader of :func:`reading_once`, inside of it."""
    return _reader


def read_once(key: tuple, augmentations: nn.Module | None, plain: Callable[[], Any]) -> Any:
    """Return an item of a data set, which is read once inside of :func:`reading_once`.

    Args:
        key: What tells it from other items.
        augmentations: The data set's. With other ones than a change of size the item is read every time.
        plain: Reads it.
    """
    if _reader is None or not _fixed(augmentations):
        return plain()
    return _reader.read((*key, repr(augmentations)), plain)


def _fixed(augmentations: nn.Module | None) -> bool:
    """Whether augmentations do the same every time."""
    if isinstance(augmentations, v2.Compose):
        return all(map(_fixed, augmentations.transforms))
    return augmentations is None or isinstance(augmentations, v2.Resize | v2.Identity)
