# SPDX-License-Identifier: Apache-2.0
"""Normalizing flow on pixels."""

from .lightning_model import PixelFlow
from .torch_model import PixelFlowModel

__all__ = ["PixelFlow", "PixelFlowModel"]
