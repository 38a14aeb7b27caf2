# SPDX-License-Identifier: Apache-2.0
"""Whether a flow of pixels knows which way up an image is, and a score that asks it."""

from __future__ import annotations

import torch
from torch import Tensor

from anomalib_flowood import flows

from .complexity import TOO_COMPLEX, compressed_bits_per_dim, robust_bits_per_dim
from .score import FlowDensity, Inputs
from .tails import SmallestPValue

_BASE = flows.StudentT(10.0)
"""The base distribution under which images are compared with their copies."""

_CERTAIN = 100.0
"""Bits per dimension: an image that is likelier than its copies by as much is certainly the right way up."""


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


def ways_up(density: FlowDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compare dequantised images with their turned and mirrored copies.

    Args:
        density: A density of pixels.
        x: Dequantised images, ``(N, C, H, W)``.

    Returns:
        The images' :func:`robust_bits_per_dim`, and by how much these exceed those of the likeliest transformed copy:
        negative for images the right way up. Both ``(N,)``, NaN where the flow overflowed.
    """
    copies = symmetries(x)
    bits = robust_bits_per_dim(density, copies.flatten(0, 1), _BASE).reshape(copies.shape[:2])
    itself = torch.where(bits[0].isfinite(), bits[0], torch.nan)
    return itself, (itself - bits[1:].amin(0)).clamp(min=-_CERTAIN)


class Orientation(SmallestPValue):
    """The worst of three tests: too unlikely for its complexity, no likelier than turned or mirrored, or too complex.

    What a flow knows of local structure, which makes simple images likely, holds for an image whichever way up it is,
    and cancels in the difference between the image and its likeliest transformed copy. What remains is what the flow
    knows of the whole: clothes are much likelier the right way up, to a digit the flow is indifferent. That geometric
    transformations tell what belongs is the idea of Golan and El-Yaniv 2018 (arXiv 1805.10917), who train a classifier
    of them; no training is needed here. The other tests are those of :class:`Complexity` (Serrà et al. 2020), under a
    base distribution that is more robust still. The smallest p-value counts: :class:`~.tails.SmallestPValue`.

    It suits images that have a right way up. Where the same thing may lie any way up, as seen from above, training
    images are as likely turned as not, and the second test finds nothing.
    """

    name = "orientation"
    pixels_only = True
    in_graphs = False  # which compress nothing
    weights = (1.0, 1.0, TOO_COMPLEX)

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Bits per dimension beyond a compressor's, beyond the likeliest way up, and by the compressor; ``(N, 3)``."""
        bits, wrong_way = ways_up(density, inputs[0])
        compressed = compressed_bits_per_dim(density, inputs)
        return torch.stack([bits - compressed, wrong_way, compressed], dim=1)
