# SPDX-License-Identifier: Apache-2.0
"""Lightning's trainers: which loaders they have, before they are asked for a batch, and others in their place.

What Lightning gives is reached by its public names. It has none for the loaders of a fit as they were made, before each
device got its share of them, none for others in their place once the fit has begun, none for the table of a test, none
for averaged weights, and none for whether a fit has left a checkpoint.
(``trainer.datamodule`` does not do: it stays that of an earlier run where a later one gets loaders.) These are reached
here and nowhere else, and the versions that have them bound those that this package takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Sampler

from anomalib_flowood.files import whole_file

logger = logging.getLogger(__name__)


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to, if it is."""
    try:
        return module.trainer
    except RuntimeError:  # Lightning's, of a module without one
        return None


def callbacks_of(trainer: Trainer) -> list[Any]:
    """The callbacks of a trainer, which has them without a type."""
    return trainer.callbacks  # type: ignore[attr-defined]


def is_trial(trainer: Any) -> bool:
    """Whether a trainer runs a batch or two to see that everything works, of which nothing is kept.

    Lightning does not declare the attribute.
    """
    return bool(trainer.fast_dev_run)


def save_whole(trainer: Trainer) -> None:
    """Let a trainer's checkpoints appear whole or not at all, unless it was given a way of its own to write them.

    Lightning's goes through ``TMPDIR``, from where a checkpoint is copied if that is another disk: one that is full by
    then keeps a part of it, under the name of the whole.
    """
    writer: Any = trainer.strategy.checkpoint_io  # anomalib's loads in its own way, and saves in Lightning's
    if type(writer).save_checkpoint is TorchCheckpointIO.save_checkpoint:
        writer.save_checkpoint = save_checkpoint


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        checkpoint: What Lightning saves.
        path: The file, on this machine's disks; its folder is made if missing. Lightning writes to other places.
        storage_options: As for Lightning's ``CheckpointIO``.

    Raises:
        OSError: If it cannot be written, with its path.
    """
    if "://" in str(path) or storage_options is not None:
        TorchCheckpointIO().save_checkpoint(checkpoint, path, storage_options)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file, file.open("wb") as opened:
        try:
            torch.save(checkpoint, opened)
        except RuntimeError as error:  # of a writer that could not write on
            reason = error.__context__
            if not isinstance(reason, OSError):
                raise
            raise OSError(reason.errno, reason.strerror, str(path)) from error


def keep_end(trainer: Trainer) -> None:
    """Write a checkpoint of a fit that has ended without one, as where no validation followed its last epoch.

    None of a fit that had nothing to train, nor where the callback chooses by a metric, and has chosen. What a resumed
    fit began with is none of its own, though the callback names it.

    Args:
        trainer: The trainer of the fit, in each of its processes.

    Raises:
        RuntimeError: If this version of Lightning knows elsewhere what has been done.
    """
    callback: Any = trainer.checkpoint_callback
    if is_trial(trainer) or not isinstance(callback, ModelCheckpoint) or not callback.save_top_k:
        return
    began, saved = _field(callback, "_last_time_checked") is not None, _field(callback, "_last_checkpoint_saved")
    if not began or callback.best_model_path in callback.best_k_models:
        return
    if not saved:
        metrics = _field(callback, "_monitor_candidates")(trainer)
        callback.best_model_path = _field(callback, "_get_metric_interpolated_filepath_name")(metrics, trainer)
        _field(callback, "_save_checkpoint")(trainer, callback.best_model_path)
    elif Path(callback.best_model_path).parent != Path(saved).parent:  # save_last has, and names no best one
        callback.best_model_path = saved


def say_if_kept_earlier(trainer: Trainer) -> None:
    """Warn of a fit whose newest checkpoint is of an earlier step than the weights in memory.

    Where the callback chooses by a metric that is meant.
    """
    callback: Any = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or callback.monitor is not None or not trainer.is_global_zero:
        return
    step = _field(callback, "_last_global_step_saved")
    if 0 < step < trainer.global_step:
        logger.warning(
            "The checkpoint %s is of step %d, the last that a validation followed; the detector in memory, and a test "
            "of it, is of step %d. They are one where a validation follows the last epoch: with a max_epochs that is a "
            "multiple of check_val_every_n_epoch.",
            callback.best_model_path, step, trainer.global_step,
        )  # fmt: skip


def training_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of a fit's training images, as a data module makes them or as they were given.

    Raises:
        RuntimeError: If this version of Lightning keeps its loaders elsewhere.
    """
    return _listed(_source(trainer.fit_loop).dataloader())


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of a fit's validation images, likewise; none where there is no validation."""
    if not trainer.enable_validation:
        return []
    return _listed(_source(trainer.fit_loop.epoch_loop.val_loop).dataloader())


