# SPDX-License-Identifier: Apache-2.0
"""Lightning's trainers: their loaders and how to replace them, and all that is private to Lightning.

Public names are used wherever there are some. There are none for the loaders of a fit as they were made, before each
device got its share, for replacing them once a fit has begun, for the table of a test, for averaged weights, and for
whether a fit has left a checkpoint. (``trainer.datamodule`` does not help: it stays that of an earlier run when a later
one gets loaders.) These are reached by :func:`field`, here and in :mod:`anomalib_flowood.saving` and nowhere else, and
decide which versions of Lightning this package supports.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any

import lightning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Sampler


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to, if any."""
    try:
        return module.trainer
    except RuntimeError:  # Lightning's, of a module without one
        return None


def callbacks_of(trainer: Trainer) -> list[Any]:
    """The callbacks of a trainer, which Lightning does not type."""
    return trainer.callbacks  # type: ignore[attr-defined]


def drop_callbacks(trainer: Trainer, drop: Callable[[Any], bool]) -> None:
    """Remove callbacks from a trainer, but not from the list that it was given."""
    owner: Any = trainer
    owner.callbacks = [callback for callback in callbacks_of(trainer) if not drop(callback)]


def is_trial(trainer: Any) -> bool:
    """Whether a trainer only runs a batch or two to see that everything works, and keeps nothing."""
    return bool(trainer.fast_dev_run)


def training_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of a fit's training images, as the data module made them or as they were given.

    Raises:
        RuntimeError: If this version of Lightning keeps its loaders elsewhere.
    """
    return _listed(_source(trainer.fit_loop).dataloader())


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of a fit's validation images; none where there is no validation."""
    if not trainer.enable_validation:
        return []
    return _listed(_source(trainer.fit_loop.epoch_loop.val_loop).dataloader())


def images_of(loaders: list[Any]) -> int:
    """The number of images in loaders, without those of data sets that have no length."""
    data_sets = [getattr(loader, "dataset", None) for loader in loaders]
    return sum(len(data_set) for data_set in data_sets if isinstance(data_set, Sized))


def check_validation_images(trainer: Trainer) -> None:
    """Refuse to validate without validation images: anomalib's data modules then lack an attribute.

    Raises:
        ValueError: If there are none; the message names the option that holds some out.
    """
    try:
        if trainer.validating:
            _source(trainer.validate_loop).dataloader()
        elif trainer.state.fn == TrainerFn.FITTING:
            validation_loaders(trainer)
    except AttributeError as error:
        data: Any = error.obj
        if error.name != "val_data" or not hasattr(data, "val_split_mode"):
            raise
        msg = (
            f"{type(data).__name__} has no validation images (val_split_mode {data.val_split_mode.value}): set "
            "val_split_mode from_train (--data.val_split_mode from_train), so that normal images calibrate p-values "
            "and labels; or limit_val_batches 0 (--trainer.limit_val_batches 0) for raw scores alone."
        )
        raise ValueError(msg) from None


