# SPDX-License-Identifier: Apache-2.0
"""What every flow detector does in anomalib's engine."""

from __future__ import annotations

import inspect
import logging
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from anomalib import LearningType
from anomalib.data import InferenceBatch
from anomalib.metrics import AnomalibMetric, Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from anomalib_flowood import processes
from anomalib_flowood.checks import check_loading, check_workers
from anomalib_flowood.data.decoding import read_header
from anomalib_flowood.data.path_dataset import resize_of
from anomalib_flowood.data.prediction import read_as_trained
from anomalib_flowood.metrics import AUROC, FPR95, BitsPerDim, BitsPerDimMedian, F1Score, PerSetEvaluator
from anomalib_flowood.names import alternatives
from anomalib_flowood.parsing import arguments_of
from anomalib_flowood.saving import keep_end, save_whole, say_if_kept_earlier
from anomalib_flowood.trainers import (
    check_dealing,
    check_validation_images,
    count_share,
    drop_callbacks,
    forget_results,
    images_of,
    prediction_loaders,
    trainer_of,
    training_loaders,
    unlist_training,
    validate_again,
)

from .averaging import Averaging
from .export import CheckedExport
from .flow_model import FlowModel
from .post_processor import ConformalPostProcessor
from .restoring import Restoring
from .resuming import Resuming
from .score_fitting import ScoreFitting
from .training import FlowTraining

logger = logging.getLogger(__name__)

Size = TypeVar("Size", bound="tuple[int, int] | None")

_FEW = 200
"""Fewer training images than these are few."""

_SHRUNK = 8
"""Images whose sides are shrunk by more than this lose details that users are told of."""

_SMALLER = 2
"""For images whose sides are shrunk by more than this, users are told what a larger image_size would do."""

_MUCH = 2**30
"""Bytes of returned predictions from which on a user is warned."""

_COMPONENTS = (PreProcessor, PostProcessor, Evaluator)
"""Callbacks that belong to a detector, not to the trainer."""

_MAX_VALUE = "anomalib_flowood_max_value"