def check_validation_images(trainer: Trainer) -> None:
    """Refuse to validate where the data module has no images for it; anomalib's then lack an attribute.

    Raises:
        ValueError: If it has none; the message names the option that says so.
    """
    try:
        if trainer.validating:
            _source(trainer.validate_loop).dataloader()
        elif trainer.state.fn == TrainerFn.FITTING:
            validation_loaders(trainer)
    except AttributeError as error:
        if error.name != "val_data":
            raise
        data: Any = error.obj
        msg = (
            f"{type(data).__name__} has no validation images (val_split_mode {data.val_split_mode.value}): set "
            "val_split_mode from_train (--data.val_split_mode from_train), so that normal images calibrate p-values "
            "and labels; or limit_val_batches 0 (--trainer.limit_val_batches 0) for raw scores alone."
        )
        raise ValueError(msg) from None


def prediction_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of a prediction that is about to begin; none where nothing is predicted.

    Raises:
        ValueError: If there are fewer images than processes, which Lightning does without a word about it.
    """
    if not trainer.predicting:
        return []
    for loader in _listed(_source(trainer.predict_loop).dataloader()):
        images = len(loader.dataset) if hasattr(loader, "dataset") else trainer.world_size
        if images < trainer.world_size:
            msg = (
                f"{trainer.world_size} processes cannot share {images} images to predict, since each needs one: set "
                f"devices to {max(1, images)}."
            )
            raise ValueError(msg)
    trainer.predict_loop.setup_data()
    return _listed(trainer.predict_dataloaders)


def reduce_gradients(trainer: Trainer, there_are: bool) -> None:
    """Let several processes share gradients, or, where nothing trains, do without: PyTorch refuses to wrap it then."""
    if isinstance(trainer.strategy, DDPStrategy):
        vars(trainer.strategy).pop("configure_ddp", None)
        if not there_are:
            vars(trainer.strategy)["configure_ddp"] = _nothing


def _nothing() -> None:
    pass


def is_dealt_once(sampler: Sampler) -> bool:
    """Whether a sampler deals images out to processes without repeating any, as that of a prediction does."""
    return isinstance(sampler, UnrepeatedDistributedSampler)


def loader_of(trainer: Trainer, number: int = 0) -> Any:
    """The loader that a validation or a test is reading, with the share of this process."""
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    return _listed(loaders)[number]


def train_on(trainer: Trainer, loader: DataLoader) -> None:
    """Let a fit that has begun train on another loader; errors as for :func:`training_loaders`."""
    _replace_loader(trainer.fit_loop, loader)


def validate_on(trainer: Trainer, loader: DataLoader) -> None:
    """Let a fit that has begun validate on another loader; errors as for :func:`training_loaders`."""
    _replace_loader(trainer.fit_loop.epoch_loop.val_loop, loader)


def forget_iterator(trainer: Trainer) -> None:
    """Let a fit that has begun draw the order of its first epoch anew, when it comes to that; errors as above.

    The order has been drawn if a scheduler has asked for the number of steps.
    """
    _field(trainer.fit_loop, "_combined_loader")
    trainer.fit_loop._combined_loader = None


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the last batch of a fit; errors as for :func:`skip_batches`."""
    return bool(_field(trainer.fit_loop.epoch_loop, "_should_check_val_fx")(_field(trainer.fit_loop, "_data_fetcher")))


def put_between_batches(loops: dict[str, Any], batches: int, *, validate: bool) -> None:
    """Let a checkpoint say that its fit stands between two batches, from where Lightning goes on as if uninterrupted.

    From within a batch it draws a random number too many, and of a validation that has not ended it leaves out all.

    Args:
        loops: The checkpoint's counts, which are changed.
        batches: How many batches of the epoch are done.
        validate: Whether the validation that follows is still to be done.
    """
    counts = loops["fit_loop"]
    progress = counts["epoch_loop.batch_progress"]
    undone = progress["current"]["ready"] - batches
    for batch in (progress["current"], progress["total"]):
        batch.update(dict.fromkeys(batch, batch["ready"] - undone))
    progress["is_last_batch"] &= not undone
    validation = counts["epoch_loop.val_loop.batch_progress"]
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    for batch in (validation["current"], validation["total"]):
        batch.update(begun if validate else dict.fromkeys(batch, batch["completed"]))


