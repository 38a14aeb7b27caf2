# SPDX-License-Identifier: Apache-2.0
"""What is replaced in anomalib."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import anomalib.data.utils
import numpy as np
import torch
from anomalib.data import ImageItem, NumpyImageItem
from anomalib.data.utils import image as anomalib_images
from anomalib.engine import engine
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image import visualizer
from torchvision.transforms.v2.functional import to_dtype, to_image

from anomalib_flowood.data.decoding import read_image, read_picture
from anomalib_flowood.data.items import SourcedImageItem, SourcedNumpyImageItem
from anomalib_flowood.data.path_dataset import PathDataset
from anomalib_flowood.data.pictures import _save_pictures


def _read_for_anomalib(path: str | Path, as_tensor: bool = False) -> torch.Tensor | np.ndarray:
    """Read an RGB image, as anomalib's function of this name does, but by our reader.

    Args:
        path: Path of the file.
        as_tensor: Whether to return a tensor of shape ``(3, H, W)``, ``float32``, and not an array ``(H, W, 3)``.

    Returns:
        The image in [0, 1].

    Raises:
        UnreadableImageError: As for :func:`read_image`.
    """
    image = read_image(path)
    image = image.expand(3, *image.shape[1:])
    if as_tensor:
        return to_dtype(to_image(image), torch.float32, scale=True)
    return image.permute(1, 2, 0).numpy() / 255.0


def read_for_anomalib() -> None:
    """Let anomalib's data modules and inferencers read images by our reader.

    Theirs clips 16 bits and floats, ignores how the camera was held, and hangs on a pipe. 8-bit images are read as
    before, number by number.
    """
    original = anomalib_images.read_image
    if original is _read_for_anomalib:
        return
    # Many of its modules have imported the function by its name.
    for name, module in list(sys.modules.items()):
        if name.startswith("anomalib.") and getattr(module, "read_image", None) is original:
            module.read_image = _read_for_anomalib  # type: ignore[attr-defined]
    anomalib.data.utils.read_image = _read_for_anomalib


def show_images() -> None:
    """Let anomalib's visualiser draw images as our reader reads them, and images that have no file.

    It opens ``image_path`` again: by a reader of its own, so that 16 bits were drawn white and photographs lay on their
    side; and which fails for a stand-in such as ``mnist/test/mnist_00012.png``, although it can draw the item's own
    image.
    """
    draw = visualizer.visualize_image_item

    @functools.wraps(draw)
    def draw_item(item: ImageItem, *args: Any, **kwargs: Any) -> Any:
        if isinstance(item, ImageItem | NumpyImageItem):
            if Path(item.image_path or "").is_file():
                picture = read_picture(str(item.image_path))
                rgb = picture.expand(3, *picture.shape[1:])
                image: Any = rgb.permute(1, 2, 0).numpy() if isinstance(item, NumpyImageItem) else rgb / 255
                item = item.update(in_place=False, image_path=None, image=image)
            elif isinstance(item, SourcedImageItem | SourcedNumpyImageItem):
                item = item.update(in_place=False, image_path=None)
        return draw(item, *args, **kwargs)

    visualizer.visualize_image_item = draw_item  # type: ignore[assignment]


def predict_by_path() -> None:
    """Let anomalib's ``Engine.predict(data_path=…)`` read as our data modules do."""
    engine.PredictDataset = PathDataset  # type: ignore[misc]


def keep_pictures_apart() -> None:
    """Let anomalib's visualiser save pictures in the folders that their images are in, below the data set's own.

    It names a picture after the image's file and its last folder, so that ``lot2/good/000.png`` overwrites
    ``lot1/good/000.png``.
    """
    ImageVisualizer.on_test_batch_end = _save_pictures  # type: ignore[method-assign]
