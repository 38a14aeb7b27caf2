# SPDX-License-Identifier: Apache-2.0
"""Masks, couplings, subnets and architectures in pure PyTorch and FrEIA; importable without anomalib."""

from .architectures import map_flow, pixel_flow, vector_flow
from .couplings import AffineCoupling, ChannelCoupling, MaskedCoupling, QuadrantCoupling, quadrant_size
from .masks import MASKS, CouplingMask, coupling_mask, quadrants
from .pixels import LEVELS, Logit, bits_per_dim, dequantize, standard_normal_log_prob
from .subnets import SUBNETS, Bottleneck, Mlp, ResNet, subnet_constructor

__all__ = [
    "LEVELS",
    "MASKS",
    "SUBNETS",
    "AffineCoupling",
    "Bottleneck",
    "ChannelCoupling",
    "CouplingMask",
    "Logit",
    "MaskedCoupling",
    "Mlp",
    "QuadrantCoupling",
    "ResNet",
    "bits_per_dim",
    "coupling_mask",
    "dequantize",
    "map_flow",
    "pixel_flow",
    "quadrant_size",
    "quadrants",
    "standard_normal_log_prob",
    "subnet_constructor",
    "vector_flow",
]
