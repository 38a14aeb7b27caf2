# SPDX-License-Identifier: Apache-2.0
"""Data sets that are known by name: their register, and what finds them on this machine or fetches them.

A data set is one registration, of a function that reads one split of it::

    @register_data_set("rings")
    def read_rings(root: Path, split: str) -> Images:
        file = np.load(root / f"rings-{split}.npz")
        return Images.from_array("rings", split, file["pixels"], file["labels"])

Its name is then taken wherever a data set is named, and offered in errors. Those of torchvision are rows in
:mod:`~anomalib_flowood.data.sources.torchvision_sets`.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from anomalib_flowood.data.images import Images
from anomalib_flowood.data.sources.layouts import kinds_of_folders
from anomalib_flowood.names import Registry

logger = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT = 10.0
"""Seconds of silence after which a download is given up: urllib alone waits for minutes."""


@dataclass(frozen=True)
class NamedDataSet:
    """How a data set that is known by name is read.

    Attributes:
        read: Reads a split (``"train"`` or ``"test"``) from the folder of the data sets; raises
            :class:`FileNotFoundError` if it is not there.
        download: Fetches a split into that folder, by urllib; whatever it raises becomes a
            :class:`FileNotFoundError`. ``None`` if it cannot be fetched.
        stand_in: Gives a split of something smaller where nothing else works, ``None`` if that is not here either.
        stand_in_is: What that is, for a warning.
        remedies: What a user can do where the data set is missing, ``{root}`` in it being the folder of the data sets.
        installed: A folder of this very data set that is not below that of the data sets.
    """

    read: Callable[[Path, str], Images]
    download: Callable[[Path, str], Any] | None = None
    stand_in: Callable[[str], Images | None] | None = None
    stand_in_is: str = ""
    remedies: tuple[str, ...] = ()
    installed: Path | None = None


DATA_SETS: Registry[NamedDataSet] = Registry("data set")
"""The data sets that are known by name."""

_Reader = TypeVar("_Reader", bound=Callable[[Path, str], Images])


def register_data_set(name: str, **details: Any) -> Callable[[_Reader], _Reader]:
    """Make a data set known by a name, with the function under this decorator as what reads it.

    Args:
        name: Name that users type: letters, digits, ``_`` and ``-``.
        details: Further fields of :class:`NamedDataSet`.

    Returns:
        The decorator, which returns the function as it is.

    Raises:
        ValueError: If the name could be a path, or is another data set's.
    """
    if not re.fullmatch(r"[\w-]+", name):
        msg = f"A data set cannot be called {name!r}: letters, digits, _ and - make a name that is no path."
        raise ValueError(msg)

    def register(read: _Reader) -> _Reader:
        DATA_SETS.add(name, NamedDataSet(read, **details), read)
        return read

    return register


class NamedSource:
    """A data set that is known by name: a :class:`~anomalib_flowood.data.sources.finding.Source`.

    Args:
        name: One of :data:`DATA_SETS`.
        root: Folder of the data sets.
    """

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root
        self._data_set = DATA_SETS[name]
        # What prepare() had to open anyway, until it is read.
        self._opened: dict[str, Images] = {}
        if Path(name).is_dir():
            logger.info("%r is the data set of that name; for the folder here, write './%s'.", name, name)

    @property
    def key(self) -> str:
        """Its name."""
        return self.name

    def prepare(self, splits: Sequence[str]) -> None:
        """Download what is neither under ``root`` nor installed; the error says what else helps."""
        for split in splits:
            images = self._find(split)
            if images is None:
                try:
                    images = self._download(split)
                except Exception as error:  # torchvision's downloads raise nearly everything
                    if self._stand_in(split) is not None:
                        return
                    failed = "could not" if self._data_set.download else "cannot"
                    raise FileNotFoundError(self._missing(f"{failed} be downloaded ({error})")) from None
            self._opened[split] = images

    def read(self, split: str) -> Images:
        """Read one split, or that of what stands in for it where it is not on this machine."""
        images = self._opened.pop(split, None) or self._find(split)
        if images is None:
            images = self._stand_in(split)
            if images is None:
                raise FileNotFoundError(self._missing("has not been downloaded"))
            logger.warning(
                "The data set %r is not under %s and could not be downloaded: taking %s instead.",
                self.name,
                self.root,
                self._data_set.stand_in_is,
            )
        return images

    def _find(self, split: str) -> Images | None:
        """The split, if it is on this machine."""
        try:
            return self._data_set.read(self.root, split)
        except FileNotFoundError:
            return None

    def _download(self, split: str) -> Images:
        if self._data_set.download is not None:
            with _download_timeout():
                self._data_set.download(self.root, split)
        return self._data_set.read(self.root, split)

    def _stand_in(self, split: str) -> Images | None:
        return None if self._data_set.stand_in is None else self._data_set.stand_in(split)

    def _missing(self, what: str) -> str:
        """A message that says what helps."""
        remedies = [remedy.replace("{root}", str(self.root)) for remedy in self._data_set.remedies]
        remedies.append(f"give a {kinds_of_folders()} instead")
        message = f"The data set {self.name!r} is not under {self.root} and {what}. What helps: {'; '.join(remedies)}."
        return " ".join(message.split())


@contextmanager
def _download_timeout() -> Iterator[None]:
    """Let no connection wait longer than :data:`DOWNLOAD_TIMEOUT`."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
