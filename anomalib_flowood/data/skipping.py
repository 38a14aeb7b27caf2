# SPDX-License-Identifier: Apache-2.0
"""Predictions that go on where a file cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from anomalib_flowood.data.decoding import UnreadableImageError
from anomalib_flowood.data.path_dataset import PathDataset, resize_of

logger = logging.getLogger(__name__)


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
        arguments: Further arguments of anomalib's ``Engine.predict``: else a data loader as ``dataloaders``, or a
            ``datamodule``.

    Returns:
        The arguments to predict with, and a dictionary that will hold path and message of each file left out.
    """
    errors: dict[str, str] = {}
    loader, datamodule = arguments.get("dataloaders"), arguments.get("datamodule")
    if data_path is not None:
        resize = resize_of(model)
        dataset = PathDataset(data_path, resize=resize, max_value=getattr(model, "max_value", None))
        loader = DataLoader(dataset, batch_size=batch_size if resize else 1, collate_fn=dataset.collate_fn)
    if loader is not None:
        arguments["dataloaders"] = _skipping(loader, errors)
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
        collate_fn=_pass_on,
    )


def _pass_on(batch: Any) -> Any:
    """Return a batch as it is: the data set has collated it."""
    return batch
