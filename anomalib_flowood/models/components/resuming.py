# SPDX-License-Identifier: Apache-2.0
"""Trainings that resume exactly where they were interrupted, even in the middle of an epoch."""

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
"""The parts that each process has of its own."""


class Resuming(Mixin):
    """Keeps the state of random generators in checkpoints, so that a resumed training draws the same numbers.

    There are three states of PyTorch's generators: when the fit began (what is prepared then may draw), when the epoch
    began (the order of its batches is drawn then), and now (noise). A resumed fit begins as the first one did, skips
    the batches of its epoch that were trained on, and goes on with the same noise. Whenever a checkpoint is written, it
    describes the training just after the last step of the optimizer, or after the validation that followed it.

    With several processes each has generators of its own, and a checkpoint has those of all, so that the same number of
    processes can resume. Their batches are drawn from the epoch's number. More than two processes differ in the last
    digits: after the first step of a fit PyTorch reorders its buckets of gradients, whose sums then round differently
    (except with the strategy ``ddp_find_unused_parameters_true``).
    """

    _drawn: dict[str, Any] | None = None
    """What the checkpoint that a fit is resumed from has kept, with the states of this process."""
    _states: dict[str, dict[str, Tensor]]
    """Generator states: when the fit and the present epoch began, and after the last optimizer step."""
    _has_order = False
    """Whether the order of the next epoch's batches is drawn already, as Lightning does when a fit begins."""
    _steps = 0
    """The number of that step."""
    _batches = 0
    """Batches of the present epoch that were done then; checkpoints hold no gradients of later ones."""
    _validated = False
    """Whether a validation has followed that step."""
    _ended = False
    """Whether the hooks at the end of the present epoch are done."""
    _limits: tuple[int, bool] | None = None
    """The trainer's limits, if a resumed fit has reached them within an epoch."""

    def begin_fit(self) -> None:
        """Prepare what a fit trains on, after everything else is set up."""

    def on_fit_start(self) -> None:
        """Prepare what the fit trains on, with the same random numbers as in the first fit.

        Raises:
            ValueError: If a checkpoint is not fitted, and the trainer's limits leave no step.
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
                    f"The training of the checkpoint {self.trainer.ckpt_path} has not ended, but there is no "
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
        """Skip what has been trained on already."""
        super().on_train_start()
        self._steps = self.trainer.global_step
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            return
        if self.trainer.fit_loop.restarted_on_epoch_end:  # Lightning repeats such an epoch, without a batch
            self._has_order, self._ended = False, True
            self._set_generators(drawn["now"])
        elif drawn["within"]:
            self._has_order = False  # the next epoch to start is another one
            self._batches, self._validated = drawn["batches"], drawn["validated"]
            of_then, of_now = drawn["batches_of_epoch"], self.trainer.num_training_batches
            if of_then != of_now:
                logger.warning(
                    "The checkpoint is from within an epoch of %s batches, which has %s now (another train_batch_size, "
                    "or other images): the training will not go on as if uninterrupted.",
                    of_then,
                    of_now,
                )
            skip_batches(self.trainer, self._batches)
            if self._batches:  # otherwise the order of batches is still to be drawn
                self._set_generators(drawn["now"])
            self._states["step"] = self._generators()
            if self._limits is not None:
                finish_epoch(self.trainer, self._limits, validated=drawn["judged"])

    def on_train_epoch_start(self) -> None:
        """Keep the state from which the order of batches is drawn."""
        super().on_train_epoch_start()
        self._ended = False
        if not self._has_order:
            self._states["epoch"] = self._generators()
        self._has_order = False
        self._batches, self._validated = 0, True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the state from which the next step can be repeated."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.global_step != self._steps:
            self._steps, self._batches, self._validated = self.trainer.global_step, batch_idx + 1, False
            self._states["step"] = self._generators()

    def on_validation_epoch_end(self) -> None:
        """Note that a validation is done, before checkpoints are written."""
        super().on_validation_epoch_end()
        self._validated = True

    def on_validation_end(self) -> None:
        """Keep the state after a validation between two steps."""
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
        """Add the generator states, and set the progress to just after the last optimizer step."""
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
        # From here the next epoch draws its order, unless it is drawn already.
        order = states["epoch"] if self._has_order else now
        kept = {"fit": states["fit"], "epoch": order, "now": now, "within": False, "processes": trainer.world_size}
        ending = epoch.processed > epoch.completed and not self._ended
        if epoch.ready > epoch.started:
            put_between_epochs(checkpoint["loops"])
        elif epoch.started > epoch.processed or ending:
            ends = batch.completed < batch.processed and trainer.global_step != self._steps  # as callbacks see it first
            batches = batch.processed if ends else self._batches
            # If a later batch has begun, any validation that was due is done.
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
        """Take the generator states, if a training is resumed."""
        super().on_load_checkpoint(checkpoint)
        trainer = trainer_of(self)
        self._drawn = None
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or _KEY not in checkpoint:
            return
        if trainer.precision == "64-true":
            self.double()  # Lightning does so only after loading the weights, which loses half of their digits
        self._drawn = checkpoint[_KEY] | {name: checkpoint[name] for name in ("loops", "global_step")}
        before, now = self._drawn["processes"], trainer.world_size
        alike = before == now
        self._drawn |= {name: self._drawn[name][processes.rank()] if alike else None for name in _STATES}
        if not alike and self._trainable:
            logger.warning(
                "The training goes on in %d processes, instead of %d: batches and noise are drawn anew, so the weights "
                "will not be those of an uninterrupted training. With as many processes as before they will.",
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