def prediction_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of a prediction that is about to begin; none where nothing is to be predicted.

    Raises:
        ValueError: If there are fewer images than processes, of which Lightning says nothing.
    """
    if not trainer.predicting:
        return []
    for loader in _listed(_source(trainer.predict_loop).dataloader()):
        images = images_of([loader]) if isinstance(getattr(loader, "dataset", None), Sized) else trainer.world_size
        if images < trainer.world_size:
            msg = (
                f"{trainer.world_size} processes cannot share {images} images to predict, since each needs one: set "
                f"devices to {max(1, images)}."
            )
            raise ValueError(msg)
    trainer.predict_loop.setup_data()
    return _listed(trainer.predict_dataloaders)


def reduce_gradients(trainer: Trainer, there_are: bool) -> None:
    """Let several processes share gradients if there are any: PyTorch refuses to wrap a module that has none."""
    if isinstance(trainer.strategy, DDPStrategy):
        vars(trainer.strategy).pop("configure_ddp", None)
        if not there_are:
            vars(trainer.strategy)["configure_ddp"] = _nothing


def _nothing() -> None:
    pass


def check_dealing(trainer: Trainer) -> None:
    """Refuse several processes that would each see all images.

    Raises:
        ValueError: If so; the message names the argument.
    """
    if trainer.world_size > 1 and not field(field(trainer, "_accelerator_connector"), "use_distributed_sampler"):
        msg = (
            f"With use_distributed_sampler false each of {trainer.world_size} processes sees all images, and each "
            "would count as many times, in the calibration, too. Leave it out of the trainer: a DistributedSampler "
            "that a loader has already is kept."
        )
        raise ValueError(msg)


def is_dealt_once(sampler: Sampler) -> bool:
    """Whether a sampler deals images out to processes without repeating any, as in a prediction."""
    return isinstance(sampler, UnrepeatedDistributedSampler)


def loader_of(trainer: Trainer, number: int = 0) -> Any:
    """The loader that a validation or a test is reading, which has the share of this process."""
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    return _listed(loaders)[number]


def train_on(trainer: Trainer, loader: DataLoader) -> None:
    """Let a fit that has begun train on another loader; errors as for :func:`training_loaders`."""
    _replace_loader(trainer.fit_loop, loader)


def unlist_training(trainer: Trainer) -> None:
    """Let a fit that has begun use the training loader that it was given in a list."""
    given = _source(trainer.fit_loop).dataloader()
    if isinstance(given, list | tuple):
        train_on(trainer, given[0])


def count_share(trainer: Trainer) -> None:
    """Let a fit that has begun know as a number which share of its batches it is limited to, if it is.

    Lightning takes a share anew in every epoch, and of whatever is trained on then; of too few batches it refuses one.
    """
    (loader,) = training_loaders(trainer)
    limit = trainer.limit_train_batches
    if isinstance(limit, float) and limit < 1 and images_of([loader]):
        trainer.limit_train_batches = int(limit * len(loader)) or limit


def validate_on(trainer: Trainer, loader: DataLoader) -> None:
    """Let a fit that has begun validate on another loader; errors as for :func:`training_loaders`."""
    _replace_loader(trainer.fit_loop.epoch_loop.val_loop, loader)


def forget_iterator(trainer: Trainer) -> None:
    """Let a fit that has begun draw the order of its first epoch anew; errors as above.

    It has been drawn already if a scheduler has asked for the number of steps.
    """
    field(trainer.fit_loop, "_combined_loader")
    trainer.fit_loop._combined_loader = None


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the last batch of a fit; errors as for :func:`skip_batches`."""
    return bool(field(trainer.fit_loop.epoch_loop, "_should_check_val_fx")(field(trainer.fit_loop, "_data_fetcher")))


def put_between_batches(loops: dict[str, Any], batches: int, *, validate: bool) -> None:
    """Change a checkpoint's progress to between two batches, from where Lightning resumes as if uninterrupted.

    From within a batch it would draw one random number too many, and it would skip a validation that has begun.

    Args:
        loops: The progress of the checkpoint's loops, which is changed.
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
    """Likewise for a fit that was about to begin an epoch, which Lightning would skip."""
    progress = loops["fit_loop"]["epoch_progress"]
    for epoch in (progress["current"], progress["total"]):
        done = epoch["processed"]
        epoch.update({"ready": done, "started": done, "completed": max(0, done - 1)})  # as when an epoch ends


def put_before_end(loops: dict[str, Any]) -> None:
    """Likewise for a fit that was within the last hooks of an epoch: it goes back to before them."""
    progress = loops["fit_loop"]["epoch_progress"]
    for epoch in (progress["current"], progress["total"]):
        epoch["processed"] -= 1


def epochs_done(trainer: Trainer) -> int:
    """How many epochs a trainer has done, including those of an earlier fit."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed


def epochs_are_left(trainer: Trainer) -> bool:
    """Whether a trainer's limit on epochs leaves any."""
    return _are_left(trainer.max_epochs, epochs_done(trainer))


