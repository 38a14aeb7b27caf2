# SPDX-License-Identifier: Apache-2.0
"""What every flow detector does in anomalib's engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib import LearningType
from anomalib.data import InferenceBatch
from anomalib.metrics import Evaluator, F1Score
from anomalib.models.components import AnomalibModule
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from anomalib_flowood import flows
from anomalib_flowood.metrics import AUROC, FPR95, BitsPerDim, PerSetEvaluator

from .flow_model import FlowModel
from .post_processor import ConformalPostProcessor

logger = logging.getLogger(__name__)


if TYPE_CHECKING:
    _Base = AnomalibModule
else:  # A mixin and not a base class, since anomalib lists the direct subclasses of `AnomalibModule` only.
    _Base = object


class TrainingDivergedError(FloatingPointError):
    """Training met a NaN or infinite loss."""


class FlowModule(_Base):
    """Mixin for :class:`~anomalib.models.components.AnomalibModule`, to the left of it.

    The detector sets ``max_epochs`` and ``learning_rate``, and implements ``log_prob_batch``.
    """

    model: FlowModel
    max_epochs: int
    learning_rate: float

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        """The trainer that the detector is attached to."""
        return LightningModule.trainer.fget(self)  # type: ignore[attr-defined]

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        # Here, and not in `trainer_arguments`, which would override what the user asked for: when a fit begins, a
        # trainer without any limit would run 1,000 epochs. A limit in steps or time is a limit.
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if trainer is None:
            return
        loop = trainer.fit_loop
        timed = any(type(callback).__name__ == "Timer" for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if loop.max_epochs is None and trainer.max_steps == -1 and not timed:
            loop.max_epochs = self.max_epochs

    def log_prob_batch(self, batch: Any) -> Tensor:
        """Log-density of a training batch, per dimension.

        Args:
            batch: What the training loader yields, pre-processed.

        Returns:
            Nats per dimension, ``(N,)``.
        """
        raise NotImplementedError

    def predict_batch(self, batch: Any) -> InferenceBatch:
        """Score a validation batch."""
        return self.model(batch.image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean −log p per dimension.

        Raises:
            TrainingDivergedError: If it is NaN or infinite.
        """
        loss = -self.log_prob_batch(batch).mean()
        if not bool(torch.isfinite(loss)):
            self._diverged(f"the loss is {loss.item()} in epoch {self.trainer.current_epoch}, batch {batch_idx}")
        self.log("train_loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        return loss

    def on_train_epoch_end(self) -> None:
        """Mark the torch model as fitted, so that it may be exported."""
        self.model.fitted.fill_(True)

    def validation_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """Score a batch for the threshold, and log the mean score of its normal images."""
        del batch_idx
        batch.update(**self.predict_batch(batch)._asdict())
        scores = batch.pred_score if batch.gt_label is None else batch.pred_score[~batch.gt_label]
        if scores.numel():
            self.log("val_loss", scores.mean(), prog_bar=True, batch_size=scores.numel())
        return batch

    def test_step(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch; where the score is a likelihood, put its ``bits_per_dim``, ``(N,)``, beside it."""
        outputs: Any = super().test_step(batch, batch_idx, *args, **kwargs)
        if self.model.scores_are_likelihoods:
            outputs.bits_per_dim = flows.bits_per_dim(-outputs.pred_score, 1, self.model.levels)
        return outputs

    def configure_optimizers(self) -> Any:
        """Adam on the flow, its learning rate following a cosine down to zero over the whole training."""
        optimizer = torch.optim.Adam(self.model.flow.parameters(), lr=self.learning_rate, fused=True)
        steps = self.trainer.estimated_stepping_batches
        if steps in {float("inf"), 0}:
            return {"optimizer": optimizer}
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says; by default to a norm that only an outlier reaches."""
        if gradient_clip_val is None:
            nn.utils.clip_grad_norm_(self.model.flow.parameters(), max_norm=50.0)
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

    # -- anomalib ------------------------------------------------------------------------------------------------

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Nothing: what the user gives to the trainer is obeyed."""
        return {}

    @property
    def learning_type(self) -> LearningType:
        """One-class: trained on normal images alone."""
        return LearningType.ONE_CLASS

    def configure_post_processor(self) -> ConformalPostProcessor:
        """Conformal p-values from normal validation images, labelled at α = 0.05."""
        return ConformalPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """AUROC and FPR95, of each outside set too; the labels' F1 score; bits per dimension where they cost nothing.

        AUPR depends on how many images of either side there are, and the detection error follows AUROC: a
        :class:`PerSetEvaluator` without arguments logs these too.
        """
        return PerSetEvaluator(
            test_metrics=[
                AUROC(prefix="image_"),
                FPR95(prefix="image_"),
                F1Score(fields=["pred_label", "gt_label"], prefix="image_", strict=False),
                BitsPerDim(strict=False),
            ]
        )

    @classmethod
    def configure_visualizer(cls) -> Any:
        """None: without an anomaly map there is nothing to draw, and anomalib would write one picture per image."""

    # -- checkpoints and export ----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the class's name; refuse to replace a good checkpoint by one with NaN in it."""
        super().on_save_checkpoint(checkpoint)
        for name, value in self.model.flow.named_parameters():
            if not bool(torch.isfinite(value).all()):
                self._diverged(f"the weights of {name} are NaN or infinite")
        checkpoint["anomalib_flowood_class"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another class."""
        self._check_class(checkpoint)
        super().on_load_checkpoint(checkpoint)

    @classmethod
    def _check_class(cls, checkpoint: dict[str, Any], path: object = None) -> None:
        writer = checkpoint.get("anomalib_flowood_class")
        if writer != cls.__name__:
            which = "The checkpoint" if path is None else f"The checkpoint {path}"
            by = f"written by {writer}" if writer else "not written by a detector of anomalib_flowood"
            remedy = f"load it with anomalib_flowood.{writer}" if writer else "load it with the class that wrote it"
            msg = f"{which} was {by}, so {cls.__name__} cannot load it; {remedy}."
            raise ValueError(msg)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **kwargs: Any) -> AnomalibModule:  # type: ignore[override]
        """Load a detector; the arguments are those of :meth:`AnomalibModule.load_from_checkpoint`.

        Raises:
            ValueError: If the checkpoint was written by another class.
        """
        # Before anything is built: the other class's arguments may name a backbone that is not here.
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        cls._check_class(checkpoint, checkpoint_path)
        pre_trained = checkpoint["hyper_parameters"].get("pre_trained")
        if pre_trained is not None:
            # The checkpoint holds the backbone's weights: nothing needs to be fetched.
            kwargs.setdefault("pre_trained", False)
        detector = super().load_from_checkpoint(checkpoint_path, **kwargs)
        if pre_trained is not None:
            detector.hparams["pre_trained"] = pre_trained
        return detector

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export as :meth:`AnomalibModule.to_torch` does, if fitted."""
        self._check_fitted()
        return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]
        """Export as :meth:`AnomalibModule.to_onnx` does, if fitted; OpenVINO export passes here too."""
        self._check_fitted()
        kwargs.setdefault("opset_version", 18)  # What torch writes; converting it down fails on Pad.
        post_processor = self.post_processor
        if isinstance(post_processor, ConformalPostProcessor) and not post_processor.calibrated:
            logger.warning("No validation images were scored, so the exported model gives raw scores and no labels.")
        return super().to_onnx(*args, **kwargs)

    def _check_fitted(self) -> None:
        if not bool(self.model.fitted):
            msg = (
                f"This {type(self).__name__} was never fitted, so there is nothing to export. Train it first, or load "
                "a checkpoint (`--ckpt_path`)."
            )
            raise NotFittedError(msg)
