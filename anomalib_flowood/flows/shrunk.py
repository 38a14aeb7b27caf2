# SPDX-License-Identifier: Apache-2.0
"""A Gaussian with a full covariance, shrunk by an amount that depends on the number of points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .kinds import ForEachKind
from .precision import full_precision
from .rows import Moments


class ShrunkGaussian(ForEachKind):
    """N(m, (1 - s) S + (s v + a) I) with the sample covariance S, its mean variance v, OAS's shrinkage s and noise a.

    S of n points has at most n - 1 directions, so that the D × D covariance is stored as these directions, the shrunk
    variances along them, and the variance s v + a along all others. That is exact, takes no more memory than the
    points, and has the form of probabilistic PCA without the choice of a number of directions. Two points are enough.

    Source: Chen, Wiesel, Eldar and Hero 2010 (Oracle Approximating Shrinkage), IEEE Transactions on Signal Processing
    58(10), equation 23, as implemented in scikit-learn.

    Args:
        dims: D.
        directions: Number of leading directions whose coordinates :meth:`forward` returns for another density to model;
            the Gaussian models the rest.

    Raises:
        ValueError: If there are more directions than dimensions.
    """

    mean: Tensor
    """m, ``(D,)``; a buffer, like the others. With several kinds, each buffer has a first dimension for them."""
    components: Tensor
    """Directions in rows, ``(r, D)``, sorted by variance in descending order; r is known after a fit."""
    variances: Tensor
    """Variances along them, ``(r,)``."""
    tail_variance: Tensor
    """s v + a, ``()``: the variance along all other directions, and what is added along every direction."""

    def __init__(self, dims: int, directions: int = 0) -> None:
        super().__init__()
        if not 0 <= directions <= dims:
            msg = f"directions must lie between 0 and the {dims} dimensions of a point, got {directions}."
            raise ValueError(msg)
        self.directions = directions
        self.of_kind = {"mean": 1, "components": 1, "variances": 0, "tail_variance": 0}
        self.register_buffer("mean", torch.zeros(dims))
        self.register_buffer("components", torch.eye(directions, dims))
        self.register_buffer("variances", torch.ones(directions))
        self.register_buffer("tail_variance", torch.ones(()))

    def fit(self, points: Tensor | Moments, *, noise: float = 0.0, what: str = "points") -> None:
        """Fit mean and covariance.

        Args:
            points: ``(n, D)``, or the moments of points that do not fit into memory.
            noise: a, the variance of noise that is added along every direction.
            what: What errors call the points.

        Raises:
            ValueError: If there are fewer than two points, they are all alike, or the noise is negative.
        """
        if not noise >= 0:
            msg = f"noise must be at least 0, got {noise}."
            raise ValueError(msg)
        moments = points if isinstance(points, Moments) else Moments(points)
        if moments.count < 2:
            msg = f"A covariance needs at least 2 {what}, got {moments.count}: give more images."
            raise ValueError(msg)
        mean = moments.mean
        variances, components = moments.principal_directions()
        total = float(variances.sum())
        if not total > 1e-12 * (total + float(mean.square().sum())):
            msg = f"The {moments.count} {what} are all alike, or constant: give more varied images."
            raise ValueError(msg)
        dims = len(mean)
        shrinkage, level = _oas(variances, dims, moments.count)
        tail = shrinkage * level + noise
        variances = (1 - shrinkage) * variances + tail
        missing = self.directions - len(variances)
        if missing > 0:
            components = _completed(components, missing)
            variances = torch.cat([variances, variances.new_full((missing,), tail)])
        like = self.mean
        self.mean = mean.to(like)
        self.components = components.to(like)
        self.variances = variances.to(like)
        self.tail_variance = torch.tensor(tail, dtype=torch.float64).to(like)

    def forget(self) -> None:
        """Become the standard normal distribution again."""
        dims = self.mean.shape[-1]
        self.mean = self.mean.new_zeros(dims)
        self.components = torch.eye(self.directions, dims).to(self.components)
        self.variances = self.variances.new_ones(self.directions)
        self.tail_variance = self.tail_variance.new_ones(())

    def join(self, fits: Sequence[tuple[Tensor, ...]]) -> None:
        """Hold several fits, one for each kind; fits of fewer directions get more, with the variance of the tail."""
        most = max(len(variances) for _, _, variances, _ in fits)
        padded = []
        for mean, components, variances, tail in fits:
            missing = most - len(variances)
            # On the CPU, since MPS has no QR decomposition.
            components = _completed(components.cpu(), missing).to(components) if missing else components
            padded.append((mean, components, torch.cat([variances, tail.expand(missing)]), tail))
        super().join(padded)

    @full_precision
    def coordinates(self, points: Tensor) -> Tensor:
        """Return the unstandardised coordinates of points, ``(N, D)``, along the leading directions: ``(N, k)``."""
        return (points - self.mean) @ self.components[: self.directions].T

    @full_precision
    def turn(self, covariance: Tensor, *, noise: float = 0.0) -> Tensor:
        """Replace the covariance along the leading directions by another one, which is shrunk by the same amount.

        This is how the Gaussians of a mixture share the covariance within clusters, once each has its own mean.

        Args:
            covariance: A covariance of the :meth:`coordinates`, ``(k, k)``.
            noise: The noise of the fit.

        Returns:
            The matrix that maps these coordinates to the standardised ones of :meth:`forward`, ``(k, k)``.
        """
        k, tail = self.directions, self.tail_variance.cpu().double()
        variances, rotation = (
            torch.from_numpy(part).flip(-1) for part in np.linalg.eigh(covariance.cpu().double().numpy())
        )
        variances = self._unshrunk_share(noise) * variances.clamp(min=0) + tail
        self.components[:k] = (rotation.T.to(self.components) @ self.components[:k]).to(self.components)
        self.variances[:k] = variances.to(self.variances)
        return rotation / variances.sqrt()

    @full_precision
    def forward(self, points: Tensor, kind: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Split the log-density of points as :class:`~anomalib_flowood.flows.PrincipalSubspace` does.

        Args:
            points: ``(N, D)``.
            kind: The kind of each point, ``(N,)``, if there are several.

        Returns:
            Standardised coordinates along the leading directions, ``(N, directions)``, and the log-density without
            theirs, nats, ``(N,)``.
        """
        k, dims, kept = self.directions, self.mean.shape[-1], self.variances.shape[-1]
        standard, outside = self._standardised(points, kind)
        constant = (
            (dims - k) * math.log(2 * math.pi) + self.variances.log().sum(-1) + (dims - kept) * self.tail_variance.log()
        )
        square = standard[:, k:].square().sum(1)
        if outside is not None:
            square = square + outside
        return standard[:, :k], -0.5 * square - 0.5 * (constant if kind is None else constant[kind])

    @full_precision
    def standardised(self, points: Tensor, kind: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standardise points along all stored directions, and outside of them.

        Args:
            points: ``(N, D)``.
            kind: The kind of each point, ``(N,)``, if there are several.

        Returns:
            Standardised coordinates, ``(N, r)``, NaN along directions that the point's kind does not have, and the
            squared standardised distance from the subspace that they span, ``(N,)``. Half of it plus half of the
            squared coordinates is −log p, up to a constant.
        """
        standard, outside = self._standardised(points, kind)
        outside = standard.new_zeros(len(standard)) if outside is None else outside
        if kind is None:
            return standard, outside
        own = (self.variances > self.tail_variance[:, None])[kind]  # join() adds some with the tail's variance
        own[:, : self.directions] = True
        return standard.masked_fill(~own, torch.nan), outside + standard.masked_fill(own, 0).square().sum(1)

    def _standardised(self, points: Tensor, kind: Tensor | None) -> tuple[Tensor, Tensor | None]:
        kept = self.variances.shape[-1]
        found = self.by_kind(self._apart, points, kind)
        return found[:, :kept], found[:, kept] if found.shape[1] > kept else None

    def _apart(self, points: Tensor, mean: Tensor, components: Tensor, variances: Tensor, tail: Tensor) -> Tensor:
        """Standardised coordinates, and the squared standardised distance from their span, ``(N, r + 1)``."""
        centred = points - mean
        # The components of one kind, or those of each point.
        coordinates = centred @ components.T if components.ndim == 2 else (components @ centred[..., None])[..., 0]
        standard = coordinates * variances.rsqrt()
        if variances.shape[-1] == mean.shape[-1]:  # they span everything; the distance would be rounding error
            return standard
        outside = (centred.square().sum(1) - coordinates.square().sum(1)).clamp(min=0)
        return torch.cat([standard, (outside / tail)[:, None]], dim=1)

    def log_prob(self, points: Tensor, kind: Tensor | None = None) -> Tensor:
        """Log-density of points, ``(N, D)``, given their kinds, ``(N,)``, if there are several; nats, ``(N,)``."""
        leading, rest = self(points, kind)
        return rest - 0.5 * (leading.square().sum(1) + self.directions * math.log(2 * math.pi))

    def _unshrunk_share(self, noise: float) -> Tensor:
        """Return 1 - s, from the tail s v + a and the mean variance v + a, which shrinking does not change."""
        tail, dims = self.tail_variance.cpu().double(), len(self.mean)
        level = (self.variances.cpu().double().sum() + (dims - len(self.variances)) * tail) / dims
        return 1 - (tail - noise) / (level - noise)


def _oas(variances: Tensor, dims: int, count: int) -> tuple[float, float]:
    """Return the shrinkage of OAS and the mean variance, given all variances that are not 0."""
    level = float(variances.sum()) / dims
    spread = float(variances.square().sum()) / dims
    excess = (count + 1) * (spread - level**2) / dims
    return (min(1.0, (spread / dims + level**2) / excess) if excess > 0 else 1.0), level


@full_precision
def _completed(components: Tensor, missing: int) -> Tensor:
    """Add directions that are orthogonal to the given ones, ``(r, D)``: ``(r + missing, D)``; both on the CPU."""
    generator = torch.Generator().manual_seed(0)
    added = torch.randn(missing, components.shape[1], dtype=components.dtype, generator=generator)
    for _ in range(2):  # twice, since rounding errors remain after the first projection
        added = added - (added @ components.T) @ components
        added = torch.linalg.qr(added.T)[0].T
    return torch.cat([components, added])
