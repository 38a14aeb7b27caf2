# SPDX-License-Identifier: Apache-2.0
"""anomalib's evaluator, with a line for every out-of-distribution set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from anomalib.metrics import AnomalibMetric, Evaluator
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from anomalib_flowood.trainers import name_results

from .detection import AUROC, FPR95, AUPRIn, AUPROut, BitsPerDim, BitsPerDimMedian, DetectionError, F1Score, SetMetric
from .functional import MEAN, NOT_DEFINED, OUTSIDE, groups_of

MOST_SETS = 8
"""The most out-of-distribution sets that are listed one by one: nine classes of a data set would swamp a table."""


class PerSetEvaluator(Evaluator):
    """Logs metrics over all test images and, with two or more out-of-distribution sets, for each set on its own.

    Over all images a metric has the name that anomalib gives it (``image_AUROC``); of one set it is ``AUROC/mnist``,
    against all in-distribution images; the unweighted average over the sets is ``AUROC/mean``, and over those of a
    group ``AUROC/near``. Of more than ``MOST_SETS`` sets only averages are logged. All of it comes from one test pass.

    Args:
        val_metrics: anomalib's validation metrics; logged over all images only.
        test_metrics: Metrics; those that are no :class:`SetMetric` are logged over all images only. By default all
            metrics of this package.
        compute_on_cpu: Keep what the metrics store in main memory, on one device.
    """

    def __init__(
        self,
        val_metrics: AnomalibMetric | Sequence[AnomalibMetric] | None = None,
        test_metrics: AnomalibMetric | Sequence[AnomalibMetric] | None = None,
        compute_on_cpu: bool = True,
    ) -> None:
        if test_metrics is None:
            test_metrics = [
                *(metric(prefix="image_") for metric in (AUROC, FPR95, AUPROut, AUPRIn, DetectionError)),
                F1Score(prefix="image_", strict=False),
                BitsPerDim(strict=False),
                BitsPerDimMedian(strict=False),
            ]
        super().__init__(val_metrics, test_metrics, compute_on_cpu)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move metrics as anomalib does; let the table at the end of a test name what is not defined."""
        asked = self.compute_on_cpu
        # With several devices anomalib moves nothing, and warns; but it counts only those of one machine.
        self.compute_on_cpu = asked and trainer.world_size == 1
        super().setup(trainer, pl_module, stage)
        self.compute_on_cpu = asked
        if stage == "test":
            name_results(trainer, _named_if_nan)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an interrupted test left behind."""
        del trainer, pl_module
        metrics: list[Any] = [*self.test_metrics]  # typed as mere modules
        for metric in metrics:
            metric.reset()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log the test metrics."""
        metrics: list[Any] = [*self.test_metrics]
        for metric in metrics:
            if not metric.strict and not metric.update_called:
                continue  # no batch had its fields, so there is no value
            if isinstance(metric, SetMetric):
                sets = metric.compute_sets()
                averages = {MEAN, OUTSIDE, *groups_of(sets)}
                if len(sets.keys() - averages) > MOST_SETS:
                    sets = {name: value for name, value in sets.items() if name in averages}
                for name, value in sets.items():
                    _log(trainer, pl_module, f"{metric.title}/{name}", value)
            _log(trainer, pl_module, metric.name, metric)


def _named_if_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Say what NaN means in the table that Lightning prints at the end of a test."""
    return {name: NOT_DEFINED if math.isnan(value) else value for name, value in values.items()}


def _log(trainer: Trainer, pl_module: LightningModule, name: str, value: Any) -> None:
    # The ranks hold the same values already; averaging them keeps Lightning from warning.
    pl_module.log(name, value, sync_dist=isinstance(value, Tensor))
    if trainer.barebones:  # which logs nothing; anomalib's evaluator does the same
        value = value if isinstance(value, Tensor) else value.compute()
        trainer.callback_metrics[name] = value
        trainer.logged_metrics[name] = value
