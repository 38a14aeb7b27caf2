# SPDX-License-Identifier: Apache-2.0
"""Detection metrics that rank the scores as they are, whatever their scale, for all images and for every set."""

from .detection import AUROC, FPR95, AUPRIn, AUPROut, BitsPerDim, BitsPerDimMedian, DetectionError, SetMetric
from .evaluator import MOST_SETS, PerSetEvaluator
from .functional import (
    DETECTION_METRICS,
    MEAN,
    aupr_in,
    aupr_out,
    auroc,
    detection_error,
    fpr_at_tpr,
    per_set,
)

__all__ = [
    "AUROC",
    "DETECTION_METRICS",
    "FPR95",
    "MEAN",
    "MOST_SETS",
    "AUPRIn",
    "AUPROut",
    "BitsPerDim",
    "BitsPerDimMedian",
    "DetectionError",
    "PerSetEvaluator",
    "SetMetric",
    "aupr_in",
    "aupr_out",
    "auroc",
    "detection_error",
    "fpr_at_tpr",
    "per_set",
]
