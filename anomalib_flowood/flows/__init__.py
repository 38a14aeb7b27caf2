# SPDX-License-Identifier: Apache-2.0
"""Masks, couplings, subnets and architectures in pure PyTorch and FrEIA; importable without anomalib."""

from .architectures import ARCHITECTURES, map_flow, pixel_flow, vector_flow
from .couplings import AffineCoupling, ChannelCoupling, MaskedCoupling, QuadrantCoupling, native_form, quadrant_size
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
    standard_normal_log_prob,
)
from .precision import full_precision
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

__all__ = [
    "ARCHITECTURES",
    "LEVELS",
    "LOGIT_ALPHA",
    "MASKS",
    "NOISE_DRAWS",
    "SUBNETS",
    "ActNorm",
    "AffineCoupling",
    "Bottleneck",
    "ChannelCoupling",
    "ConvBottleneck",
    "CouplingMask",
    "FactorOut",
    "Highway",
    "InvertibleConv1x1",
    "Logit",
    "MaskedCoupling",
    "Mlp",
    "QuadrantCoupling",
    "ResNet",
    "Squeeze",
    "Unsqueeze",
    "WeightNormConv2d",
    "bits_per_dim",
    "coupling_mask",
    "dequantization_noise",
    "dequantize",
    "full_precision",
    "halves",
    "map_flow",
    "native_form",
    "pixel_flow",
    "quadrant_size",
    "quadrants",
    "register_mask",
    "register_subnet",
    "standard_normal_log_prob",
    "start_at_zero",
    "subnet_constructor",
    "vector_flow",
]
