# SPDX-License-Identifier: Apache-2.0
"""Images to predict on: those below a path, read as a detector's training images were; and what cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule, ImageItem, PredictDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.engine import engine
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import Resize, Transform

from anomalib_flowood.data.datamodules import CrossDataset, OneClass
from anomalib_flowood.data.datasets import SourcedDataset
from anomalib_flowood.data.decoding import UnreadableImageError, image_files
from anomalib_flowood.data.sources import Images

logger = logging.getLogger(__name__)


class PathDataset(PredictDataset):
    """The images of a folder, or one image, read as our data modules read theirs.

    anomalib's engine takes it in the place of its own data set wherever this package is imported, so that
    ``Engine.predict(data_path=…)`` reads so too.

    Args:
        path: A folder, searched by the rule of :func:`~anomalib_flowood.data.decoding.image_files`, or a file.
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
        path = Path(path)
        if not path.exists():
            msg = f"There is no file or folder {path} (looked for it from {Path.cwd()})."
            raise FileNotFoundError(msg)
        # Not by anomalib's constructor, which would search the folder by another rule.
        self.image_filenames = image_files(path) if path.is_dir() else [path]
        if not self.image_filenames:
            msg = f"There are no images in {path}."
            raise FileNotFoundError(msg)
        self.transform = transform
        self.image_size = image_size
        self.read_for(resize, max_value)

    def read_for(self, resize: Resize | None, max_value: int | None) -> None:
        """Read images from now on at another size, with another white; see the class."""
        images = Images("", [str(path) for path in self.image_filenames], max_value=max_value)
        self._data = SourcedDataset(images, 0, "predict", augmentations=resize)

    def __getitem__(self, index: int) -> ImageItem:
        """Get one item: image of shape ``(3, H, W)``, ``float32`` in [0, 1].

        Raises:
            UnreadableImageError: If the file cannot be read, with its path.
        """
        item = self._data[index]
        image = item.image if self.transform is None else self.transform(item.image)
        return ImageItem(image=image, image_path=item.image_path)

    def __getitems__(self, indices: Sequence[int]) -> list[ImageItem]:
        """Get items; errors as for one of them."""
        return [self[index] for index in indices]


class SkippingDataset(Dataset):
    """A data set that leaves out of its batches what cannot be read.

    Args:
        dataset: Any whose items raise :class:`~anomalib_flowood.data.decoding.UnreadableImageError`.
        collate: Makes a batch of its items.
        errors: Where a :class:`SkippingLoader` notes path and message of each file that it leaves out.
    """

    def __init__(self, dataset: Any, collate: Callable, errors: dict[str, str]) -> None:
        self.dataset = dataset
        self.collate = collate
        self.errors = errors

    def __len__(self) -> int:
        """Number of images, readable or not."""
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Any, list[tuple[str, str]]]:
        """Get a batch, ``None`` if nothing of it can be read; path and message of what cannot."""
        dataset = self.dataset
        try:
            whole = dataset.__getitems__(indices) if hasattr(dataset, "__getitems__") else [dataset[i] for i in indices]
            return self.collate(whole), []
        except UnreadableImageError:
            read = [self._read(index) for index in indices]
        items = [item for item in read if not isinstance(item, UnreadableImageError)]
        errors = [(error.path, str(error)) for error in read if isinstance(error, UnreadableImageError)]
        return self.collate(items) if items else None, errors

    def _read(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except UnreadableImageError as error:
            return error


class SkippingLoader(DataLoader):
    """A data loader that goes on where a file of its :class:`SkippingDataset` cannot be read, and names it."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of what can be read."""
        dataset: Any = self.dataset
        for batch, errors in super().__iter__():
            for path, message in errors:
                logger.error("%s", message)
                dataset.errors[path] = message
            if batch is not None:
                yield batch


def skipping_arguments(
    model: Any, data_path: str | Path | None = None, batch_size: int = 1, **arguments: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Let a prediction go on where a file cannot be read.

    Args:
        model: The detector.
        data_path: Image or folder to predict on, if that is what there is.
        batch_size: Images of such a folder to predict on at once, if the detector resizes them to one size.
        arguments: Further arguments of anomalib's ``Engine.predict``: ``dataloaders`` or ``datamodule`` else.

    Returns:
        The arguments to predict with, and a dictionary that will hold path and message of each file left out.
    """
    errors: dict[str, str] = {}
    loaders, datamodule = arguments.get("dataloaders"), arguments.get("datamodule")
    if data_path is not None:
        resize = resize_of(model)
        dataset = PathDataset(data_path, resize=resize, max_value=getattr(model, "max_value", None))
        loaders = DataLoader(dataset, batch_size=batch_size if resize else 1, collate_fn=dataset.collate_fn)
    if loaders is not None:
        arguments["dataloaders"] = [
            _skipping(loader, errors) for loader in ([loaders] if isinstance(loaders, DataLoader) else loaders)
        ]
    elif datamodule is not None:
        predict_dataloader = datamodule.predict_dataloader
        datamodule.predict_dataloader = lambda: _skipping(predict_dataloader(), errors)
    return {"model": model, **arguments}, errors


def _skipping(loader: DataLoader, errors: dict[str, str]) -> DataLoader:
    if loader.batch_size is None:  # batches by somebody's own rule
        return loader
    return SkippingLoader(
        SkippingDataset(loader.dataset, loader.collate_fn, errors),
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        collate_fn=_as_it_is,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def resize_of(detector: nn.Module) -> Resize | None:
    """The resize that a detector's pre-processing begins with, or nothing."""
    transform = getattr(getattr(detector, "pre_processor", None), "transform", None)
    resizes = extract_transforms_by_type(transform, Resize) if transform is not None else []
    return resizes[0] if resizes else None


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
                datamodule._update_subset_augmentations(getattr(datamodule, f"{part}_data"), augmentations, transform)
    if hasattr(detector, "max_value"):
        max_value: Any = detector.max_value
        if isinstance(datamodule, CrossDataset | OneClass):
            datamodule.read_for(max_value)
        _read_paths(detector, loaders, max_value)


def _read_paths(detector: nn.Module, loaders: Any, max_value: int | None) -> None:
    # A trainer may have a data module in their place.
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        dataset = getattr(loader, "dataset", None)
        dataset = dataset.dataset if isinstance(dataset, SkippingDataset) else dataset
        if type(dataset) is PredictDataset:  # anomalib's, whose __getitem__ knows neither of both
            dataset.__class__ = PathDataset
        if isinstance(dataset, PathDataset):
            dataset.read_for(resize_of(detector), max_value)


class ReadAsTrained(Callback):
    """Lets any detector predict by path with the white of the data module it was trained on: its checkpoint has it."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell the data set of a prediction by path; Lightning tells a data module."""
        states = [checkpoint.get(kind.__qualname__) for kind in (CrossDataset, OneClass)]
        state = next((state for state in states if state), None)
        if state is not None:
            _read_paths(pl_module, trainer.predict_loop._data_source.instance, state["max_value"])


def predict_by_path() -> None:
    """Let anomalib's ``Engine.predict(data_path=…)`` read as our data modules do."""
    engine.PredictDataset = PathDataset  # type: ignore[misc]
