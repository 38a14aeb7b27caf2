# SPDX-License-Identifier: Apache-2.0
"""Trainings that go on exactly where they were interrupted, in the midst of an epoch, too."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomalib_flowood import processes
from anomalib_flowood.trainers import (
    finish_epoch,
    forget_iterator,
    lift_limits,
    no_epoch_is_left,
    no_step_is_left,
    put_before_end,
    put_between_batches,
    put_between_epochs,
    skip_batches,
    trainer_of,
    validation_is_due,
)

from .mixin import Mixin

logger = logging.getLogger(__name__)

_KEY = "anomalib_flowood_random"
_STATES = ("fit", "epoch", "now")
"""What of it each process has its own of."""


class Resuming(Mixin):
    """Keeps in checkpoints what a training has drawn at random, so that a resumed one draws the same.

    These are the states of PyTorch's generators when the fit began (features are extracted in a shuffled order), when
    the epoch did (the order of its batches is drawn then), and now (noise). A resumed fit begins as the first one did,
    passes over the batches of its epoch that were trained on, and goes on with the same noise. Wherever a checkpoint is
    written, it stands behind the last step of the optimizer, or behind the validation that followed it.

    In several processes each has generators of its own, and a checkpoint has those of all: as many processes go on as
    one does. What batches they get is drawn by the epoch's number. More than two differ in the last digits: after the
    first step of a fit PyTorch brings its buckets of gradients into another order, in which sums round differently (but
    not with the strategy ``ddp_find_unused_parameters_true``).
    """

    _drawn: dict[str, Any] | None = None
    """What the checkpoint has, from which a fit is resumed; of states those of this process."""
    _states: dict[str, dict[str, Tensor]]
    """States of the generators: when the fit and its present epoch began, and after the optimizer's last step."""
    _has_order = False
    """Whether the order of the next epoch's batches has been drawn already, as Lightning does when a fit begins."""
    _steps = 0
    """How often the optimizer had stepped then."""
    _batches = 0
    """How many batches of the present epoch were done then; gradients of later ones are in no checkpoint."""
    _validated = False
    """Whether a validation has followed these."""
    _ended = False
    """Whether all is done that an epoch ends with."""
    _limits: tuple[int, bool] | None = None
    """The trainer's, where a resumed fit has reached them, and its epoch has not ended."""

    def begin_fit(self) -> None:
        """Prepare what a fit trains on, when all else is set up for it."""

    def on_fit_start(self) -> None:
        """Prepare what the fit trains on, with the random numbers that it was first prepared with.

        Raises:
            ValueError: If a checkpoint is not fitted, and the trainer's limits leave nothing to do.
        """
        super().on_fit_start()
        if self.trainer.ckpt_path is None:
            self._drawn = None
        drawn = self._drawn
        self._ended, self._limits = False, None
        if drawn is not None:
            over = no_epoch_is_left(self.trainer, drawn)
            if drawn["within"] and not over:
                self._limits = lift_limits(self.trainer) if no_step_is_left(self.trainer, drawn) else None
            elif (over or no_step_is_left(self.trainer, drawn)) and bool(self.model.fitted):
                logger.warning(
                    "The checkpoint %s is of a training that has ended: its weights stay as they are, and no "
                    "checkpoint is written. Leave out ckpt_path to fit to these images; raise max_epochs to train on.",
                    self.trainer.ckpt_path,
                )
            elif over or no_step_is_left(self.trainer, drawn):
                msg = (
                    f"The checkpoint {self.trainer.ckpt_path} is of a training that had not ended, and there is no "
                    "step left to end it with: raise max_epochs, max_steps or max_time of the trainer."
                )
                raise ValueError(msg)
            self._set_generators(drawn["fit"])
        self._states = {"fit": self._generators()}
        self.begin_fit()
        forget_iterator(self.trainer)
        if drawn is not None:
            self._set_generators(drawn["epoch"])
        self._states |= {"epoch": self._generators(), "step": self._generators()}
        self._has_order = True

    def on_train_start(self) -> None:
        """Pass over what has been trained on already."""
        super().on_train_start()
        self._steps = self.trainer.global_step
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            return
        if self.trainer.fit_loop.restarted_on_epoch_end:  # which Lightning goes through once more, without a batch
            self._has_order, self._ended = False, True
            self._set_generators(drawn["now"])
        elif drawn["within"]:
            self._has_order = False  # the next epoch to start is another one
            self._batches, self._validated = drawn["batches"], drawn["validated"]
            of_then, of_now = drawn["batches_of_epoch"], self.trainer.num_training_batches
            if of_then != of_now:
                logger.warning(
                    "The checkpoint is from within an epoch of %s batches, which has %s now (train_batch_size, other "
                    "images): the training that goes on is another one.",
                    of_then,
                    of_now,
                )
            skip_batches(self.trainer, self._batches)
            if self._batches:  # else the order of batches is to be drawn yet
                self._set_generators(drawn["now"])
            self._states["step"] = self._generators()
            if self._limits is not None:
                finish_epoch(self.trainer, self._limits, validated=drawn["judged"])

    def on_train_epoch_start(self) -> None:
        """Keep the state that the order of batches is drawn with."""
        super().on_train_epoch_start()
        self._ended = False
        if not self._has_order:
            self._states["epoch"] = self._generators()
        self._has_order = False
        self._batches, self._validated = 0, True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the state with which the next step begins, that it can be done again if it is not finished."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.global_step != self._steps:
            self._steps, self._batches, self._validated = self.trainer.global_step, batch_idx + 1, False
            self._states["step"] = self._generators()

    def on_validation_epoch_end(self) -> None:
        """Note that a validation is done, before checkpoints are written of it."""
        super().on_validation_epoch_end()
        self._validated = True

    def on_validation_end(self) -> None:
        """Keep the state where a validation lies between two steps."""
        super().on_validation_end()
        trainer: Any = self.trainer
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and trainer.fit_loop.epoch_loop.batch_progress.current.ready == self._batches:
            self._states["step"] = self._generators()

    def on_train_epoch_end(self) -> None:
        """Note that the epoch has ended."""
        super().on_train_epoch_end()
        self._ended = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the states of the generators, and let the training stand after the optimizer's last step."""
        super().on_save_checkpoint(checkpoint)
        trainer = trainer_of(self)
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        states = getattr(self, "_states", None)
        if states is None or "epoch" not in states:
            return
        loop: Any = trainer.fit_loop  # whose counts are not typed
        epoch, batch = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        now = self._generators()
        # The next epoch draws its order from here, if it has not.
        order = states["epoch"] if self._has_order else now
        kept = {"fit": states["fit"], "epoch": order, "now": now, "within": False, "processes": trainer.world_size}
        ending = epoch.processed > epoch.completed and not self._ended
        if epoch.ready > epoch.started:
            put_between_epochs(checkpoint["loops"])
        elif epoch.started > epoch.processed or ending:
            ends = batch.completed < batch.processed and trainer.global_step != self._steps  # as callbacks see it first
            batches = batch.processed if ends else self._batches
            # Where a later batch has begun, a validation that was due is done.
            judged = batch.ready > batches or (self._validated and not ends)
            validated = judged or not validation_is_due(trainer)
            if not ends and (batch.ready > batches or not validated):
                now = states["step"]
            kept |= {"epoch": states["epoch"], "now": now, "within": True, "batches": batches}
            kept |= {"validated": validated, "judged": judged, "batches_of_epoch": trainer.num_training_batches}
            put_between_batches(checkpoint["loops"], batches, validate=not validated)
            if ending:
                put_before_end(checkpoint["loops"])
        of_all = processes.gathered_objects({name: kept.pop(name) for name in _STATES})
        checkpoint[_KEY] = kept | {name: [states[name] for states in of_all] for name in _STATES}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the states of the generators, if a training is resumed."""
        super().on_load_checkpoint(checkpoint)
        trainer = trainer_of(self)
        self._drawn = None
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or _KEY not in checkpoint:
            return
        if trainer.precision == "64-true":
            self.double()  # as Lightning does once the weights are loaded, which have lost half of their digits by then
        self._drawn = checkpoint[_KEY] | {name: checkpoint[name] for name in ("loops", "global_step")}
        before, now = self._drawn["processes"], trainer.world_size
        alike = before == now
        self._drawn |= {name: self._drawn[name][processes.rank()] if alike else None for name in _STATES}
        if not alike and self._trainable:
            logger.warning(
                "The training goes on in %d processes, from %d before: the weights will not be those of an "
                "uninterrupted one, since batches and noise are drawn anew. In as many as before they are.",
                now,
                before,
            )

    def _generators(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_generators(self, states: dict[str, Tensor] | None) -> None:
        if states is None:
            return
        torch.set_rng_state(states["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"].cpu(), self.device)
