# SPDX-License-Identifier: Apache-2.0
"""What every flow detector does in anomalib's engine."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib import LearningType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.progress import Progress
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from anomalib_flowood import __version__
from anomalib_flowood.data.prediction import read_as_trained
from anomalib_flowood.metrics import AUROC, FPR95, BitsPerDim, BitsPerDimMedian, F1Score, PerSetEvaluator
from anomalib_flowood.scores import SCORES
from anomalib_flowood.scores.score import Inputs

from .checkpoints import (
    CLASS,
    SCORE,
    VERSION,
    CheckpointError,
    check_finite,
    check_settings,
    plain,
    read_checkpoint,
    written_by,
)
from .export import CheckedExport
from .flow_model import FlowModel, check_precision
from .post_processor import ConformalPostProcessor

logger = logging.getLogger(__name__)


class TrainingDivergedError(FloatingPointError):
    """Training met a NaN or infinite loss."""


class FlowModule(CheckedExport):  # no subclass of `AnomalibModule`, of which anomalib lists direct ones only
    """Mixin for :class:`~anomalib.models.components.AnomalibModule`, to the left of it.

    The detector sets ``max_epochs`` and ``learning_rate``, and implements ``training_inputs``.
    """

    model: FlowModel
    max_epochs: int
    learning_rate: float
    bits_seconds = 0.0
    """Seconds of the last test that went into bits per dimension, and not into scores."""
    max_value: int | None
    """What white is in image files of 16 bits, from the data that the detector was trained on; kept in checkpoints.

    There is no such attribute as long as the detector has seen neither data nor a checkpoint.
    """

    may_change: ClassVar[frozenset[str]] = frozenset({"score", "max_epochs", "learning_rate", "pre_trained"})
    """Arguments that may differ from those of a checkpoint: the score, and what counts in training alone."""

    _seen: tuple[tuple[int, int], ...] = ()
    """Versions of the weights that were checked last."""
    _left = ""
    """Score of a checkpoint that was left behind, as has been said."""

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        """The trainer that the detector is attached to."""
        return LightningModule.trainer.fget(self)  # type: ignore[attr-defined]

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        if trainer is not None:
            check_precision(trainer.precision)
        # Here, and not in `trainer_arguments`, which would override what the user asked for: when a fit begins, a
        # trainer without any limit would run 1,000 epochs. A limit in steps or time is a limit.
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if trainer is None:
            return
        loop = trainer.fit_loop
        timed = any(type(callback).__name__ == "Timer" for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if loop.max_epochs is None and trainer.max_steps == -1 and not timed:
            loop.max_epochs = self.max_epochs

    def setup(self, stage: str) -> None:
        """Learn from the data module what white is in files of 16 bits; in all but a fit, tell it."""
        super().setup(stage)
        if stage == TrainerFn.FITTING:
            self.max_value = getattr(self.trainer.datamodule, "max_value", None)  # type: ignore[attr-defined]
        else:
            self._read_alike()

    def _read_alike(self) -> None:
        """Let images be read as those of the training were."""
        trainer: Any = self.trainer
        read_as_trained(self, trainer.datamodule, trainer.predict_loop._data_source.instance)

    def inputs_of(self, batch: Any) -> Inputs:
        """What the density of a pre-processed batch is computed from."""
        return self.model.inputs(batch.image)

    def training_inputs(self, batch: Any) -> Inputs:
        """The same for a training batch, with the noise that training adds."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean −log p per dimension; the losses of the flows that a score trains beside are added.

        Raises:
            TrainingDivergedError: If it is NaN or infinite.
        """
        inputs = self.training_inputs(batch)
        loss = -self.model.density(inputs).log_prob.mean() / self.model.dims
        self.log("train_loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        others = self.model.scorer.training_loss(self.model, inputs)
        if others is not None:
            loss = loss + others
        if not bool(torch.isfinite(loss)):
            self._diverged(f"the loss is {loss.item()} in epoch {self.trainer.current_epoch}, batch {batch_idx}")
        return loss

    def on_train_epoch_start(self) -> None:
        """Forget what the score has learnt of other weights."""
        self.model.scorer.forget()

    def on_train_epoch_end(self) -> None:
        """Mark the torch model as fitted, so that it may be exported; fit the score where no validation did."""
        trainer: Any = self.trainer  # whose loaders are not typed as iterables
        self.model.fitted.fill_(True)
        if not self.model.scorer.ready and self._training_ends():
            self.fit_score(trainer.train_dataloader)

    def on_train_end(self) -> None:
        """Say where the score could not be fitted."""
        if not self.model.scorer.ready:
            logger.warning(
                "Training ended before its last epoch did, so the score %r is not fitted: `flowood score` fits it.",
                self.model.scorer.name,
            )

    def on_fit_end(self) -> None:
        """Keep no calibration that is of other weights than the final ones."""
        self.check_weights()

    def on_predict_start(self) -> None:
        """Decide by the calibration of these weights alone."""
        self.check_weights()

    def on_validation_start(self) -> None:
        """Fit the score with the last weights, so that validation images are scored and calibrated by it."""
        trainer: Any = self.trainer
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._training_ends():
            self.fit_score(trainer.train_dataloader)

    def validation_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """Score a batch for the threshold, and log the mean −log p per dimension of its normal images.

        As long as the score is not fitted, which it is at the end of training, −log p stands in for it.
        """
        del batch_idx
        model, inputs = self.model, self.inputs_of(batch)
        batch.update(**model.predict(inputs, None if model.scorer.ready else model.nll)._asdict())
        losses = batch.pred_score if model.scores_are_likelihoods else model.nll(model, inputs)
        losses = losses if batch.gt_label is None else losses[~batch.gt_label]
        if losses.numel():
            self.log("val_loss", losses.mean(), prog_bar=True, batch_size=losses.numel())
        return batch

    def test_step(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch; where the score is a likelihood, put its ``bits_per_dim``, ``(N,)``, beside it.

        Those of pixels take more evaluations of the flow, which the score does without: nothing is computed unless a
        metric wants them, and ``bits_seconds`` says how long it took.
        """
        outputs: Any = super().test_step(batch, batch_idx, *args, **kwargs)
        metrics: list[Any] = [*self.evaluator.test_metrics] if isinstance(self.evaluator, Evaluator) else []
        if not self.model.scores_are_likelihoods or not any(isinstance(metric, BitsPerDim) for metric in metrics):
            return outputs
        start = self._clock()
        log_prob = -outputs.pred_score * self.model.dims
        outputs.bits_per_dim = self.model.bits_per_dim(outputs.image, log_prob=log_prob)
        self.bits_seconds += self._clock() - start
        return outputs

    def on_test_start(self) -> None:
        """Set the clock of the bits per dimension to zero, and decide by the calibration of these weights alone."""
        self.check_weights()
        self.bits_seconds = 0.0

    def _clock(self) -> float:
        """Seconds, when all that was begun on the device is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def configure_optimizers(self) -> Any:
        """Adam on the flows, its learning rate following a cosine down to zero over the whole training."""
        parameters = [parameter for flow in self.model.trained_flows for parameter in flow.parameters()]
        # A fused optimizer divides the gradients by the loss scale of 16-mixed inside of its step, and so after they
        # were clipped; Lightning refuses a gradient_clip_val then.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, fused=not scaled)
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
            for flow in self.model.trained_flows:
                nn.utils.clip_grad_norm_(flow.parameters(), max_norm=50.0)
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

    # -- score ---------------------------------------------------------------------------------------------------

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
        self.model.train(training)
        if isinstance(self.post_processor, ConformalPostProcessor):
            self.post_processor.forget()

    @torch.no_grad()
    def _score_inputs(self, loader: Iterable[Any], images: int) -> Iterator[Inputs]:
        """Prepare so many images of a loader, as far as it has them."""
        total = min(images, len(loader.dataset)) if hasattr(loader, "dataset") else images
        with Progress(transient=True, disable=not self._shows_progress) as progress:
            bar = progress.add_task(f"Fitting the score {self.model.scorer.name}", total=total)
            seen = 0
            for batch in loader:
                batch = self.transfer_batch_to_device(batch, self.device, 0)
                transform = getattr(self.pre_processor, "transform", None)
                if transform is not None and hasattr(batch, "image"):  # stored features are of pre-processed images
                    batch.image = transform(batch.image)
                inputs = tuple(part[: images - seen] for part in self.inputs_of(batch))
                yield inputs
                seen += len(inputs[0])
                progress.update(bar, completed=seen)
                if seen >= images:
                    return

    @property
    def _shows_progress(self) -> bool:
        trainer = self._trainer
        return trainer is None or (trainer.progress_bar_callback is not None and trainer.is_global_zero)

    def _training_ends(self) -> bool:
        """Whether the weights may be the last ones: at the end of the last epoch, or of any that may be chosen."""
        trainer = self.trainer
        loop = trainer.fit_loop
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:  # in the midst of an epoch, too
            return True
        if not loop.epoch_loop.batch_progress.is_last_batch:
            return False
        if any(getattr(callback, "monitor", None) for callback in callbacks):  # early stopping, the best checkpoint
            return True
        return loop.max_epochs not in {None, -1} and trainer.current_epoch + 1 >= loop.max_epochs

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
        """AUROC and FPR95, of each outside set too; the labels' F1 score; bits per dimension of likelihoods.

        AUPR depends on how many images of either side there are, and the detection error follows AUROC: a
        :class:`PerSetEvaluator` without arguments logs these too.
        """
        return PerSetEvaluator(
            test_metrics=[
                AUROC(prefix="image_"),
                FPR95(prefix="image_"),
                F1Score(prefix="image_", strict=False),
                BitsPerDim(strict=False),
                BitsPerDimMedian(strict=False),
            ]
        )

    @classmethod
    def configure_visualizer(cls) -> Any:
        """None: without an anomaly map there is nothing to draw, and anomalib would write one picture per image."""

    # -- weights and their calibration ---------------------------------------------------------------------------

    def fingerprint(self) -> Tensor:
        """Return a hash of all that a score depends on, ``(32,)``, bytes: weights, fitted statistics, settings, score.

        It is the same on every device, and in float64 what it is in float32.
        """
        scorer = self.model.scorer if self.model.scorer.ready else self.model.nll
        defaults = inspect.signature(type(self).__init__).parameters
        # Those alone that are not the default, so that a setting which a later version adds changes nothing.
        settings = {
            name: value
            for name, value in plain(dict(self.hparams)).items()
            if name not in {*self.may_change, "backbone"}
            and (name not in defaults or value != plain(defaults[name].default))
        }
        digest = hashlib.sha256(json.dumps([scorer.name, settings], sort_keys=True).encode())
        for name, value in self.model.state_dict().items():
            if name == "fitted":  # says that training went on to the end of an epoch
                continue
            value = value.float() if value.is_floating_point() else value
            # Nobody forges weights: a checksum of each tensor is enough, and three times as fast.
            checksum = zlib.crc32(value.cpu().contiguous().numpy())
            digest.update(f"{name} {tuple(value.shape)} {checksum}\n".encode())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    def check_weights(self) -> None:
        """Refuse weights that are NaN; drop a calibration that is not of the present weights, score and settings.

        Tests, predictions, exports and loading do so by themselves, and so does a call of the detector where weights
        have changed since.

        Raises:
            ValueError: If a weight is NaN or infinite, or the calibration too small for its ``alpha``.
        """
        check_finite(None, {f"model.{name}": value for name, value in self.model.state_dict().items()})
        if isinstance(self.post_processor, ConformalPostProcessor):
            self.post_processor.check(self.fingerprint())
        self._seen = self._versions()

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """Return what changes whenever a weight or the calibration does, at little cost."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if isinstance(self.post_processor, ConformalPostProcessor):
            tensors.append(self.post_processor.calibration)
        return tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Score images and decide, as :meth:`AnomalibModule.forward` does, by a calibration that is theirs."""
        if not torch.compiler.is_compiling() and self._seen != self._versions():
            self.check_weights()
        return super().forward(batch, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights; a calibration among them that is of others is dropped.

        Raises:
            ValueError: If a weight is NaN or infinite.
        """
        keys = super().load_state_dict(state_dict, *args, **kwargs)
        self.check_weights()
        return keys

    # -- checkpoints and export ----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the names of class, score and version; refuse to replace a good checkpoint by one with NaN in it."""
        super().on_save_checkpoint(checkpoint)
        for flow in self.model.trained_flows:
            for name, value in flow.named_parameters():
                if not bool(torch.isfinite(value).all()):
                    self._diverged(f"the weights of {name} are NaN or infinite")
        checkpoint[CLASS] = type(self).__name__
        checkpoint[SCORE] = self.model.scorer.name
        checkpoint[VERSION] = __version__
        checkpoint["anomalib_flowood_max_value"] = getattr(self, "max_value", None)
        self._leave_callback_state(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another class or of other settings; leave behind what belongs to another score.

        Raises:
            ValueError: If it was written by another class, or lacks the flows that the score trains.
            SettingsError: If it was trained with other settings than this detector has: neither can be applied to the
                other, since which were meant nobody knows.
            CheckpointError: If a weight is NaN or infinite.
        """
        path = None if self._trainer is None else self._trainer.ckpt_path
        self._check_class(checkpoint, path)
        check_settings(
            path,
            checkpoint.get("hyper_parameters", {}),
            self.hparams,
            self.may_change,
            f"{type(self).__name__}.load_from_checkpoint builds a detector with the checkpoint's settings, "
            "`flowood … --ckpt_path` without --model does, too.",
        )
        state = checkpoint["state_dict"]
        check_finite(path, state)
        self._leave_callback_state(checkpoint)
        scorer = self.model.scorer
        # Not from the hyper-parameters, which by now are those that the checkpoint is loaded with.
        trained = checkpoint.get(SCORE, "nll")
        if trained != scorer.name:
            if scorer.flows:
                msg = (
                    f"The score {scorer.name!r} compares flows that train together, and the checkpoint was trained "
                    f"with score {trained!r}. Train with score {scorer.name!r}."
                )
                raise ValueError(msg)
            if trained != self._left:  # the engine loads what a command has opened before
                logger.warning(
                    "The checkpoint has the score %r and this detector %r (argument score): what belongs to the former "
                    "is left behind, the calibration of labels and p-values too.",
                    trained,
                    scorer.name,
                )
            self._left = trained
            for key in [key for key in state if key.startswith("model.scorer.")]:
                del state[key]
            # The thresholds of any post-processor; anomalib's are NaN before a validation.
            for key in [key for key in state if key.startswith("post_processor.")]:
                value = state[key]
                if "calibrat" in key:
                    state[key] = value[:0]
                elif value.is_floating_point():
                    state[key] = torch.full_like(value, float("nan"))
        super().on_load_checkpoint(checkpoint)
        self.max_value = checkpoint.get("anomalib_flowood_max_value")
        if self._trainer is not None:
            self._read_alike()

    def _leave_callback_state(self, checkpoint: dict[str, Any]) -> None:
        """Take the post-processor out of the callbacks' states, which are restored after the weights.

        It is a part of the detector, with whose weights its calibration comes.
        """
        if isinstance(self.post_processor, Callback):
            checkpoint.get("callbacks", {}).pop(self.post_processor.state_key, None)

    @classmethod
    def _check_class(cls, checkpoint: dict[str, Any], path: object = None) -> None:
        writer = checkpoint.get(CLASS)
        if writer != cls.__name__:
            by = f"written by {writer}" if writer else "not written by a detector of anomalib_flowood"
            remedy = f"load it with anomalib_flowood.{writer}" if writer else "load it with the class that wrote it"
            raise CheckpointError(path, f"was {by}, so {cls.__name__} cannot load it; {remedy}.")

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **kwargs: Any) -> AnomalibModule:  # type: ignore[override]
        """Load a detector; the arguments are those of :meth:`AnomalibModule.load_from_checkpoint`.

        Its settings are the checkpoint's. ``score``, what counts in training alone, and the post-processor's ``alpha``
        may be given anew.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If it is broken, was written by another class, or does not fit it.
            SettingsError: If another setting is given that differs from the checkpoint's.
        """
        # Before anything is built: the other class's arguments may name a backbone that is not here.
        checkpoint = read_checkpoint(checkpoint_path)
        cls._check_class(checkpoint, checkpoint_path)
        check_finite(checkpoint_path, checkpoint["state_dict"])
        stored = checkpoint["hyper_parameters"]
        allowed = ", ".join(sorted(cls.may_change & inspect.signature(cls.__init__).parameters.keys()))
        check_settings(
            checkpoint_path,
            stored,
            kwargs,
            cls.may_change,
            f"Leave them out, or train with them. What may change: {allowed}, and the post-processor's alpha.",
        )
        unknown = sorted(stored.keys() - inspect.signature(cls.__init__).parameters.keys())
        if unknown:
            logger.warning(
                "The checkpoint %s (%s) has settings that this version does not know, which are left out: %s.",
                checkpoint_path,
                written_by(checkpoint),
                ", ".join(unknown),
            )
        if "pre_trained" in stored:
            # The checkpoint holds the backbone's weights: nothing needs to be fetched.
            kwargs["pre_trained"] = False
        try:
            detector: Any = super().load_from_checkpoint(checkpoint_path, **kwargs)
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            first = " ".join(str(error).split())[:300]
            what = f"({written_by(checkpoint)}) does not fit {cls.__name__} with its settings: {first} …"
            raise CheckpointError(checkpoint_path, what) from error
        if "pre_trained" in stored:
            detector.hparams["pre_trained"] = stored["pre_trained"]
        detector._checkpoint_path = Path(checkpoint_path)
        return detector

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export as :meth:`AnomalibModule.to_torch` does, if fitted."""
        self._check_fitted()
        return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]
        """Export as :meth:`AnomalibModule.to_onnx` does, if fitted; OpenVINO export passes here too."""
        self._check_fitted()
        self._check_exportable()
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
        self.check_weights()

    def _check_exportable(self) -> None:
        if self.dtype == torch.float64:
            msg = (
                "ONNX Runtime and OpenVINO do not convolve in 64 bits, which these weights have (precision 64-true): "
                "call detector.float() first, or export the checkpoint (`--ckpt_path`), which is loaded in 32 bits."
            )
            raise ValueError(msg)
        model = self.model
        if not model.scorer.exportable(model):
            able = [name for name, score in SCORES.items() if score.suits(model) and score.exportable(model)]
            msg = (
                f"The score {model.scorer.name!r} cannot be exported to ONNX or OpenVINO, which know neither "
                f"compressors nor Jacobians. Scores that can: {', '.join(able)}. `flowood score` gives a trained "
                "checkpoint another score; export type torch takes any."
            )
            raise ValueError(msg)
