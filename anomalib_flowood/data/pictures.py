# SPDX-License-Identifier: Apache-2.0
"""A file of its own for the picture of every image."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image import visualizer
from lightning.pytorch import Trainer
from torch.utils.data import Dataset

_FOLDERS: WeakKeyDictionary[Dataset, Path] = WeakKeyDictionary()


def _save_pictures(
    self: ImageVisualizer,
    trainer: Trainer,
    pl_module: Any,
    outputs: Any,
    batch: Any,
    batch_idx: int,
    dataloader_idx: int = 0,
) -> None:
    """Draw and save the images of a batch."""
    del pl_module, outputs
    loaders = trainer.predict_dataloaders if trainer.predicting else trainer.test_dataloaders
    loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
    common = _common_folder(getattr(loader, "dataset", None))
    # Not kept in `output_dir`, as anomalib does: the next run may write elsewhere.
    output = Path(trainer.default_root_dir) / "images" if self.output_dir is None else Path(self.output_dir)
    for number, item in enumerate(batch):
        picture: Any = visualizer.visualize_image_item(
            item,
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
        picture.save(path)


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
    common = Path(os.path.commonpath(folders or [os.sep]))
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
