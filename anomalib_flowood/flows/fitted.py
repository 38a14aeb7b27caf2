# SPDX-License-Identifier: Apache-2.0
"""Principal directions of points and of covariances."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .precision import full_precision

_LEAST = 1e-10
"""Variance, as a share of the largest, below which a direction counts as constant."""

_ROUNDING = 8
"""Bound on the error of the eigenvalues of a matrix product, relative to the largest one, in units of machine epsilon;
1 to 2 were measured for points of low rank in single precision."""


@full_precision
def principal_directions(centred: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Find the principal directions of points whose mean is 0, exactly, from the smaller of ``X^T X`` and ``X X^T``.

    Args:
        centred: ``(n, D)``, on the CPU.
        most: Most directions to return; by default all in which the points vary.

    Returns:
        Variances over n, ``(r,)``, the largest first, and directions, ``(r, D)``.
    """
    n, dims = centred.shape
    if n > dims:
        return directions_of(centred.T @ centred / n, most)
    variances, vectors = directions_of(centred @ centred.T / n, most)
    return variances, (vectors @ centred) / (n * variances).sqrt()[:, None]


def directions_of(square: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Find the eigenvectors of a covariance.

    Args:
        square: ``(D, D)``, symmetric, on the CPU.
        most: Most eigenvectors to return; by default all whose eigenvalues are not 0.

    Returns:
        Eigenvalues, ``(r,)``, the largest first, and eigenvectors in rows, ``(r, D)``.
    """
    # NumPy's eigensolvers are faster on the CPU.
    values, vectors = (torch.from_numpy(part).flip(-1)[..., :most] for part in np.linalg.eigh(square.numpy()))
    least = max(_LEAST, _ROUNDING * torch.finfo(values.dtype).eps)
    kept = values > least * max(float(values[0]), 0.0) if len(values) else values > 0
    # Contiguous, as after loading a checkpoint, so that products with them round in the same way.
    return values[kept], vectors[:, kept].T.contiguous()
