# SPDX-License-Identifier: Apache-2.0
"""Anomaly scores on a fitted flow; pure PyTorch, scikit-learn and imagecodecs, importable without anomalib."""

from .complexity import Complexity, compressed_bits
from .density_of_states import DensityOfStates
from .intrinsic_dimension import LocalIntrinsicDimension
from .likelihood import LatentNorm, NegativeLogLikelihood, Typicality
from .orientation import Orientation
from .score import Density, FlowDensity, Score
from .several_flows import Ensemble, LikelihoodRatio, perturb

SCORES: dict[str, type[Score]] = {
    "nll": NegativeLogLikelihood,
    "typicality": Typicality,
    "complexity": Complexity,
    "orientation": Orientation,
    "likelihood_ratio": LikelihoodRatio,
    "latent_norm": LatentNorm,
    "lid": LocalIntrinsicDimension,
    "density_of_states": DensityOfStates,
    "ensemble": Ensemble,
}
"""Scores by the name that users type."""

__all__ = [
    "SCORES",
    "Complexity",
    "Density",
    "DensityOfStates",
    "Ensemble",
    "FlowDensity",
    "LatentNorm",
    "LikelihoodRatio",
    "LocalIntrinsicDimension",
    "NegativeLogLikelihood",
    "Orientation",
    "Score",
    "Typicality",
    "compressed_bits",
    "perturb",
]
