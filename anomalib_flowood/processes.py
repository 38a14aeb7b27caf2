# SPDX-License-Identifier: Apache-2.0
"""Several processes that work on one data set, as Lightning's strategies start them: what each has, brought together.

Lightning deals the images of a validation, a test and a prediction out one by one: place i of rank r is place
``i * ranks + r`` of the data set, and where the ranks would have differently many, the first images come once more.
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
    """Which one this is, from 0 on."""
    return distributed.get_rank() if ranks() > 1 else 0


def gathered(rows: Tensor) -> Tensor:
    """All processes' rows, ``(N, ...)``, rank by rank; their numbers may differ."""
    return torch.cat(gather_all_tensors(rows)) if ranks() > 1 else rows


def gathered_objects(value: Any) -> list[Any]:
    """What each process has, in the order of their ranks."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    distributed.all_gather_object(values, value)
    return values


def in_data_set_order(rows: pd.DataFrame) -> pd.DataFrame:
    """The table of all processes, its rows in the order of the data set, where each has those of its images."""
    tables = gathered_objects(rows)
    if len(tables) == 1:
        return rows
    places = [
        place for number, table in enumerate(tables) for place in range(number, len(table) * len(tables), len(tables))
    ]
    whole = pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
    return whole.iloc[pd.Series(places).argsort(kind="stable")].reset_index(drop=True)


def from_rank_zero(values: Sequence[Tensor]) -> None:
    """Give tensors the values that they have in the process of rank 0."""
    if ranks() > 1:
        for value in values:
            distributed.broadcast(value, src=0)


def own_rows(trainer: Trainer, batch_number: int, rows: int, loader_number: int = 0) -> int:
    """How many of a batch's rows are images of this process, and not some that come once more, which are its last.

    Args:
        trainer: Lightning's, which validates or tests.
        batch_number: Which of this process's batches it is.
        rows: Its rows.
        loader_number: Which of the trainer's loaders the batch is from.
    """
    if ranks() == 1:
        return rows
    loader = loader_of(trainer, loader_number)
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last or is_dealt_once(sampler):
        return rows
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    return max(0, min(rows, own - batch_number * loader.batch_size))


def cut(batch: Any, rows: int) -> None:
    """Keep the first rows of a batch, whatever it holds of its images."""
    have = len(batch.pred_score)
    if rows == have:
        return
    for name, value in vars(batch).items():
        if isinstance(value, tuple):
            setattr(batch, name, tuple(part[:rows] for part in value))
        elif isinstance(value, Tensor | list) and len(value) == have:
            setattr(batch, name, value[:rows])


def batch_size_of(loader: DataLoader) -> int:
    """Images of a loader's batches, which a sampler of batches may know alone."""
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32


def shares(loader: DataLoader, batches: int | None = None, single: bool = False) -> tuple[DataLoader, list[int]]:
    """Let each process read a share of a loader's images: batches by turns, so that, rank by rank, they are in order.

    Args:
        loader: It may shuffle: the images come in the order of the data set all the same.
        batches: No more than so many of its batches. Of a loader that shuffles, the images are then drawn, always the
            same ones.
        single: Read one image at a time, whatever the loader's batches are.

    Returns:
        The loader of this process, of as many batches as the others', and how many images of each are to be taken:
        where there is none left for this process, its batch is there for the number alone.

    Raises:
        TypeError: If the loader makes no batches.
    """
    if loader.batch_sampler is None:
        raise TypeError(SINGLE_IMAGES)
    size = batch_size_of(loader)
    sampler: Any = loader.sampler if loader.batch_size is not None else getattr(loader.batch_sampler, "sampler", None)
    shuffled = isinstance(sampler, RandomSampler) or getattr(sampler, "shuffle", False)
    if isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler):
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
    own = DataLoader(
        loader.dataset,
        batch_sampler=[part or rows[:1] for part in parts],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),  # so that none is drawn of those that the training draws
    )
    return own, [len(part) for part in parts]


class DrawnShare(DistributedSampler):
    """Rows that are drawn with replacement, in every epoch anew: for each process others, and equally many.

    Args:
        rows: What they are rows of.
        number: How many each process gets.
    """

    def __init__(self, rows: Dataset, number: int) -> None:
        super().__init__(rows, seed=int(os.environ.get("PL_GLOBAL_SEED", "0")))  # Lightning's
        self.num_samples = number

    def __iter__(self) -> Iterator[int]:
        """Draw them."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.randint(len(self.dataset), (self.num_replicas, self.num_samples), generator=generator)  # type: ignore[arg-type]
        return iter(drawn[self.rank].tolist())


def agreed_folder(name: str, make: Callable[[], Path]) -> Path:
    """The folder that rank 0 has made, before Lightning starts the others, which inherit its environment.

    Args:
        name: What it is for.
        make: Makes it.
    """
    variable = f"FLOWOOD_FOLDER_{name.upper()}"
    if was_started() and variable in os.environ:
        return Path(os.environ[variable])
    folder = make()
    os.environ[variable] = str(folder.absolute())
    return folder
