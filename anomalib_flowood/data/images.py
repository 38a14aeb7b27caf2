# SPDX-License-Identifier: Apache-2.0
"""The images of one split: an array in memory, or files that are read when asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from anomalib_flowood.data.decoding import read_header, read_image


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split of one data set: an array in memory, or files that are read when asked for.

    Attributes:
        name: Name of the data set.
        paths: One path per image: of its file, or a readable stand-in (``mnist/test/mnist_00012.png``).
        classes: Class name of each image, an object array of shape ``(N,)``; ``None`` without labels.
        class_names: All class names in the order of their labels, where the data set has such an order.
        pixels: Images of shape ``(N, C, H, W)``, ``uint8``, C being 1 or 3; ``None`` for files.
        max_value: What white is in files of 16 bits: see :func:`~anomalib_flowood.data.decoding.read_image`.
        masks: Path of the mask of each image, an empty text where all of it is normal; no paths where nothing is known
            of pixels.
    """

    name: str
    paths: list[str]
    classes: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    pixels: torch.Tensor | None = None
    max_value: int | None = None
    masks: tuple[str, ...] = ()
    _decoded: bool = False

    @classmethod
    def from_array(
        cls,
        name: str,
        split: str,
        pixels: torch.Tensor | np.ndarray,
        labels: Any = None,
        class_names: Sequence[str] = (),
    ) -> Images:
        """Take images that are one array.

        Args:
            name: Name of the data set.
            split: ``"train"`` or ``"test"``.
            pixels: The images, ``uint8``, of shape ``(N, H, W)``, ``(N, H, W, 3)`` or ``(N, 3, H, W)``.
            labels: Class of each image, integers of shape ``(N,)``; nothing where there are no classes.
            class_names: Names of the classes in the order of their labels; the labels themselves by default.

        Returns:
            The images.
        """
        tensor = torch.as_tensor(pixels)
        if tensor.ndim == 3:
            tensor = tensor.unsqueeze(1)
        elif tensor.shape[1] != 3:
            tensor = tensor.permute(0, 3, 1, 2)
        # anomalib's visualiser names its pictures after the last folder and file: they need a suffix, and the data
        # set's name, or the pictures of one data set would overwrite those of another.
        paths = [f"{name}/{split}/{name}_{row:05d}.png" for row in range(len(tensor))]
        classes = None if labels is None else class_of(labels, class_names)
        return cls(name, paths, classes, tuple(class_names), tensor.contiguous())

    def __len__(self) -> int:
        return len(self.paths)

    def __deepcopy__(self, memo: dict[int, Any]) -> Images:
        # anomalib deep-copies a data set to take a part of it. Nothing here ever changes, so that the parts share it.
        return self

    def select(self, rows: np.ndarray) -> Images:
        """Keep some of the images, by their positions, ``(M,)``, ascending and without repeats."""
        if len(rows) == len(self):
            return self
        return replace(
            self,
            paths=[self.paths[row] for row in rows],
            classes=None if self.classes is None else self.classes[rows],
            pixels=None if self.pixels is None else self.pixels[torch.from_numpy(rows)],
            masks=tuple(self.masks[row] for row in rows) if self.masks else (),
        )

    def in_memory(self, limit_mib: float) -> Images:
        """Decode files into memory if all have one size and take no more than so many MiB; else return ``self``.

        Raises:
            UnreadableImageError: If a file is no readable image.
        """
        if self.pixels is not None or limit_mib <= 0:
            return self
        size: tuple[int, int] | None = None
        channels = 1
        for path in self.paths:
            height, width, image_channels = read_header(path)
            channels = max(channels, image_channels)
            # Both conditions end the check early: a large folder costs as many headers as it takes to know.
            if size not in (None, (height, width)) or len(self) * channels * height * width > limit_mib * 2**20:
                return self
            size = (height, width)
        if size is None:
            return self
        pixels = torch.empty((len(self), channels, *size), dtype=torch.uint8)
        # Pillow decodes without the interpreter lock.
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for row, image in enumerate(pool.map(self._read, self.paths)):
                if image.shape[1:] != size:  # turned by what stands behind its pixels
                    return self
                pixels[row] = image
        return replace(self, pixels=pixels, _decoded=True)

    def read_for(self, max_value: int | None) -> Images:
        """Take another white for files of 16 bits; what was read into memory is read again when it is asked for."""
        from_files = self.pixels is None or self._decoded
        if not from_files or max_value == self.max_value:
            return self
        return replace(self, max_value=max_value, pixels=None, _decoded=False)

    def _read(self, path: str) -> torch.Tensor:
        return read_image(path, self.max_value)

    def read(self, rows: np.ndarray) -> torch.Tensor | list[torch.Tensor]:
        """Read images, by their positions, ``(M,)``.

        Returns:
            From memory, a tensor of shape ``(M, C, H, W)``; from files, M tensors of shape ``(C, H, W)``, each with its
            own size and channels. ``uint8`` both.

        Raises:
            UnreadableImageError: If a file is no readable image.
        """
        if self.pixels is not None:
            # NumPy's single thread: for arrays this small, waiting for PyTorch's threads costs far more than they save.
            return torch.from_numpy(self.pixels.numpy()[rows])
        return [self._read(self.paths[row]) for row in rows]


def class_of(labels: Any, class_names: Sequence[str] = ()) -> np.ndarray:
    """Name the class of each image, of which the labels, ``(N,)``, are integers: an object array, ``(N,)``.

    Where classes have no names, the labels are their names.
    """
    numbers = np.asarray(labels).astype(np.int64)
    names = tuple(class_names) or tuple(str(number) for number in range(int(numbers.max(initial=0)) + 1))
    return np.array(names, dtype=object)[numbers]
