# SPDX-License-Identifier: Apache-2.0
"""Fits a detector's score with the last weights of a training, before the calibration."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import Progress

from anomalib_flowood import processes
from anomalib_flowood.scores.score import Inputs
from anomalib_flowood.trainers import callbacks_of, images_of, stops_early, trainer_of, training_loaders

from .flow_model import FlowModel
from .mixin import Mixin
from .post_processor import ConformalPostProcessor
from .weights import checksum

logger = logging.getLogger(__name__)


class ScoreFitting(Mixin):
    """Fits the score at the end of a training, or to a trained detector."""

    model: FlowModel
    _fitted_to: tuple[int, ...] = ()
    """Checksums of the weights of the present training that the score is fitted to."""

    def inputs_of(self, batch: Any) -> Inputs:
        """Return the inputs of the density for a pre-processed batch."""
        return self.model.inputs(batch.image)

    def on_train_epoch_start(self) -> None:
        """Forget what was fitted to earlier weights."""
        super().on_train_epoch_start()
        self.forget_weights()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Forget what a validation in the middle of the epoch has fitted."""
        if self._fitted_to:
            self.forget_weights()
        return super().on_train_batch_start(batch, batch_idx)

    def forget_weights(self) -> None:
        """Forget what was fitted to weights that training is about to change."""
        self.model.scorer.forget()
        self._fitted_to = ()

    def on_train_epoch_end(self) -> None:
        """Fit the score if no validation did."""
        super().on_train_epoch_end()
        if not self.model.scorer.ready and self._training_ends():
            self.fit_score(self._training_loader())

    def on_train_end(self) -> None:
        """Fit the score again if a callback has averaged the weights since; warn if it is not fitted."""
        super().on_train_end()
        if self._fitted_to and self._fitted_to != self._weights():
            self.fit_score(self._training_loader())
        self._fitted_to = ()
        if not self.model.scorer.ready:
            logger.warning(
                "Training ended before its last epoch did, so the score %r is not fitted: `flowood score` fits it.",
                self.model.scorer.name,
            )

    def on_validation_start(self) -> None:
        """Fit the score with the last weights, so that validation images are scored and calibrated by it."""
        super().on_validation_start()
        trainer: Any = self.trainer
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._training_ends():
            self.fit_score(self._training_loader())

    def _weights(self) -> tuple[int, ...]:
        # By their values: a callback may have copied the same into them once more.
        return tuple(checksum(weight) for weight in self.model.parameters())

    def _training_loader(self) -> Any:
        """The trainer's loader; with several processes one of all images, and not of this process's share."""
        trainer: Any = self.trainer
        return trainer.train_dataloader if processes.ranks() == 1 else training_loaders(trainer)[0]

    def fit_score(self, loader: Iterable[Any]) -> None:
        """Fit the score with the present weights; a trained detector needs no training for it.

        The post-processor's calibration, which is of other scores, is dropped: calibrate it by ``Engine.validate``.

        Args:
            loader: Batches of in-distribution training images, not pre-processed. As many images are taken as the
                score wants.

        Raises:
            ValueError: If there are no images, or one has a NaN or infinite statistic.
        """
        scorer = self.model.scorer
        if not scorer.fit_images:
            return
        training = self.model.training
        self.model.eval()
        scorer.fit(self.model, self._score_inputs(loader, scorer.fit_images))
        processes.from_rank_zero([*scorer.buffers()])  # each process has seen the images in another order
        self.model.train(training)
        self._fitted_to = self._weights()
        if isinstance(self.post_processor, ConformalPostProcessor):
            self.post_processor.forget()

    @torch.no_grad()
    def _score_inputs(self, loader: Iterable[Any], images: int) -> Iterator[Inputs]:
        """Prepare so many images of a loader, or all if it has fewer."""
        total = min(images, images_of([loader]) or images)
        with Progress(transient=True, disable=not self._shows_progress) as progress:
            bar = progress.add_task(f"Fitting the score {self.model.scorer.name}", total=total)
            seen = 0
            for batch in loader:
                batch = self.transfer_batch_to_device(batch, self.device, 0)
                transform = getattr(self.pre_processor, "transform", None)
                if transform is not None and hasattr(batch, "image"):  # stored features have been pre-processed
                    batch.image = transform(batch.image)
                inputs = tuple(part[: images - seen] for part in self.inputs_of(batch))
                yield inputs
                seen += len(inputs[0])
                progress.update(bar, completed=seen)
                if seen >= images:
                    return

    @property
    def _shows_progress(self) -> bool:
        trainer = trainer_of(self)
        return trainer is None or (trainer.progress_bar_callback is not None and trainer.is_global_zero)

    def _training_ends(self) -> bool:
        """Whether the weights may be the final ones: training ends here, or a callback may choose these weights.

        It is called when a validation begins, and at the end of an epoch.
        """
        trainer = self.trainer
        loop = trainer.fit_loop
        if stops_early(trainer) or 0 <= trainer.max_steps <= trainer.global_step:  # even in the middle of an epoch
            return True
        # Early stopping, or a choice of the best checkpoint.
        if any(getattr(callback, "monitor", None) for callback in callbacks_of(trainer)):
            return True
        ends = loop.max_epochs not in {None, -1} and trainer.current_epoch + 1 >= loop.max_epochs
        return ends and loop.epoch_loop.batch_progress.is_last_batch
