# SPDX-License-Identifier: Apache-2.0
"""The detectors, and their registration: one that is imported here and named in ``__all__`` is known everywhere.

``anomalib_flowood`` offers it by name. anomalib's ``list_models`` and ``get_model`` find it as a direct subclass of
``AnomalibModule``, by class path in modules that are allowed, and by the bare name of its class in ``anomalib.models``;
commands, checkpoints, benchmarks and ``explain`` by the same.
"""

from anomalib import models as anomalib_models

from .embedding_flow import EmbeddingFlow
from .feature_map_flow import FeatureMapFlow
from .pixel_flow import PixelFlow

__all__ = ["EmbeddingFlow", "FeatureMapFlow", "PixelFlow"]

DEFAULT_DETECTOR = FeatureMapFlow.__name__
"""Where none is named: the first in the mean over folders of photographs, with a model for each, for few images of
each, and for all of them (its README). It shows where defects are, too."""

DEFAULT_OF_WHOLE_IMAGES = EmbeddingFlow.__name__
"""Where none is named, and what does not belong is a whole image: of another data set, or among scikit-learn's rows."""

anomalib_models.ALLOWED_MODULES.update({"anomalib_flowood", "anomalib_flowood.models"})
for _name in __all__:
    setattr(anomalib_models, _name, globals()[_name])
