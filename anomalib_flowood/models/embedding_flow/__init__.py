# SPDX-License-Identifier: Apache-2.0
"""Normalizing flow on pooled features of a frozen network."""

from .lightning_model import EmbeddingFlow
from .torch_model import EmbeddingFlowModel

__all__ = ["EmbeddingFlow", "EmbeddingFlowModel"]
