# SPDX-License-Identifier: Apache-2.0
"""Base distributions: what the latents of a flow are distributed like.

A base is a module with ``log_prob(z)``, nats, and ``radius(z)``, the distance from its mean, or from the nearest of
several; ``z`` is ``(N, ...)``, and both are ``(N,)``. Where latents are independent, it also has ``elementwise(z)``,
the log-density of each.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, distributions, nn

from .precision import full_precision
from .rows import Moments, Rows, draw, in_turn, take

_POINTS_PER_MODE = 10
"""A Gaussian of a mixture is to stand for a kind of points, and not for one of them."""

_CLUSTERED = 10_000
"""Most points among which k-means searches, for the time it takes; then all of them count."""


class Base(Protocol):
    """What a density needs of a base distribution."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of latents, ``(N, ...)``; nats, ``(N,)``."""
        ...

    def radius(self, z: Tensor) -> Tensor:
        """Distance of latents from the nearest mean; ``(N,)``."""
        ...


class StandardNormal(nn.Module):
    """N(0, I) over latents of any shape."""

    def elementwise(self, z: Tensor) -> Tensor:
        """Log-density of each latent, nats; of the shape of ``z``."""
        return -0.5 * (z.square() + math.log(2 * math.pi))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of latents, ``(N, ...)``; nats, ``(N,)``."""
        z = z.flatten(1)
        return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))

    def radius(self, z: Tensor) -> Tensor:
        """Distance of latents, ``(N, ...)``, from the mean, which is 0; ``(N,)``."""
        return z.flatten(1).norm(dim=1)


class StudentT(nn.Module):
    """Independent Student's t distributions, whose tails forgive single latents far out.

    Source: Alexanderson and Henter 2020 (arXiv 2006.06599), who take a multivariate one; here each latent has its own.

    Args:
        degrees: Degrees of freedom; the more, the closer to :class:`StandardNormal`.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, degrees: float = 10.0) -> None:
        super().__init__()
        if not degrees > 0:
            msg = f"degrees must be above 0, got {degrees}."
            raise ValueError(msg)
        self.degrees = degrees

    def elementwise(self, z: Tensor) -> Tensor:
        """Log-density of each latent, nats; of the shape of ``z``."""
        # Unchecked, since PyTorch refuses NaN, which an overflow of the flow leaves: others say what that means.
        return distributions.StudentT(self.degrees, validate_args=False).log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of latents, ``(N, ...)``; nats, ``(N,)``."""
        return self.elementwise(z).flatten(1).sum(1)

    def radius(self, z: Tensor) -> Tensor:
        """Distance of latents, ``(N, ...)``, from the centre, which is 0; ``(N,)``."""
        return z.flatten(1).norm(dim=1)


class GaussianMixture(nn.Module):
    """A mixture of Gaussians of unit covariance over latents that are vectors, ``(N, k)``.

    A tied covariance is a linear transform before it: :meth:`fit` returns what the covariance is where the points are,
    and :meth:`transform` brings the means along to where it is the identity.

    What is inside comes in several kinds, which k-means finds. The mixture is the mean of those that several runs find,
    so that where one of them starts matters less.

    Args:
        dims: k.
        modes: Gaussians that a run of k-means finds; at most one for ten points.
        clusterings: Runs of k-means, whose mixtures are averaged.

    Raises:
        ValueError: If one of them is below 1.
    """

    centres: Tensor
    """Means, ``(clusterings * modes, k)``; a buffer."""
    log_weights: Tensor
    """Logarithms of their shares, which sum to 1; a buffer."""

    def __init__(self, dims: int, modes: int = 1, clusterings: int = 8) -> None:
        super().__init__()
        for argument, value in (("dims", dims), ("modes", modes), ("clusterings", clusterings)):
            if value < 1:
                msg = f"{argument} must be at least 1, got {value}."
                raise ValueError(msg)
        self.clusterings = clusterings
        slots = clusterings * modes
        self.register_buffer("centres", torch.zeros(slots, dims))
        self.register_buffer("log_weights", torch.full((slots,), -math.log(slots)))

    def fit(self, points: Rows) -> Tensor:
        """Find means and shares.

        k-means runs on 10,000 of the points at most. Then every point is in the cluster whose mean is nearest.

        Args:
            points: ``(n, k)``, of which only some are looked at at a time.

        Returns:
            The covariance of the points within clusters, ``(k, k)``, float64, in main memory.

        Raises:
            ValueError: If there are no points.
        """
        if not len(points):
            msg = "A mixture of Gaussians is fitted to points, and there are none."
            raise ValueError(msg)
        modes = max(1, min(len(self.centres) // self.clusterings, len(points) // _POINTS_PER_MODE))
        centres, share, covariance = _cluster(points, modes, self.clusterings)
        # More slots than Gaussians: some share one, which is the same density.
        slots = torch.arange(len(self.centres)) % len(centres)
        self.centres.copy_(centres[slots])
        self.log_weights.copy_((share[slots] / torch.bincount(slots)[slots]).log())
        return covariance

    def transform(self, matrix: Tensor) -> None:
        """Move the means to where points ``x`` become ``x @ matrix``, ``(k, k)``, and have a covariance of I."""
        self.centres.copy_(self.centres.to(matrix) @ matrix)

    @full_precision
    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of latents, ``(N, k)``; nats, ``(N,)``."""
        square = z.square().sum(1)
        weighted = torch.logsumexp(self._kernels(z) + self.log_weights, dim=1)
        return weighted - 0.5 * (square + z.shape[1] * math.log(2 * math.pi))

    @full_precision
    def radius(self, z: Tensor) -> Tensor:
        """Distance of latents, ``(N, k)``, from the nearest mean; ``(N,)``."""
        return (z.square().sum(1) - 2 * self._kernels(z).amax(1)).clamp(min=0).sqrt()

    @full_precision
    def nearest(self, z: Tensor) -> Tensor:
        """The mean that is nearest to each of some latents, ``(N, k)``: ``(N, k)``."""
        return self.centres[self._kernels(z).argmax(1)]

    def _kernels(self, z: Tensor) -> Tensor:
        # By a matrix product: no tensor of N x modes x k numbers.
        return torch.addmm(-0.5 * self.centres.square().sum(1), z, self.centres.T)


