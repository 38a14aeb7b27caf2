# SPDX-License-Identifier: Apache-2.0
"""Normalizing flow on feature maps of a frozen network."""

from .lightning_model import FeatureMapFlow
from .torch_model import FeatureMapFlowModel

__all__ = ["FeatureMapFlow", "FeatureMapFlowModel"]
