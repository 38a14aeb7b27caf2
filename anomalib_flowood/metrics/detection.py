# SPDX-License-Identifier: Apache-2.0
"""AUROC and FPR95 of raw scores.

torchmetrics passes scores outside [0, 1] through a sigmoid, batch by batch. A negative log-likelihood in the thousands
becomes 1.0 there, every image ties with every other, and the AUROC reads 0.5. It also forms the rates in float32. Both
metrics here rank the raw scores and leave the rest to scikit-learn, in float64.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from anomalib.metrics import AnomalibMetric
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def _check(scores: Tensor, labels: Tensor) -> None:
    """Refuse what would give a number that means nothing."""
    if scores.shape != labels.shape:
        msg = f"Scores and labels must have the same shape, got {tuple(scores.shape)} and {tuple(labels.shape)}."
        raise ValueError(msg)
    nans = int(torch.isnan(scores).sum())
    if nans:
        msg = f"{nans} of {scores.numel()} scores are NaN: they cannot be ranked. Has the training diverged?"
        raise ValueError(msg)
    if not bool(((labels == 0) | (labels == 1)).all()):
        msg = "Labels must be 0 (in-distribution) or 1 (out-of-distribution)."
        raise ValueError(msg)


def _ranked(scores: Tensor, labels: Tensor, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return labels and dense ranks, or nothing (with a warning) if one of the two classes is absent.

    scikit-learn refuses infinite scores, and only their order counts.
    """
    _check(scores, labels)
    ranks = torch.unique(scores.detach().flatten().cpu(), return_inverse=True)[1].numpy()
    truth = labels.detach().flatten().cpu().long().numpy()
    if len(np.unique(truth)) == 2:
        return truth, ranks
    missing = "in-distribution (label 0)" if truth.any() else "out-of-distribution (label 1)"
    warnings.warn(f"{name} is NaN: there are no {missing} samples to tell apart.", UserWarning, stacklevel=3)
    return None


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve; higher scores mean out-of-distribution, ties count one half.

    Args:
        scores: Scores of any scale and any floating dtype, infinities included.
        labels: 1 for out-of-distribution, 0 for in-distribution, same shape as ``scores``.

    Returns:
        The area, or NaN (with a warning) if one of the two classes is absent.

    Raises:
        ValueError: If a score is NaN, a label is neither 0 nor 1, or the shapes differ.
    """
    ranked = _ranked(scores, labels, "AUROC")
    return float("nan") if ranked is None else float(roc_auc_score(*ranked))


def fpr_at_tpr(scores: Tensor, labels: Tensor, tpr: float = 0.95) -> float:
    """Share of in-distribution images flagged by a threshold that catches ``tpr`` of the out-of-distribution ones.

    Out-of-distribution counts as positive, as in OpenOOD and pytorch-ood; some papers use the other direction.

    Args:
        scores: Scores of any scale and any floating dtype, infinities included.
        labels: 1 for out-of-distribution, 0 for in-distribution, same shape as ``scores``.
        tpr: The smallest admissible true positive rate.

    Returns:
        The smallest false positive rate, or NaN (with a warning) if one of the two classes is absent.

    Raises:
        ValueError: If a score is NaN, a label is neither 0 nor 1, or the shapes differ.
    """
    ranked = _ranked(scores, labels, f"FPR{round(100 * tpr)}")
    if ranked is None:
        return float("nan")
    fpr, reached, _ = roc_curve(*ranked, drop_intermediate=False)
    return float(fpr[reached >= tpr][0])


class _RawScores(Metric):
    """Keeps scores and labels as they come, until a subclass ranks them all at once."""

    is_differentiable = False
    full_state_update = False
    preds: list[Tensor]
    target: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("preds", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Store one batch.

        Args:
            preds: Raw scores.
            target: Labels, 0 or 1 (or booleans).

        Raises:
            ValueError: If a score is NaN, a label is neither 0 nor 1, or the shapes differ.
        """
        _check(preds, target)
        self.preds.append(preds.detach().flatten())
        self.target.append(target.detach().flatten().long())

    def _gathered(self) -> tuple[Tensor, Tensor]:
        if len(self.preds) == 0:
            return torch.zeros(0), torch.zeros(0, dtype=torch.long)
        return dim_zero_cat(self.preds), dim_zero_cat(self.target)


class _RawAUROC(_RawScores):
    higher_is_better = True

    def compute(self) -> Tensor:
        return torch.tensor(auroc(*self._gathered()), dtype=torch.float64)


class _RawFPR95(_RawScores):
    higher_is_better = False

    def compute(self) -> Tensor:
        return torch.tensor(fpr_at_tpr(*self._gathered(), tpr=0.95), dtype=torch.float64)


class AUROC(AnomalibMetric, _RawAUROC):  # type: ignore[misc]
    """Area under the ROC curve of an image's raw score.

    Agrees with ``sklearn.metrics.roc_auc_score`` for scores of any scale. With one class only the result is NaN, with a
    warning; NaN scores raise a ``ValueError`` when they arrive.

    Example:
        >>> import torch
        >>> from anomalib.data import ImageBatch
        >>> metric = AUROC(prefix="image_")
        >>> batch = ImageBatch(
        ...     image=torch.rand(4, 3, 8, 8),
        ...     pred_score=torch.tensor([1000.0, 1001.0, 1002.0, 1003.0]),
        ...     gt_label=torch.tensor([0, 0, 1, 1]),
        ... )
        >>> metric.update(batch)
        >>> metric.name, metric.compute().item()
        ('image_AUROC', 1.0)
    """

    default_fields = ("pred_score", "gt_label")


class FPR95(AnomalibMetric, _RawFPR95):  # type: ignore[misc]
    """False positive rate at 95 % true positives of an image's raw score; out-of-distribution is positive.

    With one class only the result is NaN, with a warning; NaN scores raise a ``ValueError`` when they arrive.

    Example:
        >>> FPR95(prefix="image_").name
        'image_FPR95'
    """

    default_fields = ("pred_score", "gt_label")
