# SPDX-License-Identifier: Apache-2.0
"""Names and folders to sources of images.

A known name always means that data set, so that a config reads the same data wherever it runs; a folder which bears
such a name is written with a separator (``./mnist``). Any other bare word is a folder here or under ``root``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from anomalib_flowood.data.images import Images
from anomalib_flowood.data.sources.folder import FolderSource
from anomalib_flowood.data.sources.layouts import kinds_of_folders
from anomalib_flowood.data.sources.named import DATA_SETS, NamedSource
from anomalib_flowood.files import at_home
from anomalib_flowood.names import unknown_name


class Source(Protocol):
    """A data set that can be read split by split: one that is known by name, or a folder."""

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
        A source for each; no two of different folders have the same name.

    Raises:
        ValueError: If a bare word is neither a known name nor a folder.
    """
    folders = {
        i: _find_folder(item, Path(root))
        for i, item in enumerate(data_sets)
        if isinstance(item, Path) or item not in DATA_SETS
    }
    names = [folders[i].resolve().name if i in folders else str(item) for i, item in enumerate(data_sets)]
    for parts in range(2, 1 + max((len(folder.resolve().parts) for folder in folders.values()), default=0)):
        repeated = {name for name, times in Counter(names).items() if times > 1}
        for i, folder in folders.items():
            if names[i] in repeated:  # cats/images and dogs/images
                names[i] = "-".join(folder.resolve().parts[-parts:])
    return [
        FolderSource(folders[i], name, held_out[i], seed) if i in folders else NamedSource(name, Path(root))
        for i, name in enumerate(names)
    ]


def _find_folder(item: str | Path, root: Path) -> Path:
    """The folder that a data set is given as; it need not exist if it is written as a path."""
    folder = at_home(item)
    bare_word = isinstance(item, str) and "/" not in item and os.sep not in item and item not in ("", ".", "..")
    if not bare_word or folder.is_dir():
        return folder
    if (root / folder).is_dir():
        return root / folder
    kind, hint = "data set", f"Or give a {kinds_of_folders()}, here or under {root}."
    raise unknown_name(kind, item, DATA_SETS, hint)
