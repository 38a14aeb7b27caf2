# SPDX-License-Identifier: Apache-2.0
"""How complex an image is to a lossless compressor, and a likelihood test that takes it into account."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import imagecodecs
import numpy as np
import torch
from torch import Tensor

from anomalib_flowood import flows

from .score import FlowDensity, Inputs
from .tails import SmallestPValue

_BASE = flows.StudentT(100.0)
"""Base distribution under which :class:`Complexity` takes the flow's bits. With fewer degrees of freedom outlying
latents weigh less, including those of noise and of images that do not belong."""

TOO_COMPLEX = 0.1
"""Weight of the test for images that take a compressor more bits than any training image."""

_COMPRESSORS: dict[str, Callable[[np.ndarray], bytes | bytearray]] = {
    "PNG": partial(imagecodecs.png_encode, level=9),
    "JPEG-XL": partial(imagecodecs.jpegxl_encode, lossless=True, numthreads=1),
}


def compressed_bits(images: Tensor) -> Tensor:
    """Length of the shortest file that a lossless compressor makes of each image.

    Compressors are PNG at its highest level and lossless JPEG-XL, from imagecodecs. Images are compressed in as many
    threads as there are cores.

    Args:
        images: 8-bit images, ``(N, C, H, W)`` with 1 or 3 channels, uint8.

    Returns:
        Bits, headers included, ``(N,)``, float32.
    """
    arrays = np.array(images.movedim(1, -1).cpu().numpy(), order="C")  # the compressors take no other strides
    if arrays.shape[-1] == 1:
        arrays = arrays[..., 0]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lengths = list(pool.map(_shortest, arrays))
    return torch.tensor(lengths, dtype=torch.float32, device=images.device) * 8


def _shortest(image: np.ndarray) -> int:
    return min(len(compress(image)) for compress in _COMPRESSORS.values())


def pixels_of(inputs: Inputs) -> Tensor:
    """Return the 8-bit images, ``(N, C, H, W)``, uint8, that were dequantised."""
    return (inputs[0] * flows.LEVELS).floor().clamp(0, flows.LEVELS - 1).byte()


def compressed_bits_per_dim(density: FlowDensity, inputs: Inputs) -> Tensor:
    """:func:`compressed_bits` of dequantised images, per dimension, ``(N,)``, in the precision of the images."""
    return compressed_bits(pixels_of(inputs)).to(inputs[0]) / density.dims


def robust_bits_per_dim(density: FlowDensity, x: Tensor, base: flows.StudentT) -> Tensor:
    """Bits per dimension of dequantised images with Student's t distribution as the base of the flow.

    Under a Gaussian base a few outlying latents, which some image of every test set has, outweigh all others. The flow
    stays as it was trained.

    Args:
        density: A density of pixels.
        x: Dequantised images, ``(N, C, H, W)``.
        base: The distribution.

    Returns:
        ``(N,)``; infinite where the flow overflowed.
    """
    bits = flows.bits_per_dim(flows.density(density.flow, base, x).log_prob, density.dims)
    return torch.where(bits.isnan(), torch.inf, bits)


class Complexity(SmallestPValue):
    """Too unlikely for its complexity, or more complex than any training image.

    What is simple to a compressor is likely under a flow on pixels, whatever it shows. So the first test takes −log2 p
    minus the bits of the better of two lossless compressors: the log of a likelihood ratio against the compressor,
    taken for a density. Source: Serrà, Álvarez, Gómez, Slizovskaia, Núñez and Luque 2020 (arXiv 1909.11480),
    equation 3 and section 3.3 (several compressors: the shortest counts). The flow's bits are those under a robust base
    (:func:`robust_bits_per_dim`), so that a single pixel that surprises a confident flow does not add hundreds.

    Where a compressor fails, the difference says nothing: it takes 8 bits and more for noise, and a flow that takes two
    bits more than the compressor for normal images may do so for noise. So the second test takes the compressor's bits
    alone, with a tenth of the weight. The smaller p-value counts: :class:`~.tails.SmallestPValue`.
    """

    name = "complexity"
    pixels_only = True
    in_graphs = False  # which compress nothing
    weights = (1.0, TOO_COMPLEX)

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Bits per dimension beyond a compressor's, and the compressor's; ``(N, 2)``."""
        compressed = compressed_bits_per_dim(density, inputs)
        return torch.stack([robust_bits_per_dim(density, inputs[0], _BASE) - compressed, compressed], dim=1)
