# SPDX-License-Identifier: Apache-2.0
"""Images to predict on, read as a detector's training images were."""

from __future__ import annotations

from typing import Any

from anomalib.data import AnomalibDataModule
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from anomalib_flowood.data.datamodules import SourcedDataModule
from anomalib_flowood.data.path_dataset import PathDataset, resize_of, takes_bytes
from anomalib_flowood.data.skipping import SkippingDataset
from anomalib_flowood.names import subclasses
from anomalib_flowood.trainers import prediction_loaders


def read_as_trained(
    detector: nn.Module,
    datamodule: object = None,
    loaders: Any = None,
) -> None:
    """Let images be read as those that a detector was trained on.

    Args:
        detector: The detector. Those of this package know what white is in files of 16 bits.
        datamodule: A data module that is set up. Where no trainer has it, its images are resized as they are read.
        loaders: A data loader to predict on, or several; those of a :class:`PathDataset`, or of anomalib's
            ``PredictDataset``, read at the detector's size from now on.
    """
    transform = getattr(getattr(detector, "pre_processor", None), "transform", None)
    if isinstance(datamodule, AnomalibDataModule) and datamodule.trainer is None and transform is not None:
        # What anomalib does where there is a trainer. Else a batch would be held full-size, and of one size only.
        for part in ("train", "val", "test"):
            if hasattr(datamodule, f"{part}_data"):
                augmentations = getattr(datamodule, f"{part}_augmentations")
                dataset = getattr(datamodule, f"{part}_data")
                datamodule._update_subset_augmentations(dataset, augmentations, transform)
                if isinstance(datamodule, SourcedDataModule):
                    dataset.keep_bytes = takes_bytes(detector)
    if hasattr(detector, "max_value"):
        max_value: Any = detector.max_value
        if isinstance(datamodule, SourcedDataModule):
            datamodule.read_for(max_value)
        _read_paths(detector, loaders, max_value)


def _read_paths(detector: nn.Module, loaders: Any, max_value: int | None) -> None:
    # A trainer may have a data module in their place.
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        dataset = getattr(loader, "dataset", None)
        dataset = dataset.dataset if isinstance(dataset, SkippingDataset) else dataset
        if type(dataset) is PathDataset.__base__:  # anomalib's, whose __getitem__ knows neither of both
            dataset.__class__ = PathDataset
        if isinstance(dataset, PathDataset):
            dataset.read_for(resize_of(detector), max_value, keep_bytes=takes_bytes(detector))


class ReadAsTrained(Callback):
    """Lets any detector predict by path with the white of the data module it was trained on: its checkpoint has it."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell the data set of a prediction by path; Lightning tells a data module."""
        states = [checkpoint.get(kind.__qualname__) for kind in subclasses(SourcedDataModule)]
        state = next((state for state in states if state), None)
        if state is not None:
            _read_paths(pl_module, prediction_loaders(trainer), state["max_value"])
