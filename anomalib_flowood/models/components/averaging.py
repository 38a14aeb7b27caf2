# SPDX-License-Identifier: Apache-2.0
"""Callbacks that average weights: the average is scored and calibrated, or the callback is refused."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from anomalib_flowood.trainers import average_of, callbacks_of

from .flow_model import FlowModel
from .mixin import Mixin

logger = logging.getLogger(__name__)


class Averaging(Mixin):
    """Takes the average of ``StochasticWeightAveraging`` before the last validation, and protects frozen batch norms.

    Lightning takes the average after the last checkpoint. Where the flow has batch norms, it first runs one more epoch
    with the average to update them, at whose end are the last validation and checkpoint; there is nothing to do then.
    """

    model: FlowModel
    _frozen_norms: tuple[tuple[_BatchNorm, dict[str, Tensor]], ...] = ()
    """Frozen batch norms and their buffers, which the callback would reset."""

    def setup(self, stage: str) -> None:
        """Refuse callbacks that average more than weights.

        Raises:
            ValueError: If there is one; the message says what to set instead.
        """
        super().setup(stage)
        for callback in callbacks_of(self.trainer):
            if stage == TrainerFn.FITTING and isinstance(callback, WeightAveraging):
                msg = (
                    f"{type(callback).__name__} averages and exchanges buffers, too, whatever use_buffers says: fitted "
                    "statistics and the calibration. Use StochasticWeightAveraging, or train without averaging."
                )
                raise ValueError(msg)

    def on_fit_start(self) -> None:
        """Refuse an average over no epoch, for which Lightning restores the weights from before the fit.

        Raises:
            ValueError: If so; the message says what to set instead.
        """
        for average in self._averages():
            if not average.swa_start <= average.swa_end < float("inf"):
                msg = (
                    f"StochasticWeightAveraging is to begin in epoch {average.swa_start + 1}, but training ends before "
                    f"(max_epochs is {average.swa_end + 1:g}): raise max_epochs, or lower swa_epoch_start."
                )
                raise ValueError(msg)
        super().on_fit_start()

    def on_train_start(self) -> None:
        """Keep the buffers of frozen batch norms; go on with an average from a checkpoint."""
        averages = self._averages()
        trained = {module for flow in self.model.trained_flows for module in flow.modules()}
        self._frozen_norms = tuple(
            (module, {name: value.clone() for name, value in module.named_buffers()})
            for module in (self.modules() if averages else ())
            if isinstance(module, _BatchNorm) and module not in trained
        )
        if self.trainer.fit_loop.restarted_mid_epoch:  # Lightning skips the beginning of such an epoch
            for average in averages:
                average.on_train_epoch_start(self.trainer, self)
            self._restore_norms()
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        """Restore frozen batch norms, and drop gradients: the callback's own epoch has a step without any."""
        super().on_train_epoch_start()
        if self._averages():
            self.zero_grad()
        self._restore_norms()

    def _restore_norms(self) -> None:
        for module, kept in self._frozen_norms:
            for name, value in kept.items():
                setattr(module, name, value.clone())

    def on_validation_start(self) -> None:
        """Take the average before anything is judged, fitted or calibrated with it."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._take_average()
        super().on_validation_start()

    def on_train_epoch_end(self) -> None:
        """Take the average if no validation did."""
        self._take_average()
        super().on_train_epoch_end()

    def on_train_end(self) -> None:
        """Free the kept buffers; warn if the weights are no average."""
        super().on_train_end()
        self._frozen_norms = ()
        epochs: int = self.trainer.current_epoch
        for average in self._averages():
            if epochs <= average.swa_end:
                logger.warning(
                    "StochasticWeightAveraging has averaged nothing: training ended in epoch %d, and the average is "
                    "taken after the last one, %d (max_epochs). These are the weights of the last step.",
                    epochs,
                    average.swa_end + 1,
                )

    def _averages(self) -> list[StochasticWeightAveraging]:
        return [callback for callback in callbacks_of(self.trainer) if isinstance(callback, StochasticWeightAveraging)]

    def _take_average(self) -> None:
        trainer: Any = self.trainer
        for average in self._averages():
            last = trainer.current_epoch == average.swa_end and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            if last and not average.pl_module_contains_batch_norm(self):
                average.transfer_weights(average_of(average), self)
