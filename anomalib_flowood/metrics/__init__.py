# SPDX-License-Identifier: Apache-2.0
"""Detection metrics that rank the scores as they are, whatever their scale."""

from .detection import AUROC, FPR95, auroc, fpr_at_tpr

__all__ = ["AUROC", "FPR95", "auroc", "fpr_at_tpr"]
