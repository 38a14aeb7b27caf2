# SPDX-License-Identifier: Apache-2.0
"""Whether a flow of pixels knows which way up an image is, and a score that asks it."""

from __future__ import annotations

import torch
from torch import Tensor

from anomalib_flowood import flows

from .complexity import compressed_bits_per_dim
from .score import FlowDensity, Inputs, Score

_BASE = flows.StudentT(10.0)
"""The base distribution under which images are compared."""

_TAIL = 0.05
"""Share of the training images from which a test's tail is estimated."""

_CERTAIN = 100.0
"""Bits per dimension: an image that is so much likelier than its transformed copies is certainly the right way up."""


def symmetries(x: Tensor) -> Tensor:
    """Turn and mirror images in all ways that keep their height and width.

    Args:
        x: Images, ``(N, C, H, W)``.

    Returns:
        ``(G, N, C, H, W)``, the images themselves first. G is 8 for squares (their dihedral group), else 4: as they
        are, turned by 180 degrees, and both mirrored.
    """
    turns = range(4) if x.shape[2] == x.shape[3] else (0, 2)
    return torch.stack([image.rot90(turn, (2, 3)) for image in (x, x.flip(3)) for turn in turns])


def robust_bits_per_dim(density: FlowDensity, x: Tensor) -> Tensor:
    """Bits per dimension of dequantised images with Student's t distribution as the base of the flow.

    Under a Gaussian one, a few latents far out, as some image of every test set has, outweigh all others. The flow is
    kept as it was trained.

    Args:
        density: A density of pixels.
        x: Dequantised images, ``(N, C, H, W)``.

    Returns:
        ``(N,)``; infinite where the flow overflowed.
    """
    bits = flows.bits_per_dim(flows.density(density.flow, _BASE, x).log_prob, density.dims)
    return torch.where(bits.isnan(), torch.inf, bits)


def ways_up(density: FlowDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compare dequantised images with what they are turned and mirrored.

    Args:
        density: A density of pixels.
        x: Dequantised images, ``(N, C, H, W)``.

    Returns:
        The images' :func:`robust_bits_per_dim`, and how many more these are than those of the likeliest transformed
        copy: negative for what is the right way up. Both ``(N,)``, NaN where the flow overflowed.
    """
    copies = symmetries(x)
    bits = robust_bits_per_dim(density, copies.flatten(0, 1)).reshape(copies.shape[:2])
    itself = torch.where(bits[0].isfinite(), bits[0], torch.nan)
    return itself, (itself - bits[1:].amin(0)).clamp(min=-_CERTAIN)


class Orientation(Score):
    """The worse of two tests: too unlikely for its complexity, or no likelier than the image turned or mirrored.

    What a flow knows of local structure, which makes simple images likely, holds for an image whichever way up it is,
    and cancels in the difference between the image and its likeliest transformed copy. What remains is what the flow
    knows of the whole: clothes are much likelier the right way up, to a digit the flow is indifferent. That geometric
    transformations tell what belongs is the idea of Golan and El-Yaniv 2018 (arXiv 1805.10917), who train a classifier
    of them; no training is needed here. The other test is :class:`Complexity`'s (Serrà et al. 2020), under a robust
    base distribution (:func:`robust_bits_per_dim`).

    The smaller p-value of the two counts (Tippett 1931): the score is its −log, nats, with the tail beyond the 95 %
    quantile of the training images taken to be exponential. Below, the same straight line serves for the order.

    It suits images that have a right way up. Where the same thing may lie any way up, as seen from above, training
    images are as likely turned as not, and the second test finds nothing.
    """

    name = "orientation"
    pixels_only = True
    fit_images = 10_000

    threshold: Tensor
    scale: Tensor

    def __init__(self, density: FlowDensity) -> None:
        super().__init__(density)
        self.register_buffer("threshold", torch.zeros(2))
        self.register_buffer("scale", torch.ones(2))

    @classmethod
    def exportable(cls, density: FlowDensity) -> bool:
        """No: a compressor is no graph of tensors."""
        del density
        return False

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Bits per dimension beyond a compressor's, and beyond those of the likeliest way up; ``(N, 2)``."""
        bits, wrong_way = ways_up(density, inputs[0])
        return torch.stack([bits - compressed_bits_per_dim(density, inputs), wrong_way], dim=1)

    def fit_statistics(self, statistics: Tensor) -> None:
        """Learn where each tail begins, and its mean excess."""
        threshold = statistics.quantile(1 - _TAIL, dim=0)
        excess = (statistics - threshold).clamp(min=0)
        scale = excess.sum(0) / (excess > 0).sum(0).clamp(min=1)
        self.threshold.copy_(threshold)
        self.scale.copy_(torch.maximum(scale, 1e-6 * threshold.abs()).clamp(min=1e-12))

    def combine(self, statistics: Tensor) -> Tensor:
        """−log of the smaller p-value, nats, ``(N,)``."""
        tails = (statistics - self.threshold) / self.scale
        return tails.amax(1) - torch.log(torch.tensor(_TAIL, dtype=tails.dtype, device=tails.device))
