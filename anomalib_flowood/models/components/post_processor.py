# SPDX-License-Identifier: Apache-2.0
"""Decisions without anomalous validation data."""

from __future__ import annotations

import logging
from functools import partial
from itertools import compress
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics import CatMetric

from anomalib_flowood import conformal, processes
from anomalib_flowood.checks import refuse_infinite, refuse_nan
from anomalib_flowood.trainers import is_trial

from .calibration_images import how_to_have_more, most_calibration_images
from .squash import squash

logger = logging.getLogger(__name__)


class ConformalPostProcessor(PostProcessor):
    """Labels an image anomalous if its split-conformal p-value is below ``alpha``.

    The calibration images are the validation images with label 0; those without a label are ignored. Of new images from
    the same distribution, a share of at most ``alpha`` is then flagged in expectation: see
    :mod:`anomalib_flowood.conformal`.

    ``pred_score`` lies in [0, 1] and grows with the raw score; it is above 0.5 exactly if the label is 1. With the
    distance x from the threshold in interquartile ranges of the calibration scores, it is 0.5 / (1 + x) below the
    threshold and 1 - 0.5 / (1 + 4 x)^(1/4) above: every step rounds monotonically, so that no order is ever reversed,
    and the heavy tail keeps extreme scores apart. Float32 has 2^23 numbers between 0.5 and 1, fewer than between most
    thresholds and infinity; where the last bit matters, use the batch's ``raw_score``, ``(N,)``, or ``p_value``,
    ``(N,)``, float64.

    A pixel of an anomaly map is marked if its value is above the threshold that the same rule sets on the maxima of
    the calibration images' maps: of new normal images, a share of at most ``alpha`` has any marked pixel, in
    expectation. ``anomaly_map`` is in [0, 1] like scores, with 0.5 at that threshold, in units of the range of normal
    maps.

    With fewer than 20 calibration images no p-value is below 0.05, the default level. Then images that score above all
    of them are labelled anomalous, a share of 1 / (n + 1) of the normal images in expectation, and a warning says so;
    any other level is a requirement, and refused if it cannot be reached.

    A calibration is valid for the weights, score and settings that produced its scores, whose fingerprint is stored
    with it: see :meth:`check`.

    Args:
        alpha: The level, in (0, 1); ``None`` for that of the checkpoint from which the detector is loaded, and 0.05
            without one.
        contamination: The largest share of the calibration images that may be anomalies, in [0, 0.5). As many of the
            highest scores, k of n, are ignored, so that anomalies among the calibration images cannot hide others; up
            to α + k / (n - k + 1) of the normal images are flagged then: see :func:`conformal.trimmed`. ``None`` for
            the checkpoint's, and 0 without one.

    Raises:
        ValueError: If the level is not in (0, 1), or the share not in [0, 0.5).
    """

    calibration: Tensor
    """Scores of the calibration images, ascending, ``(n,)``; empty before a validation."""
    pixel_calibration: Tensor
    """Maxima of the calibration images' anomaly maps, ascending, ``(n,)``; empty if there are no maps."""
    calibrated_for: Tensor
    """Fingerprint of the detector that produced them, ``(32,)``, bytes; empty if it is unknown."""

    def __init__(self, alpha: float | None = None, contamination: float | None = None) -> None:
        super().__init__()
        self._contamination = contamination
        self._stored_contamination = 0.0
        conformal.trimmed_number(0, self.contamination)  # raises if it is no share
        self._chosen = alpha is not None
        self._overruled: float | None = None
        self._alpha = conformal.DEFAULT_ALPHA if alpha is None else alpha
        conformal.images_needed(self._alpha)  # raises if it is no level
        self.register_buffer("calibration", torch.empty(0))
        self.register_buffer("pixel_calibration", torch.empty(0))
        self.register_buffer("calibrated_for", torch.empty(0, dtype=torch.uint8))
        # Gathered from all processes by this class, since a process may have no normal image.
        new_list = partial(CatMetric, nan_strategy="disable", sync_on_compute=False)
        self._validated, self._validated_minima, self._validated_maxima = new_list(), new_list(), new_list()
        self._scored_by = torch.empty(0, dtype=torch.uint8)
        self._files: dict[str, float] = {}
        self._warned_of = 0
        self._warned_of_contamination = False
        self._said_of_trimming = ""

    @property
    def alpha(self) -> float:
        """The level. One that was set stays when a checkpoint with another one is loaded."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        conformal.images_needed(alpha)
        self._alpha, self._chosen = alpha, True

    @property
    def contamination(self) -> float:
        """The share of calibration images that may be anomalies: the one that was given, or the checkpoint's."""
        return self._stored_contamination if self._contamination is None else self._contamination

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return ("alpha", "contamination")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take a checkpoint's level and contamination, unless others were chosen."""
        self._stored_contamination = config.get("contamination", 0.0)
        stored = config.get("alpha")
        if stored is None or stored == self._alpha or stored == self._overruled:
            return
        if self._chosen:
            self._overruled = stored  # which is said once
            logger.warning(
                "Labels are at alpha = %g, as asked for, and not at the checkpoint's %g.", self.alpha, stored
            )
        else:
            self._alpha = stored

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a calibration of any size; a checkpoint of another post-processor leaves the detector uncalibrated."""
        if f"{prefix}calibration" not in state_dict:
            logger.warning(
                "The checkpoint has no calibration scores, which labels and p-values come from: it was trained with "
                "another post-processor, as anomalib's. There are raw scores alone. `flowood validate --ckpt_path` "
                "calibrates, and writes a checkpoint with the calibration; "
                "open_checkpoint(PATH, post_processor=PostProcessor()) has what anomalib's has learnt."
            )
        for name in ("calibration", "pixel_calibration", "calibrated_for"):
            buffer = getattr(self, name)
            stored = state_dict.setdefault(f"{prefix}{name}", buffer.new_empty(0))
            setattr(self, name, buffer.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- calibration ---------------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> bool:
        """Whether normal validation images have been scored."""
        return len(self.calibration) > 0

    def calibrate(self, scores: Tensor, map_maxima: Tensor | None = None) -> None:
        """Replace the calibration scores.

        Args:
            scores: Raw scores of in-distribution images that the detector was not trained on, ``(n,)``.
            map_maxima: The largest value of each of their raw anomaly maps, ``(n,)``. Without it no pixel is marked.

        Raises:
            ValueError: If a score is NaN or infinite, there are none, or too few for a level that is not the default.
        """
        maxima = scores.new_empty(0) if map_maxima is None else map_maxima
        both = torch.stack([scores, maxima.to(scores)], 1) if len(maxima) else scores[:, None]
        refuse_infinite(both, "normal validation", "score or map", "no threshold can be set")
        self.check_number(len(scores))
        warning = conformal.looks_contaminated(scores, self.contamination, self._files)
        if warning and not self._warned_of_contamination:
            logger.warning("%s.", warning)
        self._warned_of_contamination = bool(warning)
        said = conformal.price_of_trimming(len(scores), self.contamination, self._rank)
        if said and said != self._said_of_trimming:
            logger.info("%s.", said)
        self._said_of_trimming = said
        self.calibration = scores.detach().to(self.calibration).sort().values
        self.pixel_calibration = maxima.detach().to(self.pixel_calibration).sort().values
        self.calibrated_for = self.calibrated_for.new_empty(0)

    def forget(self) -> None:
        """Drop the calibration, which belongs to other scores."""
        self.calibration = self.calibration.new_empty(0)
        self.pixel_calibration = self.pixel_calibration.new_empty(0)
        self.calibrated_for = self.calibrated_for.new_empty(0)

    def check(self, fingerprint: Tensor) -> None:
        """Drop the calibration if it is of other weights, another score or other settings.

        Args:
            fingerprint: That of the detector as it is now: see :meth:`FlowModule.fingerprint`. A calibration of which
                nobody knows whose it is (from before there were fingerprints, or set by :meth:`calibrate`) is taken for
                its own.

        Raises:
            ValueError: If the calibration is too small for a level that is not the default.
        """
        if not self.calibrated:
            return
        if not len(self.calibrated_for):
            self.calibrated_for = fingerprint.to(self.calibrated_for.device)
        elif not torch.equal(self.calibrated_for.cpu(), fingerprint.cpu()):
            logger.warning(
                "The calibration of labels and p-values belongs to other weights, another score or other settings than "
                "the detector has now (training went on after the last validation, or weights were averaged or loaded):"
                " it is dropped, so that there are raw scores alone. Engine.validate calibrates anew."
            )
            self.forget()
            return
        self._rank(len(self.kept))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what a validation set costs that is too small, or refuse it, before anything is trained."""
        del pl_module
        self._warned_of = 0
        images = None if is_trial(trainer) else most_calibration_images(trainer)
        if images is not None:
            self.check_number(images, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew: only the last validation counts."""
        del trainer, pl_module
        self._validated.reset()
        self._validated_minima.reset()
        self._validated_maxima.reset()
        self._scored_by = self._scored_by.new_empty(0)
        self._files = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Collect the scores of normal images, and the maxima and the range of their maps."""
        del trainer, args, kwargs
        if outputs.gt_label is None:
            return
        fingerprint: Any = getattr(pl_module, "fingerprint", None)
        if not self._validated.update_called and fingerprint is not None:
            # Now, since a callback may exchange the weights for the time of a validation.
            self._scored_by = fingerprint().to(self.calibrated_for.device)
        normal = ~outputs.gt_label.bool()
        scores = outputs.pred_score[normal].detach()
        self._validated.update(scores)
        if paths := getattr(outputs, "image_path", None):
            chosen = compress(paths, normal.tolist())
            self._files |= zip(chosen, scores.to(self._validated.dtype).tolist(), strict=True)
        if outputs.anomaly_map is not None:
            maps = outputs.anomaly_map[normal].detach().flatten(1)
            self._validated_minima.update(maps.amin(1))
            self._validated_maxima.update(maps.amax(1))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate on what was collected, unless it comes from an untrained model or a trial run.

        Raises:
            ValueError: As for :meth:`calibrate`.
        """
        del pl_module
        if trainer.sanity_checking or is_trial(trainer):
            return
        minima, maxima = _collected(self._validated_minima), _collected(self._validated_maxima)
        for files in processes.gathered_objects(self._files):
            self._files |= files
        self.calibrate(_collected(self._validated), maxima)
        self._files = {}
        self.calibrated_for = self._scored_by
        if len(maxima):
            self.pixel_min.copy_(minima.min())
            self.pixel_max.copy_(maxima.max())

    # -- decisions -----------------------------------------------------------------------------------------------

    @property
    def image_threshold(self) -> Tensor:
        """The calibration score above which an image is labelled anomalous, ``()``; NaN before a validation."""
        return self._threshold(self.kept)

    @property
    def pixel_threshold(self) -> Tensor:
        """The maximum of a calibration image's map above which a pixel is marked, ``()``; NaN without maps."""
        return self._threshold(conformal.trimmed(self.pixel_calibration, self.contamination))

    def _threshold(self, ascending: Tensor) -> Tensor:
        n = len(ascending)
        return ascending[n - self._rank(n)] if n else ascending.new_full((), float("nan"))

    @property
    def level(self) -> float:
        """Share of fresh normal images that are labelled anomalous, in expectation; NaN before a validation.

        Labelled are those whose p-value is no larger: it is m / (n + 1), the largest p-value below ``alpha``, or
        1 / (n + 1) where none is. With ``contamination`` n counts what is kept, and the share may be larger.
        """
        n = len(self.kept)
        return self._rank(n) / (n + 1) if n else float("nan")

    @property
    def kept(self) -> Tensor:
        """The calibration scores that decide, ascending: all but the highest, where some may be of anomalies."""
        return conformal.trimmed(self.calibration, self.contamination)

    @property
    def left_out(self) -> Tensor:
        """Those that do not, since they may be of anomalies; drift is tested with them, too, ascending."""
        return self.calibration[len(self.kept) :]

    def _rank(self, images: int, remedy: str = conformal.HOLD_OUT) -> int:
        """Which of the largest calibration scores is the threshold; what helps where there are too few, for errors."""
        rank = conformal.nearest_rank if self.alpha == conformal.DEFAULT_ALPHA else conformal.threshold_rank
        return rank(images, self.alpha, remedy)

    def check_number(self, images: int, trainer: Trainer | None = None) -> None:
        """Refuse too few calibration images, or say once what they cost.

        Args:
            images: Their number, contaminated ones among them.
            trainer: Lightning's, whose data module knows how there can be more.

        Raises:
            ValueError: If the level takes more, and is not the default one.
        """
        images -= conformal.trimmed_number(images, self.contamination)
        if images >= conformal.images_needed(self.alpha):
            return
        remedy = how_to_have_more(trainer, images, self.alpha)
        self._rank(images, remedy)
        if images != self._warned_of:
            logger.warning("%s: %s.", conformal.few_images(images, self.alpha), remedy)
        self._warned_of = images

    def p_values(self, scores: Tensor) -> Tensor:
        """Conformal p-values of raw scores, on the CPU: :func:`anomalib_flowood.conformal.p_values`."""
        return conformal.p_values(self.kept.cpu(), scores.detach().cpu())

    def drift_p_value(self, scores: Tensor) -> float:
        """Whether raw scores, together, are in-distribution: :func:`anomalib_flowood.conformal.drift_p_value`."""
        return conformal.drift_p_value(self.calibration.cpu(), scores.detach().cpu())

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Turn raw scores into ``pred_score`` and ``pred_label``, and anomaly maps into their likes.

        Args:
            predictions: Raw ``pred_score``, ``(N,)``, and possibly ``anomaly_map``, ``(N, 1, H, W)``.

        Returns:
            The same shapes. Without a calibration there is nothing to decide by: scores stay raw, without labels, and
            maps without masks.

        Raises:
            ValueError: If a score is NaN. An exported model, which cannot raise, takes it for infinite.
        """
        raw, anomaly_map = predictions.pred_score, predictions.anomaly_map
        if not self.calibrated:
            return predictions
        assert raw is not None  # every detector scores images
        if not torch.compiler.is_compiling():
            refuse_nan(raw)
        threshold, unit = self.image_threshold, self._image_unit
        pred_score, pred_label = squash(raw, threshold, unit)
        if anomaly_map is None or not len(self.pixel_calibration):
            return InferenceBatch(pred_score=pred_score, pred_label=pred_label, anomaly_map=anomaly_map)
        pixel_range = self.pixel_max - self.pixel_min
        unit = torch.where(torch.isfinite(pixel_range) & (pixel_range > 0), pixel_range, unit)
        squashed, pred_mask = squash(anomaly_map, self.pixel_threshold, unit)
        return InferenceBatch(pred_score=pred_score, pred_label=pred_label, anomaly_map=squashed, pred_mask=pred_mask)

    def post_process_batch(self, batch: Any) -> None:
        """Do so for a batch, and keep its raw scores and p-values beside."""
        raw = batch.pred_score
        batch.raw_score = raw
        if self.calibrated:
            batch.p_value = self.p_values(raw)
            batch.update(**self(InferenceBatch(pred_score=raw, anomaly_map=batch.anomaly_map))._asdict())

    @property
    def _image_unit(self) -> Tensor:
        """Interquartile range of the calibration scores, ``()``; with a floor, since all of them may be alike."""
        n = len(self.kept)
        spread = self.kept[3 * n // 4] - self.kept[n // 4]
        return torch.maximum(spread, 1e-6 * self.image_threshold.abs()).clamp(min=1e-12)


def _collected(metric: CatMetric) -> Tensor:
    """What a metric was given in all processes, ``(n,)``: nothing is a list to it, and a single value a number."""
    values: Any = metric.compute() if metric.update_called else []
    return processes.gathered(torch.as_tensor(values, dtype=metric.dtype, device=metric.device).reshape(-1))
