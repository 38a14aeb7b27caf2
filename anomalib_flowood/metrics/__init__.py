# SPDX-License-Identifier: Apache-2.0
"""Detection metrics that rank the scores as they are, whatever their scale, for all images and for every set."""

from .detection import (
    AUPRO,
    AUROC,
    FPR95,
    AUPRIn,
    AUPROut,
    BitsPerDim,
    BitsPerDimMedian,
    DetectionError,
    F1Score,
    SetMetric,
)
from .evaluator import MOST_SETS, PerSetEvaluator
from .functional import (
    DETECTION_METRICS,
    GROUP,
    MEAN,
    NOT_DEFINED,
    aupr_in,
    aupr_out,
    auroc,
    detection_error,
    fpr_at_tpr,
    groups_of,
    per_set,
    rate_text,
)

__all__ = [
    "AUPRO",
    "AUROC",
    "DETECTION_METRICS",
    "FPR95",
    "GROUP",
    "MEAN",
    "MOST_SETS",
    "NOT_DEFINED",
    "AUPRIn",
    "AUPROut",
    "BitsPerDim",
    "BitsPerDimMedian",
    "DetectionError",
    "F1Score",
    "PerSetEvaluator",
    "SetMetric",
    "aupr_in",
    "aupr_out",
    "auroc",
    "detection_error",
    "fpr_at_tpr",
    "groups_of",
    "per_set",
    "rate_text",
]