def _cluster(points: Rows, modes: int, runs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find clusters by several runs of k-means.

    Args:
        points: ``(N, k)``.
        modes: Clusters of a run.
        runs: Runs, which start elsewhere.

    Returns:
        The means of the clusters of all runs, ``(M, k)``, the shares of the runs' points in them, ``(M,)``, and the
        covariance of the points within clusters, ``(k, k)``; float64, in main memory.
    """
    some = take(points, draw(len(points), _CLUSTERED)).float().cpu().numpy()
    # Random starts and few steps: the mean over runs makes up for what each of them lacks.
    # By one thread: from three on, scikit-learn adds up their sums in the order in which they are done.
    with threadpool_limits(1, user_api="openmp"):
        clusterings = [
            KMeans(modes, init="random", n_init=1, max_iter=10, random_state=run).fit(some) for run in range(runs)
        ]
        n, k = len(points), some.shape[1]
        moments = Moments()
        sums, sizes = torch.zeros(runs, modes, k).double(), torch.zeros(runs, modes).double()
        for part in in_turn(points):
            exact = part.double().cpu()
            single = exact.float().numpy()
            moments.add(exact)
            for clusters, total, size in zip(clusterings, sums, sizes, strict=True):
                kind = torch.from_numpy(clusters.predict(single)).long()
                total.index_add_(0, kind, exact)
                size += kind.bincount(minlength=modes)
    # Where points are the same, clusters may be without any: these are left out.
    found = sizes > 0
    means, size = sums[found] / sizes[found][:, None], sizes[found]
    deviations = (means - moments.mean) * size[:, None].sqrt()
    scatter = n * runs * moments.covariance - deviations.T @ deviations
    return means, size / (n * runs), scatter / max(1, n * runs - len(means))