def put_between_epochs(loops: dict[str, Any]) -> None:
    """Likewise for one that was about to begin an epoch, which Lightning would leave out."""
    progress = loops["fit_loop"]["epoch_progress"]
    for epoch in (progress["current"], progress["total"]):
        done = epoch["processed"]
        epoch.update({"ready": done, "started": done, "completed": max(0, done - 1)})  # as when an epoch ends


def put_before_end(loops: dict[str, Any]) -> None:
    """Likewise for one that stood behind an epoch whose last hooks were not all done: it stands before them again."""
    progress = loops["fit_loop"]["epoch_progress"]
    for epoch in (progress["current"], progress["total"]):
        epoch["processed"] -= 1


def epochs_done(trainer: Trainer) -> int:
    """How many epochs a trainer has done, in an earlier fit, too, from which the next goes on."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed


def epochs_are_left(trainer: Trainer) -> bool:
    """Whether its limit in epochs leaves any."""
    return _are_left(trainer.max_epochs, epochs_done(trainer))


def no_epoch_is_left(trainer: Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether a fit that is about to go on from a checkpoint has done all its epochs."""
    done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return not _are_left(trainer.max_epochs, done)


def _are_left(limit: int | None, done: int) -> bool:
    """Whether a limit in epochs, ``None`` or -1 for none, leaves any."""
    return limit is None or limit < 0 or done < limit


def no_step_is_left(trainer: Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether it has reached a limit in steps or time."""
    return trainer.should_stop or 0 <= trainer.max_steps <= checkpoint["global_step"]


def lift_limits(trainer: Trainer) -> tuple[int, bool]:
    """Let a fit begin that goes on behind its last step, where Lightning would leave out all that follows it.

    Returns:
        The limits in steps and in time, for :func:`finish_epoch`.
    """
    limits = trainer.max_steps, trainer.should_stop
    trainer.fit_loop.epoch_loop.max_steps, trainer.should_stop = -1, False
    return limits


def finish_epoch(trainer: Trainer, limits: tuple[int, bool], *, validated: bool) -> None:
    """End an epoch after its last step, within a limit that is reached; the fit, which has begun, ends then.

    Args:
        trainer: The trainer of the fit.
        limits: What :func:`lift_limits` returned.
        validated: Whether the validation is done that follows the step, if one does.
    """
    loop = trainer.fit_loop
    loop.epoch_loop.max_steps, trainer.should_stop = limits
    if not validated and validation_is_due(trainer):
        validation = loop.epoch_loop.val_loop
        validation.restarting = False
        trainer.validating = True
        validation.run()
        trainer.training = True
    loop.on_advance_end()


def skip_batches(trainer: Trainer, batches: int) -> None:
    """Pass over the first batches of an epoch that a resumed fit is about to go on with.

    Args:
        trainer: The trainer of the fit, which has made its iterator and counts these batches itself.
        batches: How many.

    Raises:
        RuntimeError: If this version of Lightning keeps its iterator elsewhere.
    """
    iterator = _field(_field(trainer.fit_loop, "_data_fetcher"), "iterator")
    for _ in range(batches):
        next(iterator, None)
    # What loggers count by: one more where Lightning passes over a validation first.
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = trainer.global_step - validation_is_due(trainer)


def average_of(callback: StochasticWeightAveraging) -> LightningModule:
    """The module with the weights that a callback has averaged; errors as for :func:`training_loaders`."""
    return _field(callback, "_average_model")


def _replace_loader(loop: Any, loader: DataLoader) -> None:
    source = _source(loop)
    _field(source, "instance")
    _field(loop, "_combined_loader")
    source.instance = loader
    loop._combined_loader = None  # what the scheduler, which asks for the number of steps, has set up already


def name_results(trainer: Trainer, name: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what the table shows that Lightning prints at the end of a test.

    Args:
        trainer: The trainer of the test.
        name: Gets the results of one data loader, values by metric, and returns what is to be shown.

    Raises:
        RuntimeError: If this version of Lightning prints its table elsewhere.
    """
    loop: Any = trainer.test_loop
    plain = _field(type(loop), "_print_results")
    loop._print_results = lambda results, stage: plain([name(result) for result in results], stage)


def _source(loop: Any) -> Any:
    return _field(loop, "_data_source")


def _field(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        kind = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        msg = (
            f"Lightning {lightning.__version__} has no {kind}.{name}, which anomalib_flowood relies on: install "
            "lightning>=2.6.1,<2.7."
        )
        raise RuntimeError(msg)
    return getattr(owner, name)


def _listed(loaders: Any) -> list[Any]:
    if loaders is None:
        return []
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]
