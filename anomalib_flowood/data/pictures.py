# SPDX-License-Identifier: Apache-2.0
"""Pictures of detectors' results: of images as our reader reads them, and a file of its own for each."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import PIL.Image
import torch
from anomalib.data import ImageItem, NumpyImageItem
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image import visualizer
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from anomalib_flowood.data.decoding import plain_max_value, read_picture
from anomalib_flowood.data.items import SourcedImageItem, SourcedNumpyImageItem
from anomalib_flowood.data.seen import as_seen, moves_places, transform_of
from anomalib_flowood.files import whole_file

_MOST_DRAWN = 2048
"""The longest side that is drawn at full size: of larger images floats and Pillow's copies would take gigabytes, for a
picture of some hundred pixels."""

_FOLDERS: WeakKeyDictionary[Dataset, Path] = WeakKeyDictionary()


def as_read(item: Any) -> Any:
    """Let an item be drawn as our reader read its image.

    anomalib opens ``image_path`` again: by a reader of its own, so that 16 bits were drawn white and photographs lay on
    their side; and which fails for a stand-in such as ``mnist/test/mnist_00012.png``, although anomalib can draw the
    item's own image.

    Args:
        item: An item of anomalib's; others are returned as they are.

    Returns:
        The item with the image to draw, and without its path; without a mask where it is anomalous and its mask is
        empty, since where it is so nobody knows. What is very large is made smaller: a pixel of a map, or of a mask,
        is then the highest of some, so that a small defect stays to be seen.
    """
    if not isinstance(item, ImageItem | NumpyImageItem):
        return item
    if item.gt_label is not None and item.gt_label and item.gt_mask is not None and not item.gt_mask.any():
        item = item.update(in_place=False, gt_mask=None)
    if isinstance(item, ImageItem):
        for name in ("anomaly_map", "pred_mask", "gt_mask"):
            if (values := getattr(item, name)) is not None and (step := _step(values)) > 1:
                item = item.update(in_place=False, **{name: _highest(values, step)})
    if Path(item.image_path or "").is_file():
        picture = _smaller(_picture(item))
        for axis in (1, 2):  # anomalib takes an axis of one pixel away: such images failed, or were drawn on their side
            picture = picture.repeat_interleave(2, axis) if picture.shape[axis] == 1 else picture
        rgb = picture.expand(3, *picture.shape[1:])
        image: Any = rgb.permute(1, 2, 0).numpy() if isinstance(item, NumpyImageItem) else rgb / 255
        return item.update(in_place=False, image_path=None, image=image)
    if isinstance(item, SourcedImageItem | SourcedNumpyImageItem):
        return item.update(in_place=False, image_path=None)
    return item


def _picture(item: Any) -> Tensor:
    """Read an item's image for the eye, ``(C, H, W)``, ``uint8``, unless it has it, as one of a large photograph."""
    path, image = str(item.image_path), item.image
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and plain_max_value([path]) is None:
        return image.as_subclass(Tensor).cpu()
    return read_picture(path)


def _step(values: Tensor) -> int:
    """Of how many rows and columns one is drawn."""
    return math.ceil(max(values.shape[-2:]) / _MOST_DRAWN)


def _smaller(picture: Tensor) -> Tensor:
    """Average pixels of a large picture, ``(C, H, W)``, ``uint8``."""
    step = _step(picture)
    if step == 1:
        return picture
    planes = [np.asarray(PIL.Image.fromarray(plane).reduce(step)) for plane in picture.numpy()]
    return torch.from_numpy(np.stack(planes))


def _highest(values: Tensor, step: int) -> Tensor:
    """Take the highest of so many rows and columns, ``(..., H, W)``."""
    down, right = (-length % step for length in values.shape[-2:])
    whole = functional.pad(values, (0, right, 0, down), value=values.min().item()) if down or right else values
    height, width = whole.shape[-2:]
    return whole.reshape(*values.shape[:-2], height // step, step, width // step, step).amax((-3, -1))


def save_pictures(
    self: ImageVisualizer,
    trainer: Trainer,
    pl_module: Any,
    outputs: Any,
    batch: Any,
    batch_idx: int,
    dataloader_idx: int = 0,
) -> None:
    """Draw and save the images of a batch, in the folders that they are in, below the data set's own."""
    del outputs
    loaders = trainer.predict_dataloaders if trainer.predicting else trainer.test_dataloaders
    loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
    dataset = getattr(loader, "dataset", None)
    common, moved = _common_folder(dataset), moves_places(pl_module, dataset)
    # Not kept in `output_dir`, as anomalib does: the next run may write elsewhere.
    output = Path(trainer.default_root_dir) / "images" if self.output_dir is None else Path(self.output_dir)
    for number, item in enumerate(batch):
        drawn = item
        if moved:  # over the file the map would be at another place
            drawn = item.update(
                in_place=False, image_path=None, image=as_seen(item.image, transform_of(pl_module)).cpu()
            )
        picture: Any = visualizer.visualize_image_item(
            drawn,
            fields=self.fields,
            overlay_fields=self.overlay_fields,
            field_size=self.field_size,
            fields_config=self.fields_config,
            overlay_fields_config=self.overlay_fields_config,
            text_config=self.text_config,
        )
        if picture is None:
            continue
        path = output / _name(item.image_path or f"{dataloader_idx}-{batch_idx}-{number}.png", common)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            picture.save(file)


def _common_folder(dataset: Any) -> Path:
    """The folder above all images of a data set; above the only one, if all are in one, whose name says something."""
    while not hasattr(dataset, "samples") and hasattr(dataset, "dataset"):  # a part, or a wrapper
        dataset = dataset.dataset
    if dataset in _FOLDERS:
        return _FOLDERS[dataset]
    samples = getattr(dataset, "samples", None)
    paths: Iterable[Any] = getattr(dataset, "image_filenames", ())
    if isinstance(samples, pd.DataFrame) and "image_path" in samples:
        paths = samples["image_path"]
    folders = {_absolute(path).parent for path in paths}
    try:
        common = Path(os.path.commonpath(folders or [os.sep]))
    except ValueError:  # they are on several drives
        common = Path(os.sep)
    if len(folders) == 1:
        common = common.parent
    if isinstance(dataset, Dataset):
        _FOLDERS[dataset] = common
    return common


def _name(image_path: str | Path, common: Path) -> Path:
    path = _absolute(image_path)
    return path.relative_to(common if path.is_relative_to(common) else path.anchor)


def _absolute(path: str | Path) -> Path:
    """A path without dots; links stay, since a folder has its name from them."""
    return Path(os.path.normpath(Path(path).absolute()))
