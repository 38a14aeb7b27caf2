# SPDX-License-Identifier: Apache-2.0
"""Base distributions: the distributions of a flow's latents.

A base is a module with ``log_prob(z)``, in nats, and ``radius(z)``, the distance from its mean, or from the nearest
mean of a mixture; ``z`` is ``(N, ...)``, and both are ``(N,)``. A base of independent latents also has
``elementwise(z)``, the log-density of each latent.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, distributions, nn

from .kinds import ForEachKind
from .precision import full_precision
from .rows import Moments, Rows, draw, in_turn, take

_POINTS_PER_MODE = 10
"""Points per Gaussian of a mixture, at least: each is to describe a cluster, not a single point."""

_CLUSTERED = 10_000
"""Most points that k-means runs on, to limit its time; all points are then assigned to the clusters found."""


class Base(Protocol):
    """The interface of a base distribution."""

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
        """Distance of latents, ``(N, ...)``, from the mean at 0; ``(N,)``."""
        return z.flatten(1).norm(dim=1)


class StudentT(nn.Module):
    """Independent Student's t distributions, whose heavy tails penalise single outlying latents less.

    Source: Alexanderson and Henter 2020 (arXiv 2006.06599), who use a multivariate one; here each latent has its own.

    Args:
        degrees: Degrees of freedom; the more, the closer to :class:`StandardNormal`.

    Raises:
        ValueError: If they are not above 0.
    """

    def __init__(self, degrees: float = 10.0) -> None:
        super().__init__()
        if not degrees > 0:
            msg = f"degrees must be above 0, got {degrees}."
            raise ValueError(msg)
        self.degrees = degrees

    def elementwise(self, z: Tensor) -> Tensor:
        """Log-density of each latent, nats; of the shape of ``z``."""
        # Not validated: PyTorch would refuse NaN, which an overflow of the flow causes and which is handled elsewhere.
        return distributions.StudentT(self.degrees, validate_args=False).log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of latents, ``(N, ...)``; nats, ``(N,)``."""
        return self.elementwise(z).flatten(1).sum(1)

    def radius(self, z: Tensor) -> Tensor:
        """Distance of latents, ``(N, ...)``, from the centre at 0; ``(N,)``."""
        return z.flatten(1).norm(dim=1)


