# SPDX-License-Identifier: Apache-2.0
"""How a flow is trained: loss, optimizer, learning rate, and what happens if training diverges."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    Timer,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from anomalib_flowood.scores.score import Inputs
from anomalib_flowood.trainers import (
    callbacks_of,
    epochs_are_left,
    epochs_done,
    images_of,
    reduce_gradients,
    training_loaders,
)

from .flow_model import FlowModel, check_precision
from .mixin import Mixin

logger = logging.getLogger(__name__)

_FINDER = (
    "trains before the detector's training data are prepared, and its trial steps would count when the best weights "
    "are chosen. Leave it out, and set {}."
)
_REFUSED: dict[type[Callback], str] = {
    LearningRateFinder: _FINDER.format("learning_rate"),
    BatchSizeFinder: _FINDER.format("train_batch_size"),
    BackboneFinetuning: (
        "trains a backbone, and a detector has none, or one that is frozen: the density is fitted to its features, "
        "which are extracted once. Leave it out; other features are those of another backbone."
    ),
    ModelPruning: (
        "takes weights off a trained network under other names, a frozen backbone's too, in the midst of a fit: the "
        "density, the weights that are kept and checkpoints would be of others. Leave it out; hidden_channels and "
        "coupling_layers make a flow smaller."
    ),
}
"""Callbacks with which no detector can be trained, and the reasons."""


_CHECKED_FIRST = 2
"""Validation batches that Lightning tries before a training by default."""


class DownToZero(CosineAnnealingLR):
    """Our own schedule, whose length is adjusted to the training's; a user's schedule is left alone."""


class TrainingDivergedError(FloatingPointError):
    """Training met a NaN or infinite loss."""


class FlowTraining(Mixin):
    """Maximum likelihood with Adam, for as many epochs as the trainer says, or else the detector.

    The detector sets ``max_epochs`` and ``learning_rate``, and implements ``training_inputs``. Where ``max_epochs`` is
    ``None``, it implements :meth:`epochs_for`.
    """

    model: FlowModel
    max_epochs: int | None
    learning_rate: float
    _epochs_by_images = False
    """Whether the length of the present fit is still to be set from the number of training images."""

    @property
    def trainer(self) -> Trainer:
        """The trainer that the detector is attached to."""
        return LightningModule.trainer.fget(self)  # type: ignore[attr-defined]

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        if trainer is not None:
            check_precision(trainer.precision)
            # Here, since callbacks may act before :meth:`setup`.
            _check_callbacks(trainer)
        # A trainer without any limit would run 1,000 epochs. The limit is set here, and not in `trainer_arguments`,
        # which would override the user's. A limit on steps or time counts as one, unless nothing trains.
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if trainer is None:
            return
        if trainer.num_sanity_val_steps == _CHECKED_FIRST:  # anomalib's detectors set it to 0 in any case
            trainer.num_sanity_val_steps = 0  # so few images lack one of the classes that metrics need
        reduce_gradients(trainer, bool(self._trainable))
        loop = trainer.fit_loop
        timers = [callback for callback in callbacks_of(trainer) if isinstance(callback, Timer)]
        timed = any(timer.time_remaining() is not None for timer in timers)  # others measure only
        if loop.max_epochs is None and trainer.max_steps == -1 and not (timed and self._trainable):
            self._epochs_by_images = self.max_epochs is None and bool(self._trainable)
            loop.max_epochs = 1 if self.max_epochs is None or not self._trainable else self.max_epochs

    def setup(self, stage: str) -> None:
        """Check the trainer; set the number of epochs from that of training images, if nothing else does."""
        super().setup(stage)
        if stage == TrainerFn.FITTING:
            self._check_trainer()
        if stage == TrainerFn.FITTING and self._epochs_by_images:
            self._epochs_by_images = False  # the trainer has a limit from now on
            images = images_of(training_loaders(self.trainer))
            if not images:
                msg = (
                    "How many epochs to train follows the number of images, which the data set does not know: set "
                    "max_epochs of the trainer."
                )
                raise ValueError(msg)
            self.trainer.fit_loop.max_epochs = self.epochs_for(images)

    def _check_trainer(self) -> None:
        """Refuse limits with which nothing would be trained, and an engine that has trained before.

        Raises:
            ValueError: If so; the message says what to set instead.
        """
        trainer: Any = self.trainer
        if torch.is_inference_mode_enabled() or any(weight.is_inference() for weight in self.parameters()):
            msg = (
                f"{type(self).__name__} was built, or is to be fitted, within torch.inference_mode(), where nothing "
                "learns: do both outside of it."
            )
            raise ValueError(msg)
        limits = {f"max_epochs of {type(self).__name__}": self.max_epochs is None or self.max_epochs >= 1}
        limits |= {"max_epochs of the trainer": trainer.fit_loop.max_epochs != 0, "max_steps": trainer.max_steps != 0}
        limits |= {"limit_train_batches": trainer.limit_train_batches != 0}
        for name, trains in limits.items():
            if not trains:
                msg = f"{name} has to be above 0: nothing would be trained, and an untrained flow scores at random."
                raise ValueError(msg)
        done = epochs_done(trainer)
        if done and trainer.ckpt_path is None and not (bool(self.model.fitted) and epochs_are_left(trainer)):
            msg = (
                f"This engine has ended a fit already, and would go on from its epoch {done}: {type(self).__name__} "
                "would not be fitted to these images. Make a new Engine (or Trainer) for each fit; ckpt_path goes on "
                "with an earlier one."
            )
            raise ValueError(msg)

    def on_train_start(self) -> None:
        """Adjust the learning rate to the length of the training, which is known now.

        Raises:
            ValueError: If a schedule of the user's would end before it.
        """
        super().on_train_start()
        self._follow_length()
        own = {id(parameter) for parameter in self.parameters()}
        groups = [group["params"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        if not self._trainable and any(id(parameter) in own for group in groups for parameter in group):
            logger.warning(
                "There is an optimizer, and %s trains nothing: it is fitted. Couplings would train (coupling_layers).",
                type(self).__name__,
            )

    def _follow_length(self) -> None:
        """Set the cosine's length to the number of steps.

        Until now it was that of the loader of images, which stored features have replaced, or that of a checkpoint
        whose training was to be shorter.
        """
        for config in self.trainer.lr_scheduler_configs:
            scheduler, steps = config.scheduler, self._steps_of_training()
            if (
                isinstance(scheduler, OneCycleLR)
                and config.interval == "step"
                and scheduler.total_steps * config.frequency < steps < float("inf")
            ):
                msg = (
                    f"OneCycleLR has total_steps {scheduler.total_steps}, and the training {steps:.0f}, as is known "
                    "only when it has begun: an epoch over stored features has a length of its own. Set total_steps "
                    "to that, or leave the schedule out, which is a cosine of the right length then."
                )
                raise ValueError(msg)
            if not isinstance(scheduler, DownToZero):
                continue
            if not 0 < steps < float("inf") or steps == scheduler.T_max:
                continue
            scheduler.T_max = int(steps)
            share = (1 + math.cos(math.pi * min(1.0, scheduler.last_epoch / steps))) / 2
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["lr"] = rate * share

    def _steps_of_training(self) -> float:
        """Return the total number of optimizer steps, also if a callback changes the accumulation by epoch."""
        trainer, steps = self.trainer, self.trainer.estimated_stepping_batches
        schedules = [each for each in callbacks_of(trainer) if isinstance(each, GradientAccumulationScheduler)]
        epochs = trainer.max_epochs
        if not schedules or epochs is None or epochs < 0 or math.isinf(trainer.num_training_batches):
            return steps
        accumulated = [schedules[0].get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
        return min(steps, sum(math.ceil(trainer.num_training_batches / batches) for batches in accumulated))

    def epochs_for(self, images: int) -> int:
        """Return how many epochs to train on so many images, if neither the trainer nor ``max_epochs`` says so."""
        raise NotImplementedError

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Nothing, so that the user's arguments of the trainer are kept."""
        return {}

    @property
    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for flow in self.model.trained_flows for parameter in flow.parameters()]

    def training_inputs(self, batch: Any) -> Inputs:
        """Return the inputs of the density for a training batch, with the noise that training adds."""
        raise NotImplementedError

    def training_loss(self, inputs: Inputs) -> Tensor:
        """Return the mean −log p per dimension, nats, ``()``."""
        return -self.model.density(inputs).log_prob.mean() / self.model.dims

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean −log p per dimension, plus the losses of flows that the score trains alongside.

        Raises:
            TrainingDivergedError: If it is NaN or infinite.
        """
        inputs = self.training_inputs(batch)
        loss = self.training_loss(inputs)
        self.log("train_loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        others = self.model.scorer.training_loss(self.model, inputs)
        if others is not None:
            loss = loss + others
        if not bool(torch.isfinite(loss)):
            self._diverged(f"the loss is {loss.item()} in epoch {self.trainer.current_epoch}, batch {batch_idx}")
        # Lightning calls backward() even if nothing trains.
        return loss if loss.requires_grad else loss.requires_grad_()

    def on_validation_start(self) -> None:
        """Mark the torch model as fitted before a fit validates it."""
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.model.fitted.fill_(True)

    def on_train_epoch_end(self) -> None:
        """Mark the torch model as fitted if no validation did, so that it can be loaded and exported."""
        self.model.fitted.fill_(True)
        super().on_train_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to replace a good checkpoint by one with NaN in it."""
        super().on_save_checkpoint(checkpoint)
        for flow in self.model.trained_flows:
            for name, value in flow.named_parameters():
                if not bool(torch.isfinite(value).all()):
                    self._diverged(f"the weights of {name} are NaN or infinite")

    def configure_optimizers(self) -> Any:
        """Return Adam for the flows, with a cosine that takes the learning rate to zero over the whole training.

        Without couplings there is nothing to train, and no optimizer.
        """
        parameters = self._trainable
        if not parameters:
            return None
        # With 16-mixed a fused optimizer divides the gradients by the loss scale inside its step, after they were
        # clipped. Lightning then refuses gradient_clip_val, with bf16-mixed, too.
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, fused=None if mixed else True)
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):  # below 0 where a data set has no length
            return {"optimizer": optimizer}
        scheduler = DownToZero(optimizer, T_max=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says; by default to a norm that only outliers exceed."""
        if not self._trainable:
            return
        if gradient_clip_val is None:
            for flow in self.model.trained_flows:
                parameters = [*flow.parameters()]
                if parameters:
                    nn.utils.clip_grad_norm_(parameters, max_norm=50.0)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _diverged(self, what: str) -> None:
        checkpoint = getattr(self.trainer.checkpoint_callback, "last_model_path", "") or getattr(
            self.trainer.checkpoint_callback, "best_model_path", ""
        )
        kept = f"The last good checkpoint is kept: {checkpoint}" if checkpoint else "There is no checkpoint yet"
        msg = (
            f"Training of {type(self).__name__} stopped: {what}. {kept}. "
            f"Try a learning_rate below {self.learning_rate}, and look for broken training images."
        )
        raise TrainingDivergedError(msg)


def _check_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks with which a fit would end in an error or in wrong weights, before it begins.

    Raises:
        ValueError: If there is one; the message has the reason and what to do instead.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    for callback in callbacks_of(trainer):
        for kind, reason in _REFUSED.items():
            if isinstance(callback, kind):
                msg = f"{type(callback).__name__} {reason}"
                raise ValueError(msg)
