# SPDX-License-Identifier: Apache-2.0
"""A density over many dimensions, split into a principal subspace and the rest."""

from __future__ import annotations

import math

import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional

from .precision import full_precision

_LEAST = 1e-8
"""Variance, as a share of the largest, below which a direction counts as constant."""

_TAIL_FLOOR = 1e-3
"""Least variance of the rest, as a share of the smallest in the subspace, for points that lie in the subspace."""


class PrincipalSubspace(nn.Module):
    """Standardised coordinates in a principal subspace, and a Gaussian for the rest.

    With the mean m, the principal directions U (k of D), the variances v along them and the mean variance q of the
    rest::

        w = U^T (x - m) / sqrt(v),    r = x - m - U U^T (x - m)
        log p(x) = log p(w) - 1/2 sum log(v) + log N(r; 0, q I)

    This is the density of probabilistic PCA (Tipping and Bishop 1999, section 3) with any density of w instead of its
    Gaussian. Points are vectors, ``(N, D)``, or the positions of maps, ``(N, D, h, w)``.

    Args:
        dims: D.
        directions: k.
    """

    mean: Tensor
    """m, ``(D,)``; a buffer, like the others."""
    components: Tensor
    """U^T, ``(k, D)``."""
    variances: Tensor
    """v, ``(k,)``."""
    tail_variance: Tensor
    """q, ``()``."""

    def __init__(self, dims: int, directions: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dims))
        self.register_buffer("components", torch.zeros(directions, dims))
        self.register_buffer("variances", torch.ones(directions))
        self.register_buffer("tail_variance", torch.ones(()))

    def check(self, points: int, what: str = "points") -> None:
        """Check that there are enough points for the directions.

        Args:
            points: The number of points n.
            what: What errors call the points.

        Raises:
            ValueError: If there are no more points than directions.
        """
        k = len(self.components)
        if points <= k:
            remedy = f"or set subspace_dim to at most {points // 2}" if points >= 4 else "at least 4"
            msg = f"{k} principal directions need more than {k} {what}, got {points}: give more images, {remedy}."
            raise ValueError(msg)

    def fit(self, points: Tensor, *, what: str = "points", solver: str = "auto") -> None:
        """Fit mean, directions and variances.

        Args:
            points: ``(n, D)``; copied if they are not on the CPU or have less than 32 bits.
            what: What errors call the points.
            solver: scikit-learn's ``svd_solver``; ``auto`` uses a randomised one for few of many directions.

        Raises:
            ValueError: If there are too few points, or they vary in too few directions.
        """
        n, k = len(points), len(self.components)
        self.check(n, what)
        precise = points.to(torch.promote_types(points.dtype, torch.float32)).cpu()
        pca = PCA(n_components=k, svd_solver=solver, random_state=0).fit(precise.numpy())
        explained = torch.from_numpy(pca.explained_variance_).double()
        largest = float(explained[0])
        if float(explained[-1]) <= _LEAST * largest or largest <= 1e-12:
            rank = int((explained > _LEAST * largest).sum()) if largest > 1e-12 else 0
            distinct = _count_distinct(precise)
            if distinct <= n // 2:
                msg = (
                    f"Many training images are the same, or constant: of {n} {what} only {distinct} differ, and vary "
                    f"in {rank} directions, fewer than subspace_dim={k}. Give more varied images."
                )
                raise ValueError(msg)
            msg = (
                f"The {n} {what} vary in {rank} directions only, fewer than subspace_dim={k}: set subspace_dim lower, "
                "or give more varied images."
            )
            raise ValueError(msg)
        squares = torch.linalg.vector_norm(precise, dtype=torch.float64).square()
        total = (squares - n * precise.mean(0, dtype=torch.float64).square().sum()) / (n - 1)
        left = (total - explained.sum()) / max(1, precise.shape[1] - k)
        self.mean.copy_(torch.from_numpy(pca.mean_))
        self.components.copy_(torch.from_numpy(pca.components_))
        self.variances.copy_(explained)
        self.tail_variance.copy_(torch.maximum(left, _TAIL_FLOOR * explained[-1]))

    @full_precision
    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Split the density of points.

        Args:
            points: ``(N, D)``, or ``(N, D, h, w)`` for the positions of maps.

        Returns:
            Standardised coordinates w, ``(N, k)`` or ``(N, k, h, w)``, and the log-density without log p(w), nats,
            ``(N,)`` or ``(N, h, w)``.
        """
        k, dims = self.components.shape
        if points.ndim == 2:
            centred = points - self.mean
            coordinates, scale = centred @ self.components.T, self.variances.rsqrt()
        else:
            centred = points - self.mean[:, None, None]
            coordinates = functional.conv2d(centred, self.components[:, :, None, None])
            scale = self.variances.rsqrt()[:, None, None]
        if k == dims:  # nothing lies outside; the difference would be rounding error
            outside = torch.zeros_like(centred[:, 0])
        else:
            outside = (centred.square().sum(1) - coordinates.square().sum(1)).clamp(min=0)
        constant = (dims - k) * torch.log(2 * math.pi * self.tail_variance) + self.variances.log().sum()
        # In this form, one product and one sum with constants, an OpenVINO model keeps single precision.
        return coordinates * scale, outside * (-0.5 / self.tail_variance) - 0.5 * constant

    @full_precision
    def coordinates(self, points: Tensor, scale: Tensor) -> Tensor:
        """Return only the standardised coordinates of the positions of maps, by a single affine transform.

        Args:
            points: ``(N, D, h, w)``, before scaling.
            scale: Factors by which the channels are scaled first, ``(D,)``.

        Returns:
            ``(N, k, h, w)``, the coordinates that :meth:`forward` returns for the scaled points.
        """
        directions = self.components * self.variances.rsqrt()[:, None]
        return functional.conv2d(points, (directions * scale)[:, :, None, None], -(directions @ self.mean))


def _count_distinct(points: Tensor) -> int:
    """Return how many distinct points there are, ``(n, D)``, up to rounding errors of single precision."""
    unit = 1e-5 * points.abs().amax().clamp(min=1e-30)
    return len(torch.unique((points / unit).round(), dim=0))
