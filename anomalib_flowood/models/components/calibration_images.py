# SPDX-License-Identifier: Apache-2.0
"""How many images a validation can calibrate on, and how there can be more."""

from __future__ import annotations

from typing import Any

from lightning import Trainer

from anomalib_flowood import conformal
from anomalib_flowood.trainers import validation_loaders


def how_to_have_more(trainer: Any, images: int, alpha: float) -> str:
    """What gives more calibration images, in the words of the data module where they are its validation images."""
    data: Any = getattr(trainer, "datamodule", None)  # maybe that of an earlier fit
    needed = conformal.images_needed(alpha)
    if hasattr(data, "how_to_hold_out"):
        datasets = [loader.dataset for loader in validation_loaders(trainer)]
        if len(data.val_data) == images and datasets == [data.val_data]:
            return data.how_to_hold_out(needed)
    return f"hold out {needed - images} more {conformal.BY_DATA_MODULE}"


def most_calibration_images(trainer: Trainer) -> int | None:
    """The most images that a validation can calibrate on; ``None`` if there is no validation, or nobody knows."""
    limit = trainer.limit_val_batches
    loaders = validation_loaders(trainer)
    if not loaders:
        return None
    total = 0
    for loader in loaders:
        dataset, batch_size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
        if not hasattr(dataset, "__len__") or batch_size is None:
            return None
        samples = getattr(dataset, "samples", None)  # anomalib's table
        labels = None if samples is None else getattr(samples, "label_index", None)
        normal = len(dataset) if labels is None else int((labels == 0).sum())  # type: ignore[arg-type]
        batches = limit if isinstance(limit, int) else int(limit * len(loader))
        total += min(normal, batches * batch_size)
    return total
