# SPDX-License-Identifier: Apache-2.0
"""Parts that the detectors share."""

from .features import FeatureBatch, FrozenFeatures
from .flow_module import FlowModule, TrainingDivergedError
from .images import check_images, finite_scores
from .post_processor import QuantilePostProcessor

__all__ = [
    "FeatureBatch",
    "FlowModule",
    "FrozenFeatures",
    "QuantilePostProcessor",
    "TrainingDivergedError",
    "check_images",
    "finite_scores",
]
