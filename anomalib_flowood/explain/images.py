# SPDX-License-Identifier: Apache-2.0
"""Images from inside and outside, out of a data module or from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from torch import Tensor

from anomalib_flowood.data.datamodules import SourcedDataModule
from anomalib_flowood.data.path_dataset import takes_bytes
from anomalib_flowood.data.prediction import read_as_trained
from anomalib_flowood.data.seen import as_seen

_INSIDE = "inside"
_OUTSIDE = "outside"


@dataclass(frozen=True)
class LargeImages:
    """Images so large that each is in memory only while it is scored.

    Attributes:
        read: Reads an image, pre-processed, ``(3, H, W)``, by its place.
        places: Of the images.
    """

    read: Callable[[int], Tensor]
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Tensor]:
        """Read one after the other, ``(1, 3, H, W)``."""
        return (self.read(place)[None] for place in self.places)


@dataclass(frozen=True)
class ImageSet:
    """Images of one source.

    Attributes:
        name: What the source is called.
        outside: Whether the images do not belong.
        images: For the eye: in [0, 1] at the detector's size, ``(N, 3, H, W)``.
        inputs: For the detector: pre-processed, ``(N, 3, H, W)``.
        large: In the place of both, of a detector that takes images in tiles.
    """

    name: str
    outside: bool
    images: Tensor
    inputs: Tensor
    large: LargeImages | None = None


def image_sets(
    detector: AnomalibModule, data: AnomalibDataModule | Mapping[str, Tensor], max_images: int
) -> list[ImageSet]:
    """Take images of every source.

    Args:
        detector: Its pre-processor is applied.
        data: A data module, whose test images with label 0 are inside; those with label 1 are told apart by their
            ``source``, or are one set where there is none. Or images in [0, 1] by name, each ``(N, 3, H, W)`` or
            ``(N, 1, H, W)``, the inside ones first.
        max_images: The most images of each set, spread evenly over it.

    Returns:
        The inside set, then the outside sets.

    Raises:
        ValueError: If there are no inside or no outside images, or images have the wrong shape.
    """
    if isinstance(data, AnomalibDataModule):
        return _from_datamodule(detector, data, max_images)
    if len(data) < 2 or any(len(images) == 0 for images in data.values()):
        msg = "Give images by name: the inside ones first, then at least one outside set, and none of them empty."
        raise ValueError(msg)
    sets = []
    for number, (name, images) in enumerate(data.items()):
        if images.ndim != 4 or images.shape[1] not in {1, 3}:
            msg = f"Images must be of shape (N, 3, H, W) or (N, 1, H, W), those of {name!r} are {tuple(images.shape)}."
            raise ValueError(msg)
        chosen = images[spread(len(images), max_images)].float().expand(-1, 3, -1, -1)
        sets.append(_image_set(detector, name, number > 0, list(chosen)))
    return sets


def normal_images(
    detector: AnomalibModule, data: AnomalibDataModule | Mapping[str, Tensor], sets: list[ImageSet], max_images: int
) -> ImageSet:
    """Take normal images that others are compared with: training images of a data module, else the inside ones.

    Arguments as for :func:`image_sets`, which has set the data up and returned ``sets``.
    """
    training = getattr(data, "train_data", None)
    if training is None:
        return sets[0]
    places = spread(len(training), max_images)
    return _image_set(detector, "training", False, [training[int(place)].image for place in places])


def _from_datamodule(detector: AnomalibModule, datamodule: AnomalibDataModule, max_images: int) -> list[ImageSet]:
    large = takes_bytes(detector)
    if not hasattr(datamodule, "test_data"):
        if large and isinstance(datamodule, SourcedDataModule):
            datamodule.memory_limit_mib = 0  # each is read just once
        datamodule.prepare_data()
        datamodule.setup("test")
    read_as_trained(detector, datamodule)
    samples: pd.DataFrame = datamodule.test_data.samples
    label = samples["label_index"].to_numpy()
    for value, which in ((0, "inside (normal)"), (1, "outside (anomalous)")):
        if not (label == value).any():
            msg = f"The test set of {datamodule.name} has no {which} images: both kinds are needed to explain."
            raise ValueError(msg)
    source = samples["source"].astype(str).to_numpy() if "source" in samples else None

    inside = set() if source is None else set(source[label == 0])
    name = inside.pop() if len(inside) == 1 else _INSIDE
    rows = {name: np.flatnonzero(label == 0)}
    for other in [_OUTSIDE] if source is None else dict.fromkeys(source[label == 1]):
        chosen = label == 1 if source is None else (label == 1) & (source == other)
        rows[f"{other} (outside)" if other in rows else other] = np.flatnonzero(chosen)
    transform = getattr(detector.pre_processor, "transform", None)

    def read(row: int) -> Tensor:
        item: Any = datamodule.test_data[row]  # which has an image
        image = item.image.as_subclass(Tensor)
        return image if transform is None else transform(image)

    sets = []
    for number, (title, places) in enumerate(rows.items()):
        some = places[spread(len(places), max_images)].tolist()
        if large:
            none = torch.empty(0, 3, 0, 0)
            sets.append(ImageSet(title, number > 0, none, none, LargeImages(read, some)))
        else:
            images: list[Any] = [datamodule.test_data[row].image for row in some]
            sets.append(_image_set(detector, title, number > 0, images))
    return sets


def spread(count: int, most: int) -> np.ndarray:
    """Choose places of at most so many items, evenly spread: files are often sorted by what they show."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


@torch.no_grad()
def _image_set(detector: AnomalibModule, name: str, outside: bool, images: Sequence[Tensor]) -> ImageSet:
    transform = getattr(detector.pre_processor, "transform", None)
    plain = [image.as_subclass(Tensor) for image in images]
    # One by one, since files may differ in size until they are resized.
    inputs = plain if transform is None else [transform(image) for image in plain]
    if len({image.shape for image in inputs}) > 1:
        msg = f"The images of {name!r} differ in size, and the detector's pre-processor does not resize them."
        raise ValueError(msg)
    seen = torch.stack(inputs)
    return ImageSet(name, outside, as_seen(seen, transform), seen)
