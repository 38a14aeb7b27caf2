# SPDX-License-Identifier: Apache-2.0
"""Decisions without anomalous validation data."""

from __future__ import annotations

from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics.base import AnomalibMetric
from anomalib.metrics.min_max import MinMax
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class _NormalQuantile(Metric):
    """Quantile of the scores of normal images; anomalous ones are left out."""

    full_state_update = False
    scores: list[Tensor]

    def __init__(self, quantile: float) -> None:
        super().__init__()
        self.quantile = quantile
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Keep the scores ``(N,)`` whose label ``(N,)`` is 0."""
        normal = scores[~labels.bool()]
        if not bool(torch.isfinite(normal).all()):
            msg = (
                "A normal validation image has a NaN or infinite score, so no threshold can be set. "
                "Lower the learning rate, or look for broken validation images."
            )
            raise ValueError(msg)
        self.scores.append(normal.detach().flatten().double())

    def compute(self) -> Tensor:
        """Return the quantile; NaN if no normal image was seen."""
        scores = dim_zero_cat(self.scores) if self.scores else torch.empty(0, dtype=torch.float64)
        if scores.numel() == 0:
            return torch.tensor(float("nan"))
        # 'higher': at most the wanted share of the calibration images lies above the threshold.
        return torch.quantile(scores, self.quantile, interpolation="higher").float()


class NormalQuantile(AnomalibMetric, _NormalQuantile):  # type: ignore[misc]
    """:class:`_NormalQuantile` that reads its values from a batch."""


class QuantilePostProcessor(PostProcessor):
    """Sets the threshold at a quantile of the normal validation scores.

    anomalib's own post-processor maximises F1, for which it needs anomalous validation images; out-of-distribution
    detection has none. It also clamps scores to [0, 1], which turns all scores beyond the validation range into ties
    and changes AUROC. This one maps scores by ``0.5 * (1 + r / (1 + |r|))``, ``r`` the distance from the threshold in
    units of the validation range: strictly increasing, within [0, 1], 0.5 at the threshold.

    Args:
        false_alarm_rate: Share of the normal validation images that may lie above the threshold, in (0, 1).
        **kwargs: Arguments of :class:`anomalib.post_processing.PostProcessor`.

    Raises:
        ValueError: If the rate is not in (0, 1).
    """

    def __init__(self, false_alarm_rate: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < false_alarm_rate < 1:
            msg = f"false_alarm_rate must lie between 0 and 1, got {false_alarm_rate}."
            raise ValueError(msg)
        self.false_alarm_rate = false_alarm_rate
        self._image_threshold_metric = NormalQuantile(  # type: ignore[assignment]
            quantile=1 - false_alarm_rate, fields=["pred_score", "gt_label"], strict=False
        )
        self._image_min_max_metric = MinMax(fields=["pred_score"], strict=False)

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_alarm_rate")

    @property
    def calibrated(self) -> bool:
        """Whether normal validation images have set a threshold."""
        return not bool(torch.isnan(self.image_threshold))

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Collect scores; those of the sanity check come from an untrained model and are left out.

        Maps get no threshold of their own: a pixel is anomalous where its value would make an image anomalous.
        """
        del pl_module, args, kwargs
        if trainer.sanity_checking:
            return
        if self.enable_thresholding:
            self._image_threshold_metric.update(outputs)
        if self.enable_normalization:
            self._image_min_max_metric.update(outputs)
            self._pixel_min_max_metric.update(outputs)

    def threshold_batch(self, batch: Batch) -> None:
        """Label a batch; without a threshold (no validation ran) there is nothing to label by."""
        if self.calibrated:
            super().threshold_batch(batch)

    @staticmethod
    def _normalize(
        preds: Tensor | None,
        norm_min: Tensor,
        norm_max: Tensor,
        threshold: Tensor,
    ) -> Tensor | None:
        """Map scores to [0, 1], strictly increasing; see the class."""
        if preds is None:
            return None
        # A floor on the unit, since a handful of validation images may have (nearly) one score.
        unit = torch.maximum(norm_max - norm_min, 0.01 * threshold.abs()).clamp(min=1e-6)
        # Finite even for an infinite score: inf / inf would be NaN.
        distance = ((preds - threshold) / unit).clamp(-1e30, 1e30)
        normalized = 0.5 * (1 + distance / (1 + distance.abs()))
        return torch.where(torch.isnan(distance), preds, normalized)
