# SPDX-License-Identifier: Apache-2.0
"""The most memory that something takes."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import psutil


def unshared() -> int:
    """Bytes of this process and its children that they do not share with others."""
    process = psutil.Process()
    return sum(map(_unshared, [process, *process.children(recursive=True)]))


def of_children() -> int:
    """Bytes of this process's children that they do not share with others."""
    return sum(map(_unshared, psutil.Process().children(recursive=True)))


def _unshared(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except psutil.NoSuchProcess:  # it has ended
        return 0


def anonymous() -> int | None:
    """Bytes of this process that are mapped to no file; ``None`` where there is no ``/proc/self/status``."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)


class Peak:
    """The most memory while it is entered, beyond what there was at the start, sampled in a thread.

    Args:
        measure: What there is at a moment, in bytes, or ``None`` where that cannot be told.
        interval: Seconds between two looks.
    """

    def __init__(self, measure: Callable[[], int | None] = unshared, interval: float = 0.02) -> None:
        self.measure, self.interval = measure, interval
        self.rest: int | None = None
        """Bytes at the start."""
        self.most: int | None = None
        """The most bytes, those at the start included."""
        self._over = threading.Event()

    @property
    def above_rest(self) -> int | None:
        """The most bytes beyond those at the start."""
        return None if self.rest is None or self.most is None else self.most - self.rest

    def __enter__(self) -> Peak:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: else freed memory would count as present
        if trim is not None:
            trim(0)
        self.rest = self.most = self.measure()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        if self.most is not None:
            self.most = max(self.most, self.measure() or 0)

    def _watch(self) -> None:
        while self.most is not None and not self._over.wait(self.interval):
            self._look()

    def __exit__(self, *args: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()
