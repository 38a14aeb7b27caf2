# SPDX-License-Identifier: Apache-2.0
"""Lightning's trainers: which loaders they have, before they are asked for a batch, and others in their place.

What Lightning gives is reached by its public names. It has none for the loaders of a fit as they were made, before each
device got its share of them, none for others in their place once the fit has begun, none for the table of a test, none
for averaged weights, and none for whether a fit has left a checkpoint.
(``trainer.datamodule`` does not do: it stays that of an earlier run where a later one gets loaders.) These are reached
by :func:`field`, here and in :mod:`anomalib_flowood.saving` and nowhere else, and the versions that have them bound
those that this package takes.
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
    """The trainer that a module is attached to, if it is."""
    try:
        return module.trainer
    except RuntimeError:  # Lightning's, of a module without one
        return None


def callbacks_of(trainer: Trainer) -> list[Any]:
    """The callbacks of a trainer, which has them without a type."""
    return trainer.callbacks  # type: ignore[attr-defined]


def drop_callbacks(trainer: Trainer, drop: Callable[[Any], bool]) -> None:
    """Take callbacks from a trainer; the list that it was given stays as it is."""
    owner: Any = trainer
    owner.callbacks = [callback for callback in callbacks_of(trainer) if not drop(callback)]


def is_trial(trainer: Any) -> bool:
    """Whether a trainer runs a batch or two to see that everything works, of which nothing is kept.

    Lightning does not declare the attribute.
    """
    return bool(trainer.fast_dev_run)


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


def images_of(loaders: list[Any]) -> int:
    """How many images loaders have, as far as their data sets know a number."""
    data_sets = [getattr(loader, "dataset", None) for loader in loaders]
    return sum(len(data_set) for data_set in data_sets if isinstance(data_set, Sized))


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
    """The loaders of a prediction that is about to begin; none where nothing is predicted.

    Raises:
        ValueError: If there are fewer images than processes, which Lightning does without a word about it.
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
    """Let several processes share gradients, or, where nothing trains, do without: PyTorch refuses to wrap it then."""
    if isinstance(trainer.strategy, DDPStrategy):
        vars(trainer.strategy).pop("configure_ddp", None)
        if not there_are:
            vars(trainer.strategy)["configure_ddp"] = _nothing


def _nothing() -> None:
    pass


def check_dealing(trainer: Trainer) -> None:
    """Refuse several processes each of which would see all images.

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
    """Whether a sampler deals images out to processes without repeating any, as that of a prediction does."""
    return isinstance(sampler, UnrepeatedDistributedSampler)


def loader_of(trainer: Trainer, number: int = 0) -> Any:
    """The loader that a validation or a test is reading, with the share of this process."""
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    return _listed(loaders)[number]


def train_on(trainer: Trainer, loader: DataLoader) -> None:
    """Let a fit that has begun train on another loader; errors as for :func:`training_loaders`."""
    _replace_loader(trainer.fit_loop, loader)


def unlist_training(trainer: Trainer) -> None:
    """Let a fit that has begun take a loader that was given in a list as if it were not."""
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
    """Let a fit that has begun draw the order of its first epoch anew, when it comes to that; errors as above.

    The order has been drawn if a scheduler has asked for the number of steps.
    """
    field(trainer.fit_loop, "_combined_loader")
    trainer.fit_loop._combined_loader = None


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the last batch of a fit; errors as for :func:`skip_batches`."""
    return bool(field(trainer.fit_loop.epoch_loop, "_should_check_val_fx")(field(trainer.fit_loop, "_data_fetcher")))


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


def stops_early(trainer: Trainer) -> bool:
    """Whether a fit that was asked to stop does so after the present batch, or epoch, as its least length lets it."""
    loop = trainer.fit_loop
    epochs = trainer.current_epoch + loop.epoch_loop.batch_progress.is_last_batch
    is_long = epochs >= (loop.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return trainer.should_stop and is_long


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
    """Pass over the first batches of an epoch that a resumed fit is about to go on with.

    Args:
        trainer: The trainer of the fit, which has made its iterator and counts these batches itself.
        batches: How many.

    Raises:
        RuntimeError: If this version of Lightning keeps its iterator elsewhere.
    """
    iterator = field(field(trainer.fit_loop, "_data_fetcher"), "iterator")
    for _ in range(batches):
        next(iterator, None)
    # What loggers count by: one more where Lightning passes over a validation first.
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
    plain = field(type(loop), "_print_results")
    loop._print_results = lambda results, stage: plain([name(result) for result in results], stage)


def _source(loop: Any) -> Any:
    return field(loop, "_data_source")


def field(owner: Any, name: str) -> Any:
    """What is private to Lightning; a version of it that has no such thing is named, in a ``RuntimeError``."""
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
