# SPDX-License-Identifier: Apache-2.0
"""Several processes that work on one data set, as Lightning's strategies start them: gathering what each has.

In validation, test and prediction Lightning deals the images out one by one: image i of rank r is image
``i * ranks + r`` of the data set, and where the ranks would get different numbers, the first images are repeated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Trainer
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler
from torchmetrics.utilities.distributed import gather_all_tensors

from anomalib_flowood.checks import SINGLE_IMAGES
from anomalib_flowood.started import was_started
from anomalib_flowood.trainers import is_dealt_once, loader_of


def ranks() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if ranks() > 1 else 0


def gathered(rows: Tensor) -> Tensor:
    """All processes' rows, ``(N, ...)``, rank by rank; how many each has may differ."""
    return torch.cat(gather_all_tensors(rows)) if ranks() > 1 else rows


def gathered_objects(value: Any) -> list[Any]:
    """All processes' values, in the order of their ranks."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    distributed.all_gather_object(values, value)
    return values


def in_data_set_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Merge the processes' tables, each with the rows of its own images, into one in the order of the data set."""
    tables = gathered_objects(rows)
    if len(tables) == 1:
        return rows
    places = [
        place for number, table in enumerate(tables) for place in range(number, len(table) * len(tables), len(tables))
    ]
    whole = pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
    return whole.iloc[pd.Series(places).argsort(kind="stable")].reset_index(drop=True)


def from_rank_zero(values: Sequence[Tensor]) -> None:
    """Overwrite tensors with their values in the process of rank 0."""
    if ranks() > 1:
        for value in values:
            distributed.broadcast(value, src=0)


def own_rows(trainer: Trainer, batch_number: int, rows: int, loader_number: int = 0) -> int:
    """How many rows of a batch are not repeated images, which come last.

    Args:
        trainer: The trainer, which validates or tests.
        batch_number: The number of the batch in this process.
        rows: The batch's rows.
        loader_number: The number of the loader that the batch is from.
    """
    if ranks() == 1:
        return rows
    loader = loader_of(trainer, loader_number)
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)  # also of a user's batch sampler
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last or is_dealt_once(sampler):
        return rows
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    return max(0, min(rows, own - batch_number * batch_size_of(loader)))


def cut(batch: Any, rows: int) -> None:
    """Keep the first rows of a batch, in all its fields."""
    have = len(batch.pred_score)
    if rows == have:
        return
    for name, value in vars(batch).items():
        if isinstance(value, tuple):
            setattr(batch, name, tuple(part[:rows] for part in value))
        elif isinstance(value, Tensor | list) and len(value) == have:
            setattr(batch, name, value[:rows])


def batch_size_of(loader: DataLoader) -> int:
    """Images in a batch of a loader, which only its batch sampler may know."""
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32


def shares(loader: DataLoader, batches: int | None = None, single: bool = False) -> tuple[DataLoader, list[int]]:
    """Let the processes take turns at a loader's batches, so that gathering rank by rank restores their order.

    Args:
        loader: It may shuffle: the images come in the order of the data set all the same.
        batches: The most of its batches to read. Of a loader that shuffles, the images are then a random sample, the
            same in every call.
        single: Read one image at a time, whatever the loader's batch size.

    Returns:
        A loader for this process, with as many batches as those of the others, and how many images of each batch to
        use: 0 for a batch that only fills up the number.

    Raises:
        TypeError: If the loader makes no batches.
    """
    if loader.batch_sampler is None:
        raise TypeError(SINGLE_IMAGES)
    size = batch_size_of(loader)
    sampler: Any = getattr(loader.batch_sampler, "sampler", None)
    shuffled = isinstance(sampler, RandomSampler) or getattr(sampler, "shuffle", False)
    if in_order(loader):
        rows = list(range(len(loader.dataset)))  # type: ignore[arg-type]
    else:
        batch_sampler: Any = loader.batch_sampler
        rows = gathered_objects([row for batch in batch_sampler for row in batch])[0]
    if batches is not None and batches * size < len(rows):
        drawn = (
            torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
            if shuffled
            else torch.arange(len(rows))
        )
        rows = [rows[place] for place in drawn[: batches * size].sort().values.tolist()]
    size = 1 if single else size
    turns = range(rank() * size, len(rows) + rank() * size, ranks() * size)
    parts = [rows[start : start + size] for start in turns]
    own = same_images(loader, batch_sampler=[part or rows[:1] for part in parts])
    return own, [len(part) for part in parts]


def in_order(loader: DataLoader) -> bool:
    """Whether :func:`shares` reads the images of a loader in the order of its data set, each once."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    return isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler)


def same_images(loader: DataLoader, **batches: Any) -> DataLoader:
    """Return another loader of the same images, which draws no random number that the training would draw.

    Args:
        loader: It says how its images are read.
        **batches: How images come in batches: ``batch_sampler``, or ``batch_size`` and ``sampler``.
    """
    return DataLoader(
        loader.dataset,
        **batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )


class DrawnShare(DistributedSampler):
    """Draws rows with replacement, anew in every epoch: different ones for each process, and equally many.

    Args:
        rows: The data set.
        number: How many rows each process gets.
    """

    def __init__(self, rows: Dataset, number: int) -> None:
        super().__init__(rows, seed=int(os.environ.get("PL_GLOBAL_SEED", "0")))  # Lightning's
        self.num_samples = number

    def __iter__(self) -> Iterator[int]:
        """Draw the rows of this process."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.randint(len(self.dataset), (self.num_replicas, self.num_samples), generator=generator)  # type: ignore[arg-type]
        return iter(drawn[self.rank].tolist())


def agreed_folder(name: str, make: Callable[[], Path]) -> Path:
    """Return the folder that rank 0 made before Lightning started the other processes, which inherit its environment.

    Args:
        name: What the folder is for.
        make: Makes it, in rank 0.
    """
    variable = f"FLOWOOD_FOLDER_{name.upper()}"
    if was_started() and variable in os.environ:
        return Path(os.environ[variable])
    folder = make()
    os.environ[variable] = str(folder.absolute())
    return folder
