# SPDX-License-Identifier: Apache-2.0
"""What looks on while a detector is trained and tested."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.models import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional

from anomalib_flowood.benchmark import ScoreRecorder

from .stores import mapped

LEVEL, PATIENCE = 0.005, 3
"""Levelled off: no improvement of more than this share in so many epochs."""
SPEED_BATCH = 32
"""Images that are kept to measure the speed on."""


class Recorder(ScoreRecorder):
    """Keeps raw scores, as in ``flowood benchmark``; also raw maps and masks, and some images to measure the speed on.

    Args:
        size: Height and width of the maps that are kept.
        folder: Where to keep maps, in files and not in memory; without it they are not kept, nor are maps of images
            without masks.
    """

    def __init__(self, size: int, folder: Path | None = None) -> None:
        super().__init__()
        self.size, self.folder = size, folder
        self.images: list[Tensor] = []
        self.maps: Tensor | None = None
        self.masks: Tensor | None = None
        self._filled = 0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        super().on_test_start(trainer, pl_module)
        self.maps = self.masks = None
        self._filled = 0

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep images before they are pre-processed."""
        del trainer, pl_module, batch_idx, dataloader_idx
        if sum(map(len, self.images)) < SPEED_BATCH:
            self.images.append(batch.image.clone())

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's scores and maps."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        loader: Any = trainer.test_dataloaders
        maps = getattr(outputs, "anomaly_map", None)
        if self.folder is None or maps is None or batch.gt_mask is None:
            return
        if self.maps is None or self.masks is None:
            shape = (len(loader.dataset), self.size, self.size)
            self.maps = mapped(self.folder / "maps.bin", shape)
            self.masks = mapped(self.folder / "masks.bin", shape, torch.uint8)
        maps = maps.detach().float().reshape(len(maps), 1, *maps.shape[-2:])
        if maps.shape[-2:] != (self.size, self.size):
            maps = functional.interpolate(maps, (self.size, self.size), mode="bilinear", align_corners=False)
        masks = batch.gt_mask.reshape(len(maps), 1, *batch.gt_mask.shape[-2:])
        masks = functional.interpolate(masks.float(), (self.size, self.size), mode="nearest")
        end = self._filled + len(maps)
        self.maps[self._filled : end] = maps[:, 0]
        self.masks[self._filled : end] = (masks[:, 0] > 0.5).byte()
        self._filled = end


class UntilLevel(Callback):
    """Ends a training when the loss on held-out normal images has levelled off, or the time is up.

    Args:
        loss: The loss of a batch of pre-processed images.
        seconds: The time, measured on the wall from the first batch on.
    """

    def __init__(self, loss: Callable[[AnomalibModule, Tensor], Tensor], seconds: float) -> None:
        self.loss, self.seconds = loss, seconds
        self.losses: list[float] = []
        self.stopped_by = ""
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        del pl_module, args, kwargs
        if time.perf_counter() - self._start > self.seconds:
            self.stopped_by = "time"
            trainer.should_stop = True

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the loss."""
        if self.stopped_by:
            return
        total, count = 0.0, 0
        module: Any = pl_module
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            images = module.pre_processor.transform(batch.image)
            total += float(self.loss(module, images)) * len(images)
            count += len(images)
        self.losses.append(total / count)
        if levelled_off(self.losses):
            self.stopped_by = "levelled off"
            trainer.should_stop = True


def levelled_off(losses: Sequence[float], share: float = LEVEL, patience: int = PATIENCE) -> bool:
    """Whether none of the last ``patience`` losses is lower than the best before it by more than ``share`` of it."""
    best, stale = math.inf, 0
    for loss in losses:
        if best == math.inf or loss < best - share * abs(best):
            best, stale = loss, 0
        else:
            stale += 1
    return stale >= patience
