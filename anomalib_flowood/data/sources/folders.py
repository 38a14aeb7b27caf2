# SPDX-License-Identifier: Apache-2.0
"""Folders of images and folders of idx files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_flowood.data.idx import _find_idx, _read_idx_split
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.listing import image_files
from anomalib_flowood.data.sources.named import FASHION_MNIST_PACKAGE


class FolderSource:
    """A folder of images or of idx files.

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

    @property
    def key(self) -> str:
        """What makes two sources the same data set."""
        folder = self.folder.resolve()
        return "fashion_mnist" if folder == FASHION_MNIST_PACKAGE.resolve() else str(folder)

    def prepare(self, splits: Sequence[str]) -> None:  # noqa: ARG002
        """Check that the folder is there.

        Args:
            splits: Not used: there is nothing to download.

        Raises:
            FileNotFoundError: If it is not.
        """
        if not self.folder.is_dir():
            msg = f"There is no folder {self.folder} (looked for it from {Path.cwd()})."
            raise FileNotFoundError(msg)

    def read(self, split: str) -> Images:
        """Read one split.

        Args:
            split: ``"train"`` or ``"test"``.

        Returns:
            Its images. A folder without such splits is divided by the seed, class by class.

        Raises:
            FileNotFoundError: If the folder or its images are missing.
            ValueError: If an idx file is damaged.
        """
        self.prepare([split])
        idx = any(_find_idx(self.folder, part, "images") for part in ("train", "test"))
        parts = [part for part in ("train", "test") if self._has(part, idx=idx)]
        if split in parts and (len(parts) == 2 or self.held_out == 1.0):
            return self._read_part(split, idx=idx)
        if parts == ["test"]:
            msg = f"{self.folder} has test images but no training images: it needs train beside test."
            raise FileNotFoundError(msg)
        images = self._read_part("train" if parts else "", idx=idx)
        return images.select(self._divide(images)[split])

    def _has(self, part: str, *, idx: bool) -> bool:
        return _find_idx(self.folder, part, "images") is not None if idx else (self.folder / part).is_dir()

    def _read_part(self, part: str, *, idx: bool) -> Images:
        if idx:
            return _read_idx_split(self.folder, self.name, part)
        folder = self.folder / part
        # Below the folder: class/…/image, or the images themselves.
        files = [path.relative_to(folder) for path in image_files(folder)]
        if not files:
            msg = f"There are no images in {folder} (looked for {' '.join(IMG_EXTENSIONS)})."
            raise FileNotFoundError(msg)
        classes = [file.parts[0] if len(file.parts) > 1 else "." for file in files]
        return Images(
            self.name,
            [str(folder / file) for file in files],
            None if set(classes) == {"."} else np.array(classes, dtype=object),
        )

    def _divide(self, images: Images) -> dict[str, np.ndarray]:
        """Rows of both splits."""
        order = np.random.default_rng(self.seed).permutation(len(images))
        classes = np.zeros(len(images)) if images.classes is None else images.classes
        test: list[int] = []
        for name in np.unique(classes):
            of_class = order[classes[order] == name]
            test.extend(of_class[: max(1, round(self.held_out * len(of_class)))])
        return {"test": np.sort(np.array(test, dtype=np.int64)), "train": np.setdiff1d(order, test)}
