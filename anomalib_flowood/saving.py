# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Lightning's trainers: each is written whole or not at all, and every fit ends with one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from anomalib_flowood.files import whole_file
from anomalib_flowood.trainers import field, is_trial

logger = logging.getLogger(__name__)


def save_whole(trainer: Trainer) -> None:
    """Let a trainer write checkpoints whole or not at all, unless it was given a writer of its own.

    Lightning writes to ``TMPDIR``, and copies the file from there if that is another disk: on a full disk a part of it
    is left, under the name of the whole.
    """
    writer: Any = trainer.strategy.checkpoint_io  # anomalib's loads in its own way, and saves in Lightning's
    if type(writer).save_checkpoint is TorchCheckpointIO.save_checkpoint:
        writer.save_checkpoint = save_checkpoint


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        checkpoint: What Lightning saves.
        path: The file; its folder is made if missing. What is not on this machine is left to Lightning.
        storage_options: As for Lightning's ``CheckpointIO``.

    Raises:
        OSError: If it cannot be written; the error has its path.
    """
    if "://" in str(path) or storage_options is not None:
        TorchCheckpointIO().save_checkpoint(checkpoint, path, storage_options)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file, file.open("wb") as opened:
        try:
            torch.save(checkpoint, opened)
        except RuntimeError as error:  # PyTorch's, of a file that it cannot go on writing
            reason = error.__context__
            if not isinstance(reason, OSError):
                raise
            raise OSError(reason.errno, reason.strerror, str(path)) from error


def keep_end(trainer: Trainer, *, whole: bool | None = None) -> None:
    """Write a checkpoint if a fit has ended without one, or with one that lacks what was fitted at its end.

    Nothing is written if the fit had nothing to train, or if the callback has chosen a checkpoint by a metric. The
    checkpoint that a fit was resumed from is not its own, though the callback names it.

    Args:
        trainer: The trainer of the fit, in each of its processes.
        whole: Whether the last checkpoint has all that a score needs; ``None`` if unknown. One that is written every
            few steps or minutes comes before the validation, and so never has what follows it.

    Raises:
        RuntimeError: If this version of Lightning keeps its state elsewhere.
    """
    callback: Any = trainer.checkpoint_callback
    if (
        is_trial(trainer)
        or not isinstance(callback, ModelCheckpoint)
        or not (callback.save_top_k or callback.save_last)
    ):
        return
    began, saved = field(callback, "_last_time_checked") is not None, field(callback, "_last_checkpoint_saved")
    if not began or callback.best_model_path in callback.best_k_models:
        return
    if saved and whole is not None and callback.monitor is None and not (whole and callback.every_n_epochs):
        _renew(trainer, callback)
    elif not saved and callback.save_top_k:
        metrics = field(callback, "_monitor_candidates")(trainer)
        callback.best_model_path = field(callback, "_get_metric_interpolated_filepath_name")(metrics, trainer)
        field(callback, "_save_checkpoint")(trainer, callback.best_model_path)
    elif saved and Path(callback.best_model_path).parent != Path(saved).parent:  # save_last has, and names no best one
        callback.best_model_path = saved


def _renew(trainer: Trainer, callback: Any) -> None:
    """Write the newest checkpoint again: in its place if it is of the last step, else as the callback would."""
    metrics = field(callback, "_monitor_candidates")(trainer)
    if callback.save_top_k and field(callback, "_last_global_step_saved") == trainer.global_step:
        field(callback, "_save_checkpoint")(trainer, callback.best_model_path)
    else:
        field(callback, "_save_topk_checkpoint")(trainer, metrics)
    field(callback, "_save_last_checkpoint")(trainer, metrics)


def say_if_kept_earlier(trainer: Trainer) -> None:
    """Warn if the newest checkpoint of a fit is older than the weights in memory.

    That is intended where the callback chooses by a metric.
    """
    callback: Any = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or callback.monitor is not None or not trainer.is_global_zero:
        return
    step = field(callback, "_last_global_step_saved")
    if 0 < step < trainer.global_step:
        logger.warning(
            "The checkpoint %s is of step %d, the last that a validation followed; the detector in memory, and a test "
            "of it, is of step %d. To make them the same, let a validation follow the last epoch: set max_epochs to a "
            "multiple of check_val_every_n_epoch.",
            callback.best_model_path, step, trainer.global_step,
        )  # fmt: skip
