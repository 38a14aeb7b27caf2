# SPDX-License-Identifier: Apache-2.0
"""A few normal images, kept for checks of later exports."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional

from anomalib_flowood.checks import check_batch
from anomalib_flowood.data.items import in_unit_range
from anomalib_flowood.data.path_dataset import size_read
from anomalib_flowood.trainers import training_loaders, validation_loaders

from .flow_model import FlowModel
from .mixin import Mixin

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_CHECK_IMAGES = 5
_CHECK_PIXELS = 2**22
"""Pixels that a checkpoint keeps at most: there are fewer images of large ones."""
_CHECK_KEY = "anomalib_flowood_check_images"


class KeepsImages(Mixin):
    """Takes a few normal images from the validation set when a fit begins, and keeps them in checkpoints."""

    model: FlowModel
    check_images: Tensor | None = None
    """Normal images as an export is given them, ``(n, 3, H, W)``, uint8; ``None`` if they are too large to keep."""

    def on_fit_start(self) -> None:
        """Keep a few normal images for checks of later exports."""
        super().on_fit_start()
        trainer: Trainer = self.trainer
        height, width = self.input_size or (1, 1)
        count = min(_CHECK_IMAGES, _CHECK_PIXELS // (height * width))
        images = list(_normal_images(_image_loader(trainer), count))
        if images:
            read = size_read(self) or ()
            size = list(read if len(read) == 2 else images[0].shape[-2:])
            resized = [functional.resize(image, size, antialias=True) for image in images]
            self.check_images = (torch.stack(resized).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the images for checks."""
        super().on_save_checkpoint(checkpoint)
        if self.check_images is not None:
            checkpoint[_CHECK_KEY] = self.check_images

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the images for checks."""
        super().on_load_checkpoint(checkpoint)
        self.check_images = checkpoint.get(_CHECK_KEY)


def _image_loader(trainer: Trainer) -> DataLoader | None:
    """The loader of the validation images, or of the training images where there is no validation."""
    for find in (validation_loaders, training_loaders):
        loaders = find(trainer)
        if loaders and isinstance(loaders[0], DataLoader):
            return loaders[0]
    return None


def _normal_images(loader: DataLoader | None, count: int) -> Iterator[Tensor]:
    """Yield so many normal images of a loader, ``(3, H, W)``, without workers or the training's random numbers."""
    if loader is None:
        return
    # One at a time, since images may differ in size. A loader that takes whole batches out of its data set goes as is.
    single = loader
    if loader.batch_size is not None:
        single = DataLoader(loader.dataset, batch_size=1, collate_fn=loader.collate_fn)
    with torch.random.fork_rng(devices=[]):
        for batch in islice(single, 20 * count):
            check_batch(batch)
            labels = batch.gt_label
            normal = torch.ones(len(batch.image), dtype=torch.bool) if labels is None else ~labels.bool()
            for image in batch.image[normal.cpu()][:count]:
                yield in_unit_range(image)
                count -= 1
            if count <= 0:
                return
