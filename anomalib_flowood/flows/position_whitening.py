# SPDX-License-Identifier: Apache-2.0
"""A Gaussian for each position of a map, as an invertible layer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor

from .precision import full_precision

_RIDGE = 1e-6
"""Of the mean variance, added to every variance: a number that is constant stays invertible."""


class PositionWhitening(InvertibleModule):
    """Whiten each position of a map by a mean and a covariance of its own: what belongs there becomes standard normal.

    With a standard normal for what comes out, it is the Gaussian for each position of Defard et al. (2021, "PaDiM",
    section 3.2). Their covariances of few images need a ridge; here each is shrunk towards the mean W of all positions'
    covariances, as classes are in regularised discriminant analysis (Friedman 1989, equation 18). With the scatter S_p
    of position p over n images, D numbers at each::

        C_p = (S_p + prior D W) / (n - 1 + prior D),    w = L_p^-1 (x - m_p),    C_p = L_p L_p^T

    Before a fit it is the identity.

    Args:
        dims_in: One map shape, ``[(D, h, w)]``.
        prior: How many images W counts as, for each number of a position. Large ones leave positions no more than a
            mean of their own.
        dims_c: FrEIA's convention; none are supported.

    Raises:
        ValueError: If the input is no map, there is a condition, or the prior is not positive.
    """

    mean: Tensor
    """m, ``(h * w, D)``; a buffer, as the other."""
    factors: Tensor
    """L_p^-1, lower triangular, ``(h * w, D, D)``."""

    def __init__(
        self, dims_in: Iterable[tuple[int, ...]], prior: float = 1.0, dims_c: Iterable[tuple[int, ...]] | None = None
    ) -> None:
        super().__init__(dims_in, dims_c)
        if len(self.dims_in) != 1 or len(self.dims_in[0]) != 3 or self.dims_c:
            msg = f"PositionWhitening takes one map (D, h, w) and no condition, got {self.dims_in} and {self.dims_c}."
            raise ValueError(msg)
        if not prior > 0:
            msg = f"prior must be positive, got {prior}."
            raise ValueError(msg)
        dims, height, width = self.shape = tuple(self.dims_in[0])
        self.prior = prior
        self.register_buffer("mean", torch.zeros(height * width, dims))
        self.register_buffer("factors", torch.eye(dims).repeat(height * width, 1, 1))

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shape of the output, which is that of the input."""
        return input_dims

    def fit(self, samples: Tensor) -> None:
        """Fit means and covariances.

        Args:
            samples: Maps of training images, ``(n, D, h, w)``; in main memory, if they are many.

        Raises:
            ValueError: If there are fewer than two, they are all the same, or a value is NaN or infinite.
        """
        n, dims = len(samples), self.shape[0]
        if n < 2:
            msg = f"A Gaussian for each position is fitted to at least 2 images, got {n}."
            raise ValueError(msg)
        means, scatters = self.mean.new_zeros(self.mean.shape), self.factors.new_zeros(self.factors.shape)
        for place, vectors in enumerate(samples.flatten(2).unbind(2)):
            precise = vectors.to(self.mean.dtype).double()
            means[place] = precise.mean(0)
            centred = precise - precise.mean(0)
            scatters[place] = centred.T @ centred
        shared = scatters.double().mean(0) / (n - 1)
        if not bool(shared.isfinite().all()) or float(shared.trace()) <= 0:
            msg = f"The {n} maps hold NaN or infinite values, or are all the same."
            raise ValueError(msg)
        weight = self.prior * dims
        ridge = _RIDGE * shared.trace() / dims * torch.eye(dims).to(shared)
        for place, scatter in enumerate(scatters):
            covariance = (scatter + weight * shared) / (n - 1 + weight) + ridge
            # In NumPy, one after the other: batched factorisations have hung on some CPUs.
            lower = np.linalg.cholesky(covariance.double().cpu().numpy())
            self.factors[place] = torch.from_numpy(np.linalg.inv(lower)).tril().to(self.factors)
        self.mean.copy_(means)

    def forget(self) -> None:
        """Be the identity again."""
        self.mean.zero_()
        self.factors.copy_(torch.eye(self.shape[0]))

    @property
    def log_dets(self) -> Tensor:
        """Log-determinant of the forward direction at each position, ``(h, w)``."""
        return self.factors.diagonal(dim1=1, dim2=2).log().sum(1).unflatten(0, self.shape[1:])

    @full_precision
    def transform(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """Whiten maps, ``(N, D, h, w)``, or undo it; also return the log-determinant of this direction, ``(N,)``."""
        mean = self.mean.T.reshape(self.shape)
        vectors = (x if rev else x - mean).flatten(2).permute(2, 1, 0)  # (h * w, D, N)
        y = torch.linalg.solve_triangular(self.factors, vectors, upper=False) if rev else self.factors @ vectors
        y = y.permute(2, 1, 0).unflatten(2, self.shape[1:])
        log_det = self.log_dets.sum().expand(x.shape[0])
        return (y + mean, -log_det) if rev else (y, log_det)

    def forward(
        self,
        x_or_z: Iterable[Tensor],
        c: Iterable[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor], Tensor]:
        """Transform; see :class:`FrEIA.modules.InvertibleModule` for the convention."""
        del c, jac
        (x,) = x_or_z
        y, log_det = self.transform(x, rev)
        return (y,), log_det
