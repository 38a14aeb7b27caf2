# SPDX-License-Identifier: Apache-2.0
"""What a folder can hold: images, or idx files. :data:`LAYOUTS` has a row for each."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_flowood.data.idx import find_idx, read_idx_split
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.listing import image_files, split_folder
from anomalib_flowood.data.masks import GROUND_TRUTH, tell_of_masks
from anomalib_flowood.names import alternatives

NO_FOLDER = "."
"""Class of the images that lie in no sub-folder, where others do."""


class Layout(Protocol):
    """One way in which images can lie in a folder."""

    what: str
    """What the folder is a folder of, as a user would say it."""

    def splits(self, folder: Path) -> list[str] | None:
        """Look into a folder.

        Args:
            folder: The folder, which is there.

        Returns:
            Which of ``"train"`` and ``"test"`` it has; ``None`` if this is not how its images lie.
        """

    def read(self, folder: Path, name: str, split: str | None) -> Images:
        """Read a split.

        Args:
            folder: The folder.
            name: Name of the data set.
            split: One that the folder has; ``None`` for all images of a folder that has none.

        Returns:
            Its images.

        Raises:
            FileNotFoundError: If there are no images.
            ValueError: If a file cannot be read.
        """


class IdxFiles:
    """Idx files under MNIST's names, compressed or not, with labels or without."""

    what = "idx files"

    def splits(self, folder: Path) -> list[str] | None:
        """Return which of the two splits there are; ``None`` if there are no idx files."""
        return [split for split in ("train", "test") if find_idx(folder, split, "images")] or None

    def read(self, folder: Path, name: str, split: str | None) -> Images:
        """Read a split."""
        assert split is not None  # splits() never says that there are none
        return read_idx_split(folder, name, split)


class ImageFiles:
    """Image files, below ``train/`` and ``test/`` or without, flat or with a sub-folder per class."""

    what = "images"

    def splits(self, folder: Path) -> list[str] | None:
        """Return which of the two folders there are: any folder may hold images."""
        return [split for split in ("train", "test") if split_folder(folder, split)]

    def read(self, folder: Path, name: str, split: str | None) -> Images:
        """List the images of a split, or of any other sub-folder; with classes if some lie in sub-folders of it."""
        if split:
            folder = split_folder(folder, split) or folder / split
        # Below the folder: class/…/image, or the images themselves; and masks, which are neither.
        files = [path.relative_to(folder) for path in image_files(folder)]
        files = [file for file in files if GROUND_TRUTH not in file.parts[:-1]]
        tell_of_masks([folder / file for file in files])
        if not files:
            msg = f"There are no images in {folder} (looked for {' '.join(IMG_EXTENSIONS)})."
            raise FileNotFoundError(msg)
        classes = [file.parts[0] if len(file.parts) > 1 else NO_FOLDER for file in files]
        paths = [str(folder / file) for file in files]
        return Images(name, paths, None if set(classes) == {NO_FOLDER} else np.array(classes, dtype=object))


LAYOUTS: list[Layout] = [IdxFiles(), ImageFiles()]
"""Ways in which images can lie in a folder: the first that knows a folder reads it. Another is put before them."""


def layout_of(folder: Path) -> tuple[Layout, list[str]]:
    """Find out how images lie in a folder.

    Args:
        folder: The folder, which is there.

    Returns:
        The layout, and which of ``"train"`` and ``"test"`` there are.
    """
    for layout in LAYOUTS:
        splits = layout.splits(folder)
        if splits is not None:
            return layout, splits
    msg = f"Nobody knows how images lie in {folder}: it is no {kinds_of_folders()}."
    raise ValueError(msg)


def what_folders_hold() -> list[str]:
    """List what a folder can be a folder of, as a user would say it, the plainest first."""
    return [layout.what for layout in reversed(LAYOUTS)]


def kinds_of_folders() -> str:
    """Say what folders can be read: ``folder of images or idx files``."""
    return f"folder of {alternatives(what_folders_hold(), quote='')}"
