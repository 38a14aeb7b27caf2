# SPDX-License-Identifier: Apache-2.0
"""Trainings that go on exactly where they were interrupted, in the midst of an epoch, too."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomalib_flowood.trainers import forget_iterator, skip_batches, trainer_of

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

    _Base = AnomalibModule
else:
    _Base = object

logger = logging.getLogger(__name__)

_KEY = "anomalib_flowood_random"


class Resuming(_Base):
    """Keeps in checkpoints what a training has drawn at random, so that a resumed one draws the same.

    These are the states of PyTorch's generators when the fit began (features are extracted in a shuffled order), when
    the epoch did (the order of its batches is drawn then), and now (noise). A resumed fit begins as the first one did,
    passes over the batches of its epoch that were trained on, and goes on with the same noise.

    In several processes each has generators of its own, and a checkpoint has those of one: none are kept.
    """

    _drawn: dict[str, Any] | None = None
    """What the checkpoint has, from which a fit is resumed."""
    _states: dict[str, dict[str, Tensor]]
    """States of the generators: when the fit, its present epoch, and its present batch began."""
    _has_order = False
    """Whether the order of the next epoch's batches has been drawn already, as Lightning does when a fit begins."""

    def begin_fit(self) -> None:
        """Prepare what a fit trains on, when all else is set up for it."""

    def on_fit_start(self) -> None:
        """Prepare what the fit trains on, with the random numbers that it was first prepared with."""
        super().on_fit_start()
        drawn = self._drawn
        if drawn is not None:
            self._set_generators(drawn["fit"])
        self._states = {"fit": self._generators()}
        self.begin_fit()
        forget_iterator(self.trainer)
        if drawn is not None:
            self._set_generators(drawn["epoch"])
        self._states |= {"epoch": self._generators(), "batch": self._generators()}
        self._has_order = True

    def on_train_start(self) -> None:
        """Pass over what has been trained on already."""
        super().on_train_start()
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            return
        if self.trainer.fit_loop.restarted_on_epoch_end:  # which Lightning goes through once more, without a batch
            self._has_order = False
            self._set_generators(drawn["now"])
        elif drawn["within"]:
            self._has_order = False  # the next epoch to start is another one
            if drawn["batches"]:
                skip_batches(self.trainer, drawn["batches"])
                self._set_generators(drawn["now"])

    def on_train_epoch_start(self) -> None:
        """Keep the state that the order of batches is drawn with."""
        super().on_train_epoch_start()
        if not self._has_order:
            self._states["epoch"] = self._generators()
        self._has_order = False

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the state with which the next batch begins, that it can be trained on again if it is not finished."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._states["batch"] = self._generators()

    def on_validation_end(self) -> None:
        """Keep it where a validation lies between two batches."""
        super().on_validation_end()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._states["batch"] = self._generators()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the states of the generators."""
        super().on_save_checkpoint(checkpoint)
        trainer = trainer_of(self)
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.world_size > 1:
            return
        states = getattr(self, "_states", None)
        if states is None or "epoch" not in states:
            return
        loop: Any = trainer.fit_loop  # whose counts are not typed
        progress = loop.epoch_loop.batch_progress
        epoch, batches = loop.epoch_progress.current, progress.current
        now = states["batch"] if batches.ready > batches.processed else self._generators()
        within = epoch.ready > epoch.processed
        checkpoint[_KEY] = {
            "unvalidated": within and progress.is_last_batch and batches.completed < batches.processed,
            "fit": states["fit"],
            "epoch": states["epoch"] if within else now,  # between two epochs the next one draws its order from here
            "now": now,
            "within": within,
            "batches": batches.processed if within else 0,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the states of the generators, if a training is resumed."""
        super().on_load_checkpoint(checkpoint)
        trainer = trainer_of(self)
        resumed = trainer is not None and trainer.state.fn == TrainerFn.FITTING and trainer.world_size == 1
        self._drawn = checkpoint.get(_KEY) if resumed else None
        if self._drawn is not None and self._drawn["unvalidated"]:
            logger.warning(
                "The checkpoint was written after the last batch of an epoch and before its validation, which "
                "Lightning leaves out when it goes on: the weights will not be those of an uninterrupted training. A "
                "checkpoint from within an epoch, or from its end (every_n_epochs), is continued exactly."
            )

    def _generators(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_generators(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"].cpu(), self.device)
