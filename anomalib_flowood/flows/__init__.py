# SPDX-License-Identifier: Apache-2.0
"""Building blocks of densities: PyTorch and FrEIA, with scikit-learn for what is fitted; nothing of anomalib."""

from .architectures import ARCHITECTURES, map_flow, pixel_flow, vector_flow
from .bases import Base, GaussianMixture, StandardNormal, StudentT
from .couplings import (
    SCALES,
    AffineCoupling,
    ChannelCoupling,
    MaskedCoupling,
    QuadrantCoupling,
    native_form,
    quadrant_size,
)
from .density import Density, SideBySide, couple, density, independent
from .kinds import ForEachKind
from .layers import ActNorm, FactorOut, InvertibleConv1x1, Squeeze, Unsqueeze
from .masks import MASKS, CouplingMask, coupling_mask, halves, quadrants, register_mask
from .pixels import (
    LEVELS,
    LOGIT_ALPHA,
    NOISE_DRAWS,
    Logit,
    bits_per_dim,
    dequantization_noise,
    dequantize,
)
from .position_couplings import PositionCoupling, QuadrantContextCoupling, encode_places
from .positions import CONTEXTS, PositionFlow, draw_positions, position_flow
from .precision import full_precision, with_doubles
from .rows import Computed, Moments, Rows, draw, in_turn, take
from .shrunk import ShrunkGaussian
from .subnets import (
    SUBNETS,
    Bottleneck,
    ConvBottleneck,
    Highway,
    Mlp,
    ResNet,
    WeightNormConv2d,
    register_subnet,
    start_at_zero,
    subnet_constructor,
)
from .subspace import PrincipalSubspace
from .whitening import PositionMoments, PositionWhitening, Whitening

__all__ = [
    "ARCHITECTURES",
    "CONTEXTS",
    "LEVELS",
    "LOGIT_ALPHA",
    "MASKS",
    "NOISE_DRAWS",
    "SCALES",
    "SUBNETS",
    "ActNorm",
    "AffineCoupling",
    "Base",
    "Bottleneck",
    "ChannelCoupling",
    "Computed",
    "ConvBottleneck",
    "CouplingMask",
    "Density",
    "FactorOut",
    "ForEachKind",
    "GaussianMixture",
    "Highway",
    "InvertibleConv1x1",
    "Logit",
    "MaskedCoupling",
    "Mlp",
    "Moments",
    "PositionCoupling",
    "PositionFlow",
    "PositionMoments",
    "PositionWhitening",
    "PrincipalSubspace",
    "QuadrantContextCoupling",
    "QuadrantCoupling",
    "ResNet",
    "Rows",
    "ShrunkGaussian",
    "SideBySide",
    "Squeeze",
    "StandardNormal",
    "StudentT",
    "Unsqueeze",
    "WeightNormConv2d",
    "Whitening",
    "bits_per_dim",
    "couple",
    "coupling_mask",
    "density",
    "dequantization_noise",
    "dequantize",
    "draw",
    "draw_positions",
    "encode_places",
    "full_precision",
    "halves",
    "in_turn",
    "independent",
    "map_flow",
    "native_form",
    "pixel_flow",
    "position_flow",
    "quadrant_size",
    "quadrants",
    "register_mask",
    "register_subnet",
    "start_at_zero",
    "subnet_constructor",
    "take",
    "vector_flow",
    "with_doubles",
]
