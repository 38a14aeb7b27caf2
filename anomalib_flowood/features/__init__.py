# SPDX-License-Identifier: Apache-2.0
"""Frozen timm backbones, where their weights come from, and what is made of their maps."""

from .backbones import PooledAndMaps, create_feature_maps, run_backbone
from .catalogue import LOCAL_DIR, backbone_config, check_backbone, default_layers, feature_layers, layer_indices
from .descriptors import Descriptors
from .embedding import Embedding
from .weights import BackboneUnavailableError, create_backbone, fetching_at_once, save_local

__all__ = [
    "LOCAL_DIR",
    "BackboneUnavailableError",
    "Descriptors",
    "Embedding",
    "PooledAndMaps",
    "backbone_config",
    "check_backbone",
    "create_backbone",
    "create_feature_maps",
    "default_layers",
    "feature_layers",
    "fetching_at_once",
    "layer_indices",
    "run_backbone",
    "save_local",
]
