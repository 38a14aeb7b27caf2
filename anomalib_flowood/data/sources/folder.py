# SPDX-License-Identifier: Apache-2.0
"""Data sets that are given as folders, and how those without ``train`` and ``test`` are divided."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anomalib_flowood.data.images import Images
from anomalib_flowood.data.listing import image_files, split_folder
from anomalib_flowood.data.masks import GROUND_TRUTH
from anomalib_flowood.data.sources.layouts import ImageFiles, layout_of
from anomalib_flowood.data.sources.named import DATA_SETS

VALIDATION = ("validation", "val")
"""Folders beside ``train/`` whose normal images calibrate; MVTec LOCO AD and MVTec AD 2 have the first."""


class FolderSource:
    """A folder, in one of the :data:`~anomalib_flowood.data.sources.layouts.LAYOUTS`.

    Args:
        folder: The folder.
        name: Name of the data set.
        held_out: Share of a folder without ``train/`` and ``test/`` that becomes its test split. At 1.0 the folder is
            used for testing alone.
        seed: Seed of that split.
    """

    def __init__(self, folder: Path, name: str, held_out: float, seed: int) -> None:
        self.folder = folder
        self.name = name
        self.held_out = held_out
        self.seed = seed
        self._listed: Images | None = None

    @property
    def key(self) -> str:
        """The folder; of a data set that is known by name, its name."""
        folder = self.folder.resolve()
        installed = {entry.installed.resolve(): name for name, entry in DATA_SETS.items() if entry.installed}
        return installed.get(folder, str(folder))

    @property
    def divided(self) -> bool:
        """Whether its training and its test split are parts of the same images."""
        return self.held_out < 1.0 and len(layout_of(self.folder)[1]) < 2

    def left_out(self, read: Sequence[str] = ()) -> list[str]:
        """Sub-folders beside ``train/`` and ``test/`` that hold images, which nobody reads; masks are no images.

        Args:
            read: Those that are read all the same.
        """
        if not layout_of(self.folder)[1]:
            return []  # each sub-folder is a class
        beside = sorted(path for path in self.folder.iterdir() if path.is_dir() and path.name[0] != ".")
        known = {split_folder(self.folder, split) for split in ("train", "test")}
        known |= {self.folder / name for name in (GROUND_TRUTH, *read)}
        return [path.name for path in beside if path not in known and image_files(path, tell=False)]

    def read_validation(self, normal: str | None = None) -> tuple[str, Images] | None:
        """Find normal images that lie beside those to train on, to calibrate on.

        Args:
            normal: Name of the normal class; ``None`` if all images are normal. Where they lie in no class, they are.

        Returns:
            Name of the sub-folder, the first of :data:`VALIDATION` that has any, and its images; ``None`` if none has.
        """
        layout, there = layout_of(self.folder)
        if "train" not in there:
            return None
        for name in VALIDATION:
            folder = self.folder / name
            if not isinstance(layout, ImageFiles) or not folder.is_dir() or not image_files(folder, tell=False):
                continue
            images = layout.read(self.folder, self.name, name)
            if normal is not None and images.classes is not None:
                images = images.select(np.flatnonzero(images.classes == normal))
            if len(images):
                return name, images
        return None

    def prepare(self, splits: Sequence[str]) -> None:  # noqa: ARG002
        """Check that the folder is there: there is nothing to download."""
        if not self.folder.is_dir():
            msg = f"There is no folder {self.folder} (looked for it from {Path.cwd()})."
            raise FileNotFoundError(msg)

    def read(self, split: str) -> Images:
        """Read one split; a folder without ``train/`` and ``test/`` is divided by the seed, class by class."""
        self.prepare([split])
        layout, there = layout_of(self.folder)
        if split in there and (len(there) == 2 or self.held_out == 1.0):
            return layout.read(self.folder, self.name, split)
        if there == ["test"]:
            msg = f"{self.folder} has test images but no training images: it needs train beside test."
            raise FileNotFoundError(msg)
        images = self._undivided()
        return images.select(self._divide(images)[split])

    def read_one_class(self, normal: str) -> Images:
        """Read what there is to test on where one class is normal.

        Args:
            normal: Name of that class.

        Returns:
            The test split; of a folder without such splits its share of the normal class, and all other images.
        """
        if not self.divided:
            return self.read("test")
        images = self._undivided()
        assert images.classes is not None
        return images.select(np.union1d(self._divide(images)["test"], np.flatnonzero(images.classes != normal)))

    def _undivided(self) -> Images:
        """All images of a folder that is divided: files are looked for once, what is in memory is not held here."""
        if self._listed is None:
            layout, there = layout_of(self.folder)
            images = layout.read(self.folder, self.name, "train" if there else None)
            if images.pixels is not None:
                return images
            self._listed = images
        return self._listed

    def tested(self, images: int) -> int:
        """How many of a class's images become test images, in a folder that is divided."""
        return max(1, round(self.held_out * images))

    def _divide(self, images: Images) -> dict[str, np.ndarray]:
        """Rows of both splits."""
        order = np.random.default_rng(self.seed).permutation(len(images))
        classes = np.zeros(len(images)) if images.classes is None else images.classes
        test: list[int] = []
        for name in np.unique(classes):
            of_class = order[classes[order] == name]
            test.extend(of_class[: self.tested(len(of_class))])
        return {"test": np.sort(np.array(test, dtype=np.int64)), "train": np.setdiff1d(order, test)}