class GaussianMixture(ForEachKind):
    """A mixture of Gaussians of unit covariance over latents that are vectors, ``(N, k)``.

    A covariance that all Gaussians share is a linear transform before the mixture: :meth:`fit` returns the covariance
    within clusters, and :meth:`transform` maps the means to the space in which it is the identity.

    The Gaussians are clusters found by k-means. The mixtures of several runs are averaged, so that the random start
    of a run matters less.

    Args:
        dims: k.
        modes: Clusters of each run of k-means; at most one for ten points.
        clusterings: Runs of k-means, whose mixtures are averaged.

    Raises:
        ValueError: If one of them is below 1.
    """

    centres: Tensor
    """Means, ``(clusterings * modes, k)``; a buffer, like the other. With several fits, both get a first dimension."""
    log_weights: Tensor
    """Logarithms of the mixture weights, ``(clusterings * modes,)``; the weights of all fits together sum to 1."""

    def __init__(self, dims: int, modes: int = 1, clusterings: int = 8) -> None:
        super().__init__()
        for argument, value in (("dims", dims), ("modes", modes), ("clusterings", clusterings)):
            if value < 1:
                msg = f"{argument} must be at least 1, got {value}."
                raise ValueError(msg)
        self.clusterings = clusterings
        self.of_kind = {"centres": 2, "log_weights": 1}
        slots = clusterings * modes
        self.register_buffer("centres", torch.zeros(slots, dims))
        self.register_buffer("log_weights", torch.full((slots,), -math.log(slots)))

    def fit(self, points: Rows) -> Tensor:
        """Find means and weights.

        k-means runs on at most 10,000 of the points. Then every point belongs to the cluster whose mean is nearest.

        Args:
            points: ``(n, k)``, read a part at a time.

        Returns:
            The covariance of the points within clusters, ``(k, k)``, float64, on the CPU.

        Raises:
            ValueError: If there are no points.
        """
        if not len(points):
            msg = "A mixture of Gaussians is fitted to points, and there are none."
            raise ValueError(msg)
        slots = self.centres.shape[-2]
        modes = max(1, min(slots // self.clusterings, len(points) // _POINTS_PER_MODE))
        centres, weights, covariance = _cluster(points, modes, self.clusterings)
        # If there are more slots than clusters, several slots share a cluster and its weight: the density is the same.
        cluster = torch.arange(slots) % len(centres)
        self.centres = centres[cluster].to(self.centres)
        self.log_weights = (weights[cluster] / torch.bincount(cluster)[cluster]).log().to(self.log_weights)
        return covariance

    def transform(self, matrix: Tensor) -> None:
        """Map the means to the space of the points ``x @ matrix``, in which the covariance within clusters is I.

        Args:
            matrix: ``(k, k)``, on the CPU.
        """
        self.centres = (self.centres.cpu().to(matrix) @ matrix).to(self.centres)

    def log_prob(self, z: Tensor, kind: Tensor | None = None) -> Tensor:
        """Log-density of latents, ``(N, k)``, in nats; with several fits, each by that of its kind, ``(N,)``."""
        return self.by_kind(self._log_prob, z, kind)

    def radius(self, z: Tensor, kind: Tensor | None = None) -> Tensor:
        """Distance of latents, ``(N, k)``, from the nearest mean of their kind, ``(N,)``; ``(N,)``."""
        return self.by_kind(self._radius, z, kind)

    def nearest(self, z: Tensor, kind: Tensor | None = None) -> Tensor:
        """For each of the latents, ``(N, k)``, the nearest mean of its kind, ``(N,)``; ``(N, k)``."""
        return self.by_kind(self._nearest, z, kind)

    def weigh(self, log_shares: Tensor) -> None:
        """Make the fits that :meth:`join` has put together one mixture, with the given log-weights, ``(K,)``.

        :meth:`log_prob` then returns the log-density of a kind's own component of that mixture, weight included.
        """
        self.log_weights = self.log_weights + log_shares.log_softmax(0).to(self.log_weights)[:, None]

    def of(self, kind: Tensor) -> Base:
        """Return the base of latents whose kinds are given, ``(N,)``."""
        return _OfKinds(self, kind)

    @full_precision
    def _log_prob(self, z: Tensor, centres: Tensor, log_weights: Tensor) -> Tensor:
        square = z.square().sum(1)
        weighted = torch.logsumexp(_kernels(z, centres) + log_weights, dim=1)
        return weighted - 0.5 * (square + z.shape[1] * math.log(2 * math.pi))

    @full_precision
    def _radius(self, z: Tensor, centres: Tensor, _: Tensor) -> Tensor:
        return (z.square().sum(1) - 2 * _kernels(z, centres).amax(1)).clamp(min=0).sqrt()

    @full_precision
    def _nearest(self, z: Tensor, centres: Tensor, _: Tensor) -> Tensor:
        place = _kernels(z, centres).argmax(1)
        return centres[place] if centres.ndim == 2 else centres[torch.arange(len(z), device=z.device), place]


class _OfKinds:
    """The base of latents whose kinds are given."""

    def __init__(self, mixture: GaussianMixture, kind: Tensor) -> None:
        self.log_prob = partial(mixture.log_prob, kind=kind)
        self.radius = partial(mixture.radius, kind=kind)


def _kernels(z: Tensor, centres: Tensor) -> Tensor:
    """Return z·c - |c|² / 2, ``(N, M)``, for latents, ``(N, k)``, and means, ``(M, k)`` or ``(N, M, k)``."""
    # A matrix product needs no tensor of N x M x k numbers.
    constant = -0.5 * centres.square().sum(-1)
    if centres.ndim == 2:
        return torch.addmm(constant, z, centres.T)
    return constant + (centres @ z[..., None])[..., 0]


def _cluster(points: Rows, modes: int, runs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find clusters by several runs of k-means.

    Args:
        points: ``(n, k)``.
        modes: Clusters of each run.
        runs: Number of runs, each with another random start.

    Returns:
        The means of the clusters of all runs, ``(M, k)``, their shares of the points, which sum to 1 over all runs,
        ``(M,)``, and the covariance of the points within clusters, ``(k, k)``; float64, on the CPU.
    """
    some = take(points, draw(len(points), _CLUSTERED)).float().cpu().numpy()
    n, k = len(points), some.shape[1]
    moments = Moments()
    sums, sizes = torch.zeros(runs, modes, k).double(), torch.zeros(runs, modes).double()

    def find(run: int) -> KMeans:
        # One random start and few iterations are enough, since the mixtures of all runs are averaged.
        return KMeans(modes, init="random", n_init=1, max_iter=10, random_state=run).fit(some)

    def count_in(clusters: KMeans, total: Tensor, size: Tensor) -> None:
        kind = torch.from_numpy(clusters.predict(single)).long()
        total.index_add_(0, kind, exact)
        size += kind.bincount(minlength=modes)

    # Runs in parallel, each in one thread: with three or more, scikit-learn adds partial sums in the order in which
    # threads finish, so that results vary. OpenMP's limit holds per thread, BLAS's for the process; scikit-learn itself
    # sets and restores the latter meanwhile.
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(torch.get_num_threads(), initializer=threadpool_limits, initargs=(1, "openmp")) as threads,
    ):
        clusterings = list(threads.map(find, range(runs)))
        for part in in_turn(points):
            exact = part.cpu().double()
            single = exact.float().numpy()
            moments.add(exact)
            list(threads.map(count_in, clusterings, sums, sizes))
    found = sizes > 0  # among identical points, clusters may be empty
    means, size = sums[found] / sizes[found][:, None], sizes[found]
    deviations = (means - moments.mean) * size[:, None].sqrt()
    scatter = n * runs * moments.covariance - deviations.T @ deviations
    return means, size / (n * runs), scatter / max(1, n * runs - len(means))
