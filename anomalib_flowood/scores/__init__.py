# SPDX-License-Identifier: Apache-2.0
"""Anomaly scores on a fitted flow; pure PyTorch, scikit-learn and imagecodecs, importable without anomalib."""

from typing import TypeVar

from anomalib_flowood.names import Registry

from .complexity import Complexity, compressed_bits
from .density_of_states import DensityOfStates
from .evidence import Evidence
from .intrinsic_dimension import LocalIntrinsicDimension
from .likelihood import LatentNorm, NegativeLogLikelihood, Typicality
from .orientation import Orientation
from .score import FlowDensity, Score
from .several_flows import Ensemble, LikelihoodRatio, perturb

SCORES: Registry[type[Score]] = Registry("score")
"""Scores by the names that users type."""

_Class = TypeVar("_Class", bound=type[Score])


def register_score(score: _Class) -> _Class:
    """Make a score known by its ``name``.

    Args:
        score: A class; this is its decorator.

    Raises:
        ValueError: If another module has a score of the name.
    """
    SCORES.add(score.name, score, score)
    return score


# In the order in which tables list them.
for _score in (
    NegativeLogLikelihood,
    Typicality,
    Complexity,
    Orientation,
    LikelihoodRatio,
    LatentNorm,
    LocalIntrinsicDimension,
    DensityOfStates,
    Ensemble,
):
    register_score(_score)

__all__ = [
    "SCORES",
    "Complexity",
    "DensityOfStates",
    "Ensemble",
    "Evidence",
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
    "register_score",
]
