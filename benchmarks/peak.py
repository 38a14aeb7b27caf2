# SPDX-License-Identifier: Apache-2.0
"""The most memory that something takes."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path


class PeakMemory:
    """The most memory that the process took beyond what it had at the start, sampled in a thread.

    Counts anonymous pages alone (``RssAnon`` of ``/proc/self/status``): what is mapped to a file, such as the memo, is
    the system's to drop. ``gib`` is ``None`` where there is no such file.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.interval = interval
        self.gib: float | None = None
        self._stop = threading.Event()

    @staticmethod
    def now() -> int | None:
        """Anonymous resident memory in KiB."""
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: else freed memory would count as present
        if trim is not None:
            trim(0)
        self._first = self._most = self.now()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while self._most is not None and not self._stop.wait(self.interval):
            self._most = max(self._most, self.now() or 0)

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._first is not None and self._most is not None:
            self.gib = (max(self._most, self.now() or 0) - self._first) / 2**20
