# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks' fits share."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from anomalib.engine import Engine
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer


def quiet_engine(
    folder: str | Path, callbacks: Sequence[Callback], accelerator: str = "cpu", **arguments: Any
) -> Engine:
    """Return an engine on one device that logs, shows and keeps nothing.

    Args:
        folder: Where it may write.
        callbacks: What looks on.
        accelerator: Lightning's.
        **arguments: More of the engine's.
    """
    return Engine(
        accelerator=accelerator,
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what anomalib and Lightning have to say about every fit."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


class TimeLimit(Timer):
    """Ends a training after a number of seconds, over which the learning rate follows a cosine down to zero.

    The detectors' own cosine is over the trainer's steps, and how many fit into the time nobody knows beforehand.

    Args:
        seconds: Time from the first batch on; ``None`` to measure it only.
    """

    def __init__(self, seconds: float | None) -> None:
        super().__init__(None if seconds is None else timedelta(seconds=seconds), verbose=False)
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate."""
        del batch, batch_idx
        if self.seconds is None:
            return
        detector: Any = pl_module
        share = min(1.0, self.time_elapsed() / self.seconds)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = detector.learning_rate * (1 + math.cos(math.pi * share)) / 2


def trained_epochs(trainer: Trainer) -> float:
    """Epochs trained, a broken-off one by its share."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    return round(batches / max(1, trainer.num_training_batches), 2)


def clock_time(seconds: float) -> str:
    """Write a duration as hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
