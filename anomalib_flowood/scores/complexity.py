# SPDX-License-Identifier: Apache-2.0
"""How complex an image is to a lossless compressor, and a likelihood that takes it into account."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import imagecodecs
import numpy as np
import torch
from torch import Tensor

from anomalib_flowood.flows import LEVELS, bits_per_dim

from .score import FlowDensity, Inputs, Score

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
    return (inputs[0] * LEVELS).floor().clamp(0, LEVELS - 1).byte()


def compressed_bits_per_dim(density: FlowDensity, inputs: Inputs) -> Tensor:
    """:func:`compressed_bits` of dequantised images, per dimension, ``(N,)``, in the precision of the images."""
    return compressed_bits(pixels_of(inputs)).to(inputs[0]) / density.dims


class Complexity(Score):
    """−log2 p minus the bits of the better of two lossless compressors, per dimension.

    What is simple to a compressor is likely to a flow of pixels, whatever it shows; the difference is the log of a
    likelihood ratio against the compressor, taken for a density. Source: Serrà, Álvarez, Gómez, Slizovskaia, Núñez and
    Luque 2020 (arXiv 1909.11480), equation 3 and section 3.3 (several compressors: the shortest counts).
    """

    name = "complexity"
    pixels_only = True

    @classmethod
    def exportable(cls, density: FlowDensity) -> bool:
        """No: a compressor is no graph of tensors."""
        del density
        return False

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Bits per dimension under the flow, and by the compressor; ``(N, 2)``."""
        bits = bits_per_dim(density.density(inputs).log_prob, density.dims)
        return torch.stack([bits, compressed_bits_per_dim(density, inputs)], dim=1)

    def combine(self, statistics: Tensor) -> Tensor:
        """The difference, bits per dimension, ``(N,)``."""
        return statistics[:, 0] - statistics[:, 1]
