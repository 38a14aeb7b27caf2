# SPDX-License-Identifier: Apache-2.0
"""Parts that the detectors share."""

from .checkpoint_files import CheckpointError, read_checkpoint
from .checkpoints import SettingsError, open_checkpoint
from .export import root_beside
from .export_check import ExportCheckError
from .flow_model import FlowModel, check_images
from .flow_module import FlowModule, known_flows
from .frozen_features import FrozenFeatures
from .kept_epoch import KeptEpoch
from .post_processor import ConformalPostProcessor
from .pre_processor import ExactPreProcessor, backbone_pre_processor
from .stored_features import FeatureBatch
from .training import TrainingDivergedError

__all__ = [
    "CheckpointError",
    "ConformalPostProcessor",
    "ExactPreProcessor",
    "ExportCheckError",
    "FeatureBatch",
    "FlowModel",
    "FlowModule",
    "FrozenFeatures",
    "KeptEpoch",
    "SettingsError",
    "TrainingDivergedError",
    "backbone_pre_processor",
    "check_images",
    "known_flows",
    "open_checkpoint",
    "read_checkpoint",
    "root_beside",
]
