# SPDX-License-Identifier: Apache-2.0
"""The detectors, and their registration with anomalib.

``get_model`` finds classes by dotted path in allowed modules only, and by bare name in ``anomalib.models``.
"""

from anomalib import models as anomalib_models

from .embedding_flow import EmbeddingFlow
from .feature_map_flow import FeatureMapFlow
from .pixel_flow import PixelFlow

__all__ = ["EmbeddingFlow", "FeatureMapFlow", "PixelFlow"]

anomalib_models.ALLOWED_MODULES.update({"anomalib_flowood", "anomalib_flowood.models"})
for _name in __all__:
    setattr(anomalib_models, _name, globals()[_name])
