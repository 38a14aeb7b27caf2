# SPDX-License-Identifier: Apache-2.0
"""The images below a path, read as our data modules read theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anomalib.data.predict import PredictDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from torch import nn
from torchvision.transforms.v2 import Resize, Transform

from anomalib_flowood.data.datasets import SourcedDataset, mapped, threads_to_read
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.items import SourcedImageBatch, SourcedImageItem, of_one_type
from anomalib_flowood.data.listing import image_files
from anomalib_flowood.data.masks import without_masks
from anomalib_flowood.files import at_home


class PathDataset(PredictDataset):
    """The images of a folder, or one image, read as our data modules read theirs.

    It takes the place of anomalib's ``PredictDataset`` wherever this package is imported, so that
    ``Engine.predict(data_path=…)`` reads so too.

    Args:
        path: A folder, searched by the rule of :func:`~anomalib_flowood.data.listing.image_files`, or a file.
        transform: Applied to each image after it is read.
        image_size: Not used, as anomalib does not.
        resize: The detector's, to be applied as images are read.
        max_value: What white is in files of 16 bits.

    Raises:
        FileNotFoundError: If there is neither a file nor a folder, or no image in it.
    """

    def __init__(
        self,
        path: str | Path,
        transform: Transform | None = None,
        image_size: int | tuple[int, int] = (256, 256),
        resize: Resize | None = None,
        max_value: int | None = None,
    ) -> None:
        path = at_home(path)
        if not path.exists():
            msg = f"There is no file or folder {path} (looked for it from {Path.cwd()})."
            raise FileNotFoundError(msg)
        # Not by anomalib's constructor, which would search the folder by another rule.
        self.image_filenames = without_masks(image_files(path), path) if path.is_dir() else [path]
        if not self.image_filenames:
            msg = f"There are no images in {path}."
            raise FileNotFoundError(msg)
        self.transform = transform
        self.image_size = image_size
        self.read_for(resize, max_value)

    def read_for(self, resize: Resize | None, max_value: int | None, *, keep_bytes: bool = False) -> None:
        """Read images from now on at another size and with another white; see :class:`SourcedDataset`."""
        images = Images("", [str(path) for path in self.image_filenames], max_value=max_value)
        self._data = SourcedDataset(images, 0, "predict", augmentations=resize)
        self._data.keep_bytes = keep_bytes and self.transform is None

    def __getitem__(self, index: int) -> SourcedImageItem:
        """Get one item: image of shape ``(3, H, W)``, ``float32`` in [0, 1], or ``uint8``: see :meth:`read_for`.

        Raises:
            UnreadableImageError: If the file cannot be read, with its path.
        """
        item = self._data[index]
        image = item.image if self.transform is None else self.transform(item.image)
        return SourcedImageItem(image=image, image_path=item.image_path)

    def __getitems__(self, indices: Sequence[int]) -> list[SourcedImageItem]:
        """Get items, read in up to four threads; errors as for one of them."""
        threads = 1 if self.transform is not None else threads_to_read()  # it may draw at random, image after image
        return mapped(self.__getitem__, indices, threads)

    @property
    def collate_fn(self) -> Callable:
        """Function for data loaders: makes a batch of items, without a copy of a single one."""
        return _collate


def _collate(items: Sequence[Any]) -> SourcedImageBatch:
    if len(items) == 1:
        return SourcedImageBatch(image=items[0].image[None], image_path=[items[0].image_path])
    for item, image in zip(items, of_one_type([item.image for item in items]), strict=True):
        item.image = image
    return SourcedImageBatch.collate(list(items))  # type: ignore[return-value]


def takes_bytes(detector: nn.Module | None) -> bool:
    """Whether a detector takes images of 8 bits as they are."""
    return getattr(detector, "takes_bytes", False)


def resize_of(detector: nn.Module) -> Resize | None:
    """The resize that a detector's pre-processing begins with, or nothing."""
    transform = getattr(getattr(detector, "pre_processor", None), "transform", None)
    resizes = extract_transforms_by_type(transform, Resize) if transform is not None else []
    return resizes[0] if resizes else None


def size_read(detector: nn.Module) -> tuple[int, ...] | None:
    """Height and width that a detector's images are resized to first, or the shorter side alone, if they are at all.

    It differs from what the model sees where the pre-processing crops or pads after that.
    """
    size = getattr(resize_of(detector), "size", None)
    return None if size is None else tuple(size)
