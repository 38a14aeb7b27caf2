# SPDX-License-Identifier: Apache-2.0
"""The data set that fetches items and batches that know their source, a batch at a time."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset
from anomalib.data.utils import LabelName
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import Resize, Transform
from torchvision.tv_tensors import Image, Mask

from anomalib_flowood.checks import SINGLE_IMAGES
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.items import SourcedImageBatch, SourcedImageItem, of_one_type
from anomalib_flowood.data.masks import union_of
from anomalib_flowood.data.resizing import is_antialiased, resize_bytes
from anomalib_flowood.data.seen import steps_of

_CHUNK = 2**22
"""The most numbers that are resized at once, 16 MiB of them."""

_LARGE = 2**21
"""Numbers of an image from which on it is resized in strips, since the whole would take memory as floats."""

_THREADS = 4
"""The most files that are read at a time: each is in memory, full-size, before it is resized."""

_COLUMNS = ("image_path", "split", "label_index", "source", "store", "row")


class SourcedDataset(AnomalibDataset):
    """Images of one or more sources, fetched a batch at a time.

    ``samples`` is anomalib's table with three more columns: ``source``, and where the pixels are: ``store``, an index
    into the tuple of :class:`Images`, and ``row``. Taking a part of the data set or joining two changes the table
    alone, so that all parts share the images.

    Args:
        images: The images.
        label_index: 0 (normal) or 1 (anomalous) for each image, of shape ``(N,)``, or one label for all.
        split: ``"train"``, ``"val"`` or ``"test"``.
        rows: Positions in ``images`` of shape ``(N,)``; all of them by default.
        source: Name for each image, or one name for all.
        name: Name of the data set, for anomalib's result folders.
        category: Category, likewise.
        augmentations: Applied to the images. A :class:`~torchvision.transforms.v2.Resize` at the end, such as the
            model's, is applied to the whole batch at once; what comes before it, to one image after another.
    """

    keep_bytes = False
    """Whether images that are resized by nothing stay 8 bits, ``uint8``: for detectors of such large ones that floats,
    of four times the size, fill the memory (:attr:`~anomalib_flowood.models.components.FlowModule.takes_bytes`)."""

    def __init__(
        self,
        images: Images,
        label_index: np.ndarray | int,
        split: str,
        rows: np.ndarray | None = None,
        source: Sequence[str] | str | None = None,
        name: str = "",
        category: str = "",
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(augmentations=augmentations)
        self._name = name or images.name
        self._category = category
        self._stores: tuple[Images, ...] = (images,)
        rows = np.arange(len(images)) if rows is None else rows
        labels = np.broadcast_to(np.asarray(label_index, dtype=np.int64), rows.shape)
        self.samples = pd.DataFrame(
            {
                "image_path": [images.paths[row] for row in rows],
                "split": split,
                "label": np.where(labels == LabelName.NORMAL, "normal", "abnormal"),
                "label_index": labels,
                "mask_path": [images.masks[row] for row in rows] if images.masks else "",
                "source": images.name if source is None else source,
                "store": 0,
                "row": rows,
            }
        )

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self._name

    @property
    def samples(self) -> pd.DataFrame:
        """Table with one row per image."""
        return super().samples

    @samples.setter
    def samples(self, samples: pd.DataFrame) -> None:
        """Set the table of samples. Their order is kept and paths need not exist: most are stand-ins."""
        if not isinstance(samples, pd.DataFrame):
            msg = f"samples must be a pandas.DataFrame, found {type(samples)}."
            raise TypeError(msg)
        missing = [column for column in _COLUMNS if column not in samples.columns]
        if missing:
            msg = f"samples lack the columns {', '.join(missing)}."
            raise ValueError(msg)
        self._samples = samples.reset_index(drop=True)
        masks = self._samples.get("mask_path", pd.Series("", self._samples.index)).tolist()
        # Of anomalous images without a mask metrics of pixels know nothing: see items.with_known_masks.
        judged = any(mask != "" for mask in masks)
        self._samples.attrs["task"] = TaskType.SEGMENTATION if judged else TaskType.CLASSIFICATION
        self._masks: list[str] = masks if judged else []
        # The table in a form that costs nothing to look up.
        self._store = self._samples["store"].to_numpy(dtype=np.int64)
        self._row = self._samples["row"].to_numpy(dtype=np.int64)
        self._labels = torch.tensor(self._samples["label_index"].to_numpy(dtype=np.int64))
        self._paths: list[str] = self._samples["image_path"].tolist()
        self._sources: list[str] = self._samples["source"].tolist()

    def __add__(self, other_dataset: AnomalibDataset) -> SourcedDataset:  # type: ignore[override]
        """Join two data sets.

        Args:
            other_dataset: The one to append, another :class:`SourcedDataset`.

        Returns:
            Both, with this one's augmentations, name and category.

        Raises:
            TypeError: If the other is no :class:`SourcedDataset`.
        """
        if not isinstance(other_dataset, SourcedDataset):
            msg = f"Cannot join a SourcedDataset and a {type(other_dataset).__name__}."
            raise TypeError(msg)
        joined = copy.deepcopy(self)
        stores = list(self._stores)
        places = []
        for images in other_dataset._stores:
            if images not in stores:  # by identity: Images have no other equality
                stores.append(images)
            places.append(stores.index(images))
        samples = other_dataset.samples.assign(store=np.array(places)[other_dataset._store])
        joined._stores = tuple(stores)
        joined.samples = pd.concat([self.samples, samples], ignore_index=True)
        return joined

    def read_for(self, max_value: int | None) -> None:
        """Read files from now on with another white in those of 16 bits; what is in memory is read again.

        Args:
            max_value: What white is: see :func:`~anomalib_flowood.data.decoding.read_image`.
        """
        self._stores = tuple(store.read_for(max_value) for store in self._stores)

    def __getitem__(self, index: int) -> SourcedImageItem:
        """Get one item.

        Args:
            index: Its position.

        Returns:
            The item: image of shape ``(3, H, W)``, ``float32`` in [0, 1], or ``uint8`` (:attr:`keep_bytes`).

        Raises:
            IndexError: If there is no such position.
            ValueError: If a file cannot be read.
        """
        index = range(len(self))[index]  # from the end, if negative
        images, masks = self._images([index])
        return SourcedImageItem(
            image=images[0],
            gt_label=self._labels[index],
            gt_mask=None if masks is None else masks[0],
            image_path=self._paths[index],
            source=self._sources[index],
        )

    def __getitems__(self, indices: Sequence[int]) -> SourcedImageBatch:
        """Get a batch: what PyTorch's data loader calls in place of one ``__getitem__`` per image.

        Args:
            indices: Positions of N images.

        Returns:
            The batch: images of shape ``(N, 3, H, W)``, ``float32`` in [0, 1], or ``uint8`` (:attr:`keep_bytes`).

        Raises:
            ValueError: If the images have different sizes and nothing resizes them, or a file cannot be read.
        """
        images, masks = self._images(indices)
        return SourcedImageBatch(
            image=images,
            gt_label=self._labels[list(indices)],
            gt_mask=masks,
            image_path=[self._paths[index] for index in indices],
            source=[self._sources[index] for index in indices],
        )

    def _images(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images of shape ``(N, 3, H, W)``, wherever they come from, and their masks, ``(N, H, W)``, if they have."""
        index = np.asarray(indices, dtype=np.int64)
        store, row = self._store[index], self._row[index]
        parts: list[tuple[np.ndarray, Any]] = []
        masks: dict[int, torch.Tensor] = {}
        for number in np.unique(store):
            places = np.flatnonzero(store == number)
            paths = [self._masks[place] for place in index[places]] if self._masks else None
            fetched, of_part = self._fetch(self._stores[number], row[places], paths)
            parts.append((places, fetched))
            masks.update(zip(places.tolist(), of_part, strict=False))
        images = self._joined(index, parts)
        return images, torch.stack([masks[place] for place in range(len(index))]) if self._masks else None

    def _joined(self, index: np.ndarray, parts: list[tuple[np.ndarray, Any]]) -> torch.Tensor:
        """One batch of the images of several stores, each with its places in the batch."""
        if len(parts) == 1 and isinstance(parts[0][1], torch.Tensor):
            return parts[0][1]
        shapes = {image.shape for _, some in parts for image in (some[:1] if torch.is_tensor(some) else some)}
        if len(shapes) > 1:
            images = {
                place: image for places, part in parts for place, image in zip(places.tolist(), part, strict=True)
            }
            _check_sizes([images[place] for place in range(len(index))], [self._paths[i] for i in index])
        batch = np.empty((len(index), *parts[0][1][0].shape), dtype=np.float32)
        for places, fetched in parts:
            whole = fetched if isinstance(fetched, torch.Tensor) else torch.stack(of_one_type(fetched))
            batch[places] = _scale(whole).numpy() if whole.dtype == torch.uint8 else whole.numpy()
        return torch.from_numpy(batch)

    def _fetch(
        self, images: Images, rows: np.ndarray, mask_paths: list[str] | None
    ) -> tuple[torch.Tensor | list[torch.Tensor], list[torch.Tensor]]:
        """Read and augment: ``(M, 3, H, W)``, or M images of shape ``(3, H, W)`` where sizes differ; and M masks."""
        steps = list(steps_of(self.augmentations))
        resizes: list[Resize] = []
        while steps and type(steps[-1]) is Resize:
            resizes.insert(0, cast("Resize", steps.pop()))
        # Large images are resized as they are read: a batch of them, as floats and full-size, takes gigabytes. So are
        # files. A random transform draws once per call, so that it, too, gets one image at a time, as in anomalib, and
        # its mask with it.
        alone = bool(steps) or images.pixels is None or mask_paths is not None
        chunk = 1 if alone else max(1, _CHUNK // images.pixels[0].numel())  # type: ignore[index]

        def ready(start: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            read = images.read(rows[start : start + chunk])
            batch = read if isinstance(read, torch.Tensor) else read[0].unsqueeze(0)
            mask = None if mask_paths is None else _mask(mask_paths[start], batch.shape[-2:], images.paths[rows[start]])
            if not steps and resizes and batch.numel() > _LARGE and is_antialiased(resizes[0]):
                height, width = resizes[0].size
                if (height, width) != batch.shape[-2:] or not self.keep_bytes:
                    batch = resize_bytes(batch, (height, width))
            elif not self.keep_bytes or steps or any(tuple(step.size) != batch.shape[-2:] for step in resizes):
                batch = _scale(batch)
            if steps:
                one: Any = Image(_rgb(batch[0]))
                for step in steps:
                    one, mask = (step(one), None) if mask is None else step(one, mask)
                batch = one.as_subclass(torch.Tensor).unsqueeze(0)
            # Grey images are resized before they are spread over three channels: a third of the work.
            for resize in resizes:
                batch, mask = resize(batch), None if mask is None else resize(mask)
            return batch, None if mask is None else mask.as_subclass(torch.Tensor)

        # What draws at random does so in the order of the images.
        threads = 1 if steps or images.pixels is not None else threads_to_read()
        pairs = mapped(ready, range(0, len(rows), chunk), threads)
        done, masks = of_one_type([batch for batch, _ in pairs]), [mask for _, mask in pairs if mask is not None]
        if len({batch.shape[1:] for batch in done}) > 1:
            return [_rgb(batch[0]) for batch in done], masks
        # In memory of their own: an expanded view would break callers that write to the images or use view().
        whole = done[0] if len(done) == 1 else torch.cat(done)
        return torch.from_numpy(np.ascontiguousarray(_rgb(whole).numpy())), masks

    @property
    def collate_fn(self) -> Callable:
        """Function for data loaders: passes ready batches on, and builds batches from items."""
        return collate


def threads_to_read() -> int:
    """How many files are read at a time; worker processes share the processors already."""
    return 1 if get_worker_info() else min(_THREADS, os.cpu_count() or 1)


def mapped(function: Callable[[Any], Any], values: Sequence[Any], threads: int) -> list[Any]:
    """What a function returns for each of some values, in their order."""
    if threads == 1 or len(values) == 1:
        return [function(value) for value in values]
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes, and PyTorch resizes, without the interpreter lock
        return list(pool.map(function, values))


def collate(data: SourcedImageBatch | list[SourcedImageItem]) -> SourcedImageBatch:
    """Make a batch of what a data loader fetched.

    Args:
        data: A ready batch, or N items (of a wrapper that does not hand batches through).

    Returns:
        The batch; of a worker process one in shared memory.

    Raises:
        TypeError: If the loader makes no batches, so that this is a single item.
        ValueError: If the items' images have different sizes.
        RuntimeError: If there is no shared memory for it.
    """
    if isinstance(data, SourcedImageItem):
        raise TypeError(SINGLE_IMAGES)
    batch = data if isinstance(data, SourcedImageBatch) else _joined_items(data)
    if get_worker_info():  # else a thread of the worker does so: an error there is lost, and the batch awaited for ever
        for tensor in (batch.image, batch.gt_mask, batch.gt_label):
            if tensor is not None:
                tensor.share_memory_()
    return batch


def _joined_items(data: list[SourcedImageItem]) -> SourcedImageBatch:
    # anomalib would stretch smaller images to the largest without a word.
    _check_sizes([item.image for item in data], [str(item.image_path) for item in data])
    return cast("SourcedImageBatch", SourcedImageBatch.collate(list(data)))


def _scale(image: torch.Tensor) -> torch.Tensor:
    """Bytes to floats in [0, 1], in NumPy for the reason given in :meth:`Images.read`."""
    return torch.from_numpy(np.divide(image.numpy(), np.float32(255), dtype=np.float32))


def _rgb(image: torch.Tensor) -> torch.Tensor:
    """Spread one channel over three: ``(..., 1 or 3, H, W)`` to ``(..., 3, H, W)``."""
    return image.expand(*image.shape[:-3], 3, *image.shape[-2:])


def _mask(path: str, size: Sequence[int], image_path: str) -> Mask:
    """The mask of an image, ``(H, W)``, ``uint8``; an empty one where there is no path.

    Raises:
        ValueError: If it has another size than the image.
    """
    mask = union_of(path) if path else torch.zeros(tuple(size), dtype=torch.uint8)
    if mask.shape != tuple(size):
        msg = (
            f"The mask {path} has {mask.shape[0]} x {mask.shape[1]} pixels (height x width), and its image "
            f"{image_path} has {size[0]} x {size[1]}."
        )
        raise ValueError(msg)
    return Mask(mask)


def _check_sizes(images: list[Any], paths: list[str]) -> None:
    """Name two images whose sizes differ."""
    first = images[0].shape[-2:]
    for image, path in zip(images, paths, strict=True):
        if image.shape[-2:] != first:
            (height, width), (other_height, other_width) = first, image.shape[-2:]
            msg = (
                f"A batch needs images of one size, but {paths[0]} has {height} x {width} pixels (height x width) and "
                f"{path} has {other_height} x {other_width}. Give the model's pre-processor a Resize to a height and a "
                "width, or the data module augmentations with one."
            )
            raise ValueError(msg)
