# SPDX-License-Identifier: Apache-2.0
"""Files of what backbones have computed, which may outlive the command that computed it.

A store is a folder with a file for each output of a backbone, of as many rows as there are images, and a file of the
images' digests. A row counts once its digest is written: a command that is interrupted leaves nothing half done.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

CAPACITY = 40_000
"""Images kept for each kind of output. The files are sparse: only what is written takes space on the disk."""

DIGEST = 16
"""Bytes of an image's digest."""


def mapped(path: Path, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor that lives in a sparse file, so that the system may move it out of memory; zeros in a new one."""
    with torch.inference_mode(mode=False):  # else it could not be written to outside of inference
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).reshape(tuple(shape))


def lock(folder: Path) -> FileLock | None:
    """Make a folder this process's own; ``None`` while it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    own = FileLock(folder / "lock")
    try:
        own.acquire(timeout=0)
    except Timeout:
        return None
    return own


@dataclass
class Store:
    """The outputs of one backbone, at one image shape."""

    folder: Path
    capacity: int = CAPACITY
    columns: list[Tensor] = field(default_factory=list)
    single: bool = False
    rows: dict[bytes, int] = field(default_factory=dict)
    computed: int = 0
    seconds: float = 0.0

    @property
    def seconds_per_image(self) -> float:
        """What an image took to compute, in the mean."""
        return self.seconds / self.computed if self.computed else 0.0

    @property
    def row_bytes(self) -> int:
        """Bytes of what is kept of an image."""
        return sum(column[0].numel() * column.element_size() for column in self.columns)

    def create(self, outputs: Sequence[Tensor]) -> None:
        """Make the files for such outputs."""
        self.folder.mkdir(parents=True)
        self._map([(output.shape[1:], output.dtype) for output in outputs])

    def _map(self, kinds: Sequence[tuple[Sequence[int], torch.dtype]]) -> None:
        self.columns = [
            mapped(self.folder / f"{number}.bin", (self.capacity, *shape), dtype)
            for number, (shape, dtype) in enumerate(kinds)
        ]

    def read(self) -> None:
        """Go on with what an earlier process has left, if it has left something."""
        about = self.folder / "about.json"
        if not about.is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        known = json.loads(about.read_text(encoding="utf-8"))
        digests = (self.folder / "digests").read_bytes()
        count = len(digests) // DIGEST
        self.rows = {digests[row * DIGEST : (row + 1) * DIGEST]: row for row in range(count)}
        self.capacity = max(self.capacity, count)
        self.single, self.computed, self.seconds = known["single"], known["computed"], known["seconds"]
        self._map([(shape, getattr(torch, dtype)) for shape, dtype in known["outputs"]])

    def add(self, digests: Sequence[bytes], outputs: Sequence[Tensor]) -> None:
        """Keep the outputs of some images, as many as there is room for."""
        first = len(self.rows)
        digests = digests[: self.capacity - first]
        for column, output in zip(self.columns, outputs, strict=True):
            column[first : first + len(digests)] = output[: len(digests)]
        with (self.folder / "digests").open("r+b" if first else "wb") as file:
            file.seek(first * DIGEST)
            file.write(b"".join(digests))
        self.rows.update(zip(digests, range(first, first + len(digests)), strict=True))
        self.close()

    def close(self) -> None:
        """Write what a later process has to know."""
        if not self.columns:
            return
        outputs = [(list(column.shape[1:]), str(column.dtype).removeprefix("torch.")) for column in self.columns]
        known = {"outputs": outputs, "single": self.single, "computed": self.computed, "seconds": self.seconds}
        new = self.folder / "about.new"
        new.write_text(json.dumps(known), encoding="utf-8")
        new.replace(self.folder / "about.json")


class Shelf:
    """Stores in one folder.

    Args:
        folder: Theirs.
        most: The most bytes that they may take together; ``None`` for as many as it takes.
    """

    def __init__(self, folder: Path, most: int | None = None) -> None:
        self.folder, self.most = folder, most
        self._open: dict[str, Store] = {}

    def store(self, kind: object, capacity: int) -> Store:
        """Return the store of such a kind, with what is in it."""
        name = hashlib.blake2b(repr(kind).encode(), digest_size=12).hexdigest()
        store = self._open[name] = Store(self.folder / name, capacity)
        store.read()
        store.close()  # which makes it the one that was asked for last
        return store

    def keep(self, store: Store, digests: Sequence[bytes], outputs: Sequence[Tensor]) -> None:
        """Keep the outputs of some images, if there is room for them."""
        if not digests or len(store.rows) == store.capacity:
            return
        size = sum(output.numel() * output.element_size() for output in outputs)
        if not self._has_room(size):
            return
        if not store.columns:
            store.create(outputs)
        store.add(digests, outputs)

    def _has_room(self, size: int) -> bool:
        """Whether there is room for so many bytes, after others' stores were removed if need be."""
        if self.most is None:
            return True
        idle = [path for path in self.folder.glob("*/about.json") if path.parent.name not in self._open]
        idle.sort(key=lambda path: path.stat().st_mtime)
        taken = sum(len(store.rows) * store.row_bytes for store in self._open.values() if store.columns)
        sizes = [_bytes(path.parent) for path in idle]
        while taken + sum(sizes) + size > self.most and idle:
            shutil.rmtree(idle.pop(0).parent)
            sizes.pop(0)
        return taken + sum(sizes) + size <= self.most


def _bytes(folder: Path) -> int:
    """What a store takes, by its rows: its files are longer than what is written in them."""
    known = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    row = sum(math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in known["outputs"])
    return row * ((folder / "digests").stat().st_size // DIGEST)