# No subclass of `AnomalibModule`, of which anomalib lists direct ones only.
class FlowModule(FlowTraining, Averaging, ScoreFitting, Resuming, Restoring, CheckedExport):
    """Mixin for :class:`~anomalib.models.components.AnomalibModule`, to the left of it.

    The detector sets ``max_epochs`` and ``learning_rate``, and implements ``training_inputs``.
    """

    model: FlowModel
    images_at_once: int = 32
    """Images that ``flowood predict`` scores at once; no score depends on the other images of its batch."""
    bits_seconds = 0.0
    """Seconds that the last test spent on bits per dimension rather than scores."""
    _saved_whole = False
    """Whether the last checkpoint has everything that scores need."""
    _went_on_at = -1
    """The step of the last validation, if training was to go on behind it; else -1."""
    max_value: int | None
    """The value of white in 16-bit image files, from the training data; kept in checkpoints.

    The attribute is missing until the detector has seen data or a checkpoint.
    """

    # -- what images are, and how they are scored ------------------------------------------------------------------

    def resized_to(self, image_size: Size, pre_processor: PreProcessor | bool) -> Size | tuple[int, int]:
        """Return the size of images behind a given pre-processor, from which anomalib's detectors have theirs.

        ``FeatureMapFlow(pre_processor=FeatureMapFlow.configure_pre_processor((224, 224)))`` is therefore the same as
        ``FeatureMapFlow(image_size=(224, 224))``, also in the hyper-parameters.

        Args:
            image_size: The detector's argument: height and width.
            pre_processor: The detector's argument.

        Returns:
            Height and width; ``image_size``, if no pre-processor is given, or it does not tell a size.

        Raises:
            ValueError: If ``image_size`` is neither that size nor the default.
        """
        if not isinstance(pre_processor, PreProcessor):
            return image_size
        try:
            size = self.input_size
        except (RuntimeError, ValueError):  # anomalib tries one pixel, which some transforms do not take
            size = None
        default = getattr(inspect.signature(type(self)).parameters.get("image_size"), "default", image_size)
        if size is None or (image_size is not None and tuple(image_size) == tuple(size)):
            return image_size
        if image_size not in (None, default):
            given, resized = (f"{height} x {width}" for height, width in (image_size, size))
            msg = (
                f"image_size is {given}, but the pre-processor resizes images to {resized} (height x width). Leave out "
                "image_size, or make them agree."
            )
            raise ValueError(msg)
        height, width = size
        self.hparams["image_size"] = height, width
        return height, width

    @property
    def takes_bytes(self) -> bool:
        """Whether images of the detector's size may be ``uint8``, instead of floats in [0, 1]."""
        return False

    def setup(self, stage: str) -> None:
        """Check data and trainer; in a fit take the value of white from the data module, otherwise set it there."""
        check_loading(self.trainer.datamodule)  # type: ignore[attr-defined]
        check_workers(self.trainer.datamodule)  # type: ignore[attr-defined]
        check_validation_images(self.trainer)
        check_dealing(self.trainer)
        super().setup(stage)
        if processes.ranks() > 1:  # Lightning advises one device, since images repeat; here repeated ones do not count
            warnings.filterwarnings("ignore", message=".*`DistributedSampler` that replicates some samples")
        save_whole(self.trainer)
        if stage == TrainerFn.FITTING:
            self.max_value = getattr(self.trainer.datamodule, "max_value", None)  # type: ignore[attr-defined]
            self._tell_of_few_images()
            self._tell_of_lost_details()
        else:
            forget_results(self.trainer)
            self._read_alike()

    def begin_fit(self) -> None:
        """Train on one loader, which may be given in a list; Lightning would make lists of its batches then.

        Raises:
            ValueError: If there are several.
        """
        super().begin_fit()
        loaders = training_loaders(self.trainer)
        if len(loaders) != 1 or isinstance(loaders[0], dict | CombinedLoader):
            found = ", ".join(type(loader).__name__ for loader in loaders) or "none"
            msg = f"{type(self).__name__} takes one DataLoader of training images, got {found}."
            raise ValueError(msg)
        unlist_training(self.trainer)
        if not self._trainable:  # of a share that Lightning draws by itself nothing would be seen
            count_share(self.trainer)

    def check_number(self, images: int) -> None:
        """Refuse too few training images to fit anything to; detectors with such a bound override it."""

    def _tell_of_few_images(self) -> None:
        """Say whether few images are enough."""
        images = images_of(training_loaders(self.trainer))
        if not 0 < images < _FEW:
            return
        if not self._trainable:
            logger.info("%d images are few, and will do: %s trains nothing, but fits.", images, type(self).__name__)
            return
        better = alternatives(known_flows(lambda cls: hasattr(cls, "least_images")), quote="")
        logger.warning(
            "%d images are few to train a flow on, which may learn them by heart. A detector on a pretrained network "
            "will do with them: %s, without couplings (coupling_layers 0, the default).",
            images,
            better,
        )

    def _tell_of_lost_details(self) -> None:
        """Say what resizing loses, if the first training image is much larger than the detector's input."""
        data_sets = (getattr(loader, "dataset", None) for loader in training_loaders(self.trainer))
        tables = (getattr(data_set, "samples", None) for data_set in data_sets)  # anomalib's; torchvision has lists
        paths = [str(path) for table in tables for path in getattr(table, "image_path", ())[:1]]
        size: Any = getattr(resize_of(self), "size", ())
        if len(size) != 2 or not paths or not Path(paths[0]).is_file():
            return
        height, width, _ = read_header(paths[0])
        times = min(height / size[0], width / size[1])
        if times > _SHRUNK:
            logger.info(
                "Images of %d x %d pixels are resized to %d x %d: of details smaller than some %d pixels nothing is "
                "left. In tiles %s sees them at their own size: image_size [%d, %d], tile_size [224, 224].",
                *(width, height, size[1], size[0], times),
                *(" and ".join(known_flows(_takes_tiles)), height, width),
            )
        elif times > _SMALLER and _takes_tiles(type(self)):
            logger.info(
                "Images of %d x %d pixels are resized to %d x %d. A larger image_size finds smaller defects, and takes "
                "longer in proportion to its pixels: image_size [%d, %d] twice as long.",
                *(width, height, size[1], size[0], *(round(side * math.sqrt(2) / 32) * 32 for side in size)),
            )

    def _read_alike(self) -> None:
        """Let images be read as the training images were."""
        trainer: Any = self.trainer
        read_as_trained(self, trainer.datamodule, prediction_loaders(trainer))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the value of white in 16-bit files."""
        super().on_save_checkpoint(checkpoint)
        self._saved_whole = self._is_whole()
        checkpoint[_MAX_VALUE] = getattr(self, "max_value", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load as :class:`Restoring` does, and read images as the training images were."""
        super().on_load_checkpoint(checkpoint)
        self.max_value = checkpoint.get(_MAX_VALUE)
        if trainer_of(self) is not None:
            self._read_alike()

    def on_validation_start(self) -> None:
        """Note whether training is to go on: only for its last validation everything is fitted."""
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._went_on_at = -1 if self._training_ends() else self.trainer.global_step

    def on_train_epoch_end(self) -> None:
        """Validate once more if training ends behind a validation that expected it to go on, as a callback may ask."""
        if self._training_ends() and self._went_on_at == self.trainer.global_step:
            validate_again(self.trainer)
            self._saved_whole = False  # what is saved is from before
        super().on_train_epoch_end()

    def on_fit_end(self) -> None:
        """Make sure that there is a checkpoint that can score: Lightning writes none without a last validation."""
        super().on_fit_end()
        keep_end(self.trainer, whole=self._saved_whole or not self._is_whole())
        say_if_kept_earlier(self.trainer)

    def _is_whole(self) -> bool:
        """Whether everything is fitted that scores need."""
        return bool(self.model.fitted) and self.model.scorer.ready

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Score a batch for the threshold, and log the mean −log p per dimension of its normal images.

        Until the score is fitted, at the end of training, −log p stands in for it.
        """
        found, losses = self.judged(batch)
        batch.update(**found._asdict())
        own = processes.own_rows(self.trainer, batch_idx, len(losses), dataloader_idx)
        processes.cut(batch, own)
        losses = losses[:own] if batch.gt_label is None else losses[:own][~batch.gt_label]
        if losses.numel() or processes.ranks() > 1:  # all processes have to log, since another one may have some
            value = losses.mean() if losses.numel() else losses.new_zeros(())
            self.log("val_loss", value, prog_bar=True, batch_size=losses.numel(), sync_dist=True)
        return batch

    def judged(self, batch: Any) -> tuple[InferenceBatch, Tensor]:
        """Score a batch, by −log p until the score is fitted; also return −log p per dimension, ``(N,)``."""
        model, inputs = self.model, self.inputs_of(batch)
        found = model.predict(inputs, None if model.scorer.ready else model.nll)
        assert found.pred_score is not None  # every detector scores images
        return found, found.pred_score if model.scores_are_likelihoods else model.nll(model, inputs)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Score a batch; where the score is a likelihood, put its ``bits_per_dim``, ``(N,)``, beside it.

        Those of pixels take further evaluations of the flow, which scores do not need: they are only computed if a
        metric wants them, and ``bits_seconds`` says how long that took.
        """
        outputs: Any = super().test_step(batch, batch_idx)
        metrics: list[Any] = [*self.evaluator.test_metrics] if isinstance(self.evaluator, Evaluator) else []
        if self.model.scores_are_likelihoods and any(isinstance(metric, BitsPerDim) for metric in metrics):
            start = self._clock()
            log_prob = -outputs.pred_score * self.model.dims
            outputs.bits_per_dim = self.model.bits_per_dim(outputs.image, log_prob=log_prob)
            self.bits_seconds += self._clock() - start
        processes.cut(outputs, processes.own_rows(self.trainer, batch_idx, len(outputs.pred_score), dataloader_idx))
        return outputs

    def on_test_start(self) -> None:
        """Reset the time spent on bits per dimension."""
        super().on_test_start()
        self.bits_seconds = 0.0

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Warn of the memory of predictions, which Lightning keeps until the end if it is to return them."""
        super().on_predict_batch_end(outputs, batch, batch_idx, dataloader_idx)
        if batch_idx or dataloader_idx or not self.trainer.predict_loop.return_predictions:
            return
        kept = sum(value.nbytes for value in vars(outputs).values() if isinstance(value, Tensor))
        batches = sum(self.trainer.num_predict_batches)
        if math.isfinite(batches) and kept * batches > _MUCH:
            logger.warning(
                "Engine.predict returns images and maps of all %d batches, which will take %.1f GiB. With "
                "return_predictions=False nothing is kept, callbacks see each batch; anomalib_flowood.load(…)"
                ".score_batches gives one after the other, and flowood predict writes what is said of them.",
                batches,
                kept * batches / 2**30,
            )

    def _clock(self) -> float:
        """Seconds, after the device has finished its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    # -- anomalib ------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's components, and remove those of a detector that the trainer worked with before.

        Lightning only replaces callbacks of the same class, and two pre-processors would both change the images.
        """
        trainer = trainer_of(self)
        if trainer is not None:
            drop_callbacks(trainer, lambda part: isinstance(part, _COMPONENTS))
        components: Any = super().configure_callbacks()
        return [*components]

    def teardown(self, stage: str) -> None:
        """Remove components and results from the trainer, which may work with another detector next."""
        super().teardown(stage)
        forget_results(self.trainer)
        own = {id(part) for part in (self.pre_processor, self.post_processor, self.evaluator, self.visualizer)}
        drop_callbacks(self.trainer, lambda part: id(getattr(part, "pre_processor", part)) in own)

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

        A :class:`PerSetEvaluator` without arguments also logs AUPR, which depends on how many images of either side
        there are, and the detection error, which follows AUROC.
        """
        return PerSetEvaluator(
            test_metrics=[*image_metrics(), BitsPerDim(strict=False), BitsPerDimMedian(strict=False)]
        )

    @classmethod
    def configure_visualizer(cls) -> Any:
        """None: without an anomaly map there is nothing to draw, and anomalib would write one picture per image."""


def image_metrics() -> list[AnomalibMetric]:
    """The test metrics of images that every detector has, whatever its score is."""
    return [AUROC(prefix="image_"), FPR95(prefix="image_"), F1Score(prefix="image_", strict=False)]


def _takes_tiles(detector: type) -> bool:
    return "tile_size" in arguments_of(detector)


def known_flows(suits: Callable[[type], bool] | None = None) -> list[str]:
    """Return the names of the detectors of this kind that anomalib knows, for messages.

    Args:
        suits: Leaves out the classes for which it is false; all are named if it is not given.
    """
    flows = [cls for cls in AnomalibModule.__subclasses__() if issubclass(cls, FlowModule)]
    return sorted(cls.__name__ for cls in flows if suits is None or suits(cls))