def no_epoch_is_left(trainer: Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether a fit that is about to be resumed has done all its epochs."""
    done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return not _are_left(trainer.max_epochs, done)


def _are_left(limit: int | None, done: int) -> bool:
    """Whether a limit on epochs, ``None`` or -1 for none, leaves any."""
    return limit is None or limit < 0 or done < limit


def no_step_is_left(trainer: Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether a fit that is about to be resumed has reached a limit on steps or time."""
    return trainer.should_stop or 0 <= trainer.max_steps <= checkpoint["global_step"]


def stops_early(trainer: Trainer) -> bool:
    """Whether a fit that was asked to stop does so now: not before ``min_epochs`` and ``min_steps``."""
    loop = trainer.fit_loop
    epochs = trainer.current_epoch + loop.epoch_loop.batch_progress.is_last_batch
    is_long = epochs >= (loop.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return trainer.should_stop and is_long


def lift_limits(trainer: Trainer) -> tuple[int, bool]:
    """Let a fit resume after its last step, where Lightning would skip all that follows it.

    Returns:
        The limits on steps and on time, for :func:`finish_epoch`.
    """
    limits = trainer.max_steps, trainer.should_stop
    trainer.fit_loop.epoch_loop.max_steps, trainer.should_stop = -1, False
    return limits


def finish_epoch(trainer: Trainer, limits: tuple[int, bool], *, validated: bool) -> None:
    """End the epoch of a resumed fit after its last step, and let the fit end by its limits.

    Args:
        trainer: The trainer of the fit.
        limits: What :func:`lift_limits` returned.
        validated: Whether the validation that follows the step, if any, is done.
    """
    loop = trainer.fit_loop
    loop.epoch_loop.max_steps, trainer.should_stop = limits
    if not validated and validation_is_due(trainer):
        validate_again(trainer)
    loop.on_advance_end()


def validate_again(trainer: Trainer) -> None:
    """Validate within a fit that has trained, where Lightning does not."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    validation.restarting = False
    trainer.validating = True
    validation.run()
    trainer.training = True


def forget_results(trainer: Trainer) -> None:
    """Let a validation or a test log as a trainer's first does, before and after it.

    Lightning keeps the names of what was logged, of another module, too, and refuses one that is logged otherwise.
    """
    for loop in (trainer.validate_loop, trainer.test_loop):
        field(loop, "_results").clear()


def skip_batches(trainer: Trainer, batches: int) -> None:
    """Skip the first batches of the epoch in which a fit is resumed.

    Args:
        trainer: The trainer of the fit, which has made its iterator and counts these batches itself.
        batches: How many.

    Raises:
        RuntimeError: If this version of Lightning keeps its iterator elsewhere.
    """
    iterator = field(field(trainer.fit_loop, "_data_fetcher"), "iterator")
    for _ in range(batches):
        next(iterator, None)
    # The step that loggers see: Lightning adds one where it skips a validation first.
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = trainer.global_step - validation_is_due(trainer)


def average_of(callback: StochasticWeightAveraging) -> LightningModule:
    """The module with the weights that a callback has averaged; errors as for :func:`training_loaders`."""
    return field(callback, "_average_model")


def _replace_loader(loop: Any, loader: DataLoader) -> None:
    source = _source(loop)
    field(source, "instance")
    field(loop, "_combined_loader")
    source.instance = loader
    loop._combined_loader = None  # made already where a scheduler has asked for the number of steps


def name_results(trainer: Trainer, name: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what Lightning's table at the end of a test shows.

    Args:
        trainer: The trainer of the test.
        name: Takes the results of one data loader, values by metric, and returns what to show.

    Raises:
        RuntimeError: If this version of Lightning prints its table elsewhere.
    """
    loop: Any = trainer.test_loop
    plain = field(type(loop), "_print_results")
    loop._print_results = lambda results, stage: plain([name(result) for result in results], stage)


def _source(loop: Any) -> Any:
    return field(loop, "_data_source")


def field(owner: Any, name: str) -> Any:
    """Get an attribute that is private to Lightning; ``RuntimeError`` if this version of it has none."""
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
