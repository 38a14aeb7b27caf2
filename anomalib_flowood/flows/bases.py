# SPDX-License-Identifier: Apache-2.0
"""Base distributions: what the latents of a flow are distributed like.

A base is a module with ``log_prob(z)``, nats, and ``radius(z)``, the distance from its mean, or from the nearest of
several; ``z`` is ``(N, ...)``, and both are ``(N,)``. Where latents are independent, it also has ``elementwise(z)``,
the log-density of each.
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


class GaussianMixture(ForEachKind):
    """A mixture of Gaussians of unit covariance over latents that are vectors, ``(N, k)``.

    A tied covariance is a linear transform before it: :meth:`fit` returns what the covariance is where the points are,
    and :meth:`transform` brings the means along to where it is the identity.

    What is inside comes in clusters, which k-means finds. The mixture is the mean of those that several runs find,
    so that where one of them starts matters less.

    Args:
        dims: k.
        modes: Gaussians that a run of k-means finds; at most one for ten points.
        clusterings: Runs of k-means, whose mixtures are averaged.

    Raises:
        ValueError: If one of them is below 1.
    """

    centres: Tensor
    """Means, ``(clusterings * modes, k)``; a buffer, as the other. Of several fits both have those in front."""
    log_weights: Tensor
    """Logarithms of their shares, ``(clusterings * modes,)``, which sum to 1, of several fits all together."""

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
        most = self.centres.shape[-2]
        modes = max(1, min(most // self.clusterings, len(points) // _POINTS_PER_MODE))
        centres, share, covariance = _cluster(points, modes, self.clusterings)
        # More slots than Gaussians: some share one, which is the same density.
        slots = torch.arange(most) % len(centres)
        self.centres = centres[slots].to(self.centres)
        self.log_weights = (share[slots] / torch.bincount(slots)[slots]).log().to(self.log_weights)
        return covariance

    def transform(self, matrix: Tensor) -> None:
        """Move the means to where points ``x`` become ``x @ matrix``, and have a covariance of I.

        Args:
            matrix: ``(k, k)``, in main memory.
        """
        self.centres = (self.centres.cpu().to(matrix) @ matrix).to(self.centres)

    def log_prob(self, z: Tensor, kind: Tensor | None = None) -> Tensor:
        """Log-density of latents, ``(N, k)``, each by the fit to its kind, ``(N,)``, if there are several; nats."""
        return self.by_kind(self._log_prob, z, kind)

    def radius(self, z: Tensor, kind: Tensor | None = None) -> Tensor:
        """Distance of latents, ``(N, k)``, from the nearest mean, of their kind, ``(N,)``; ``(N,)``."""
        return self.by_kind(self._radius, z, kind)

    def nearest(self, z: Tensor, kind: Tensor | None = None) -> Tensor:
        """The mean that is nearest to each of some latents, ``(N, k)``, of their kind, ``(N,)``: ``(N, k)``."""
        return self.by_kind(self._nearest, z, kind)

    def weigh(self, log_shares: Tensor) -> None:
        """Give several fits, which :meth:`join` has put together, their shares of one mixture; logarithms, ``(K,)``.

        Then :meth:`log_prob` of a kind is its part of that mixture, and the others are left out.
        """
        self.log_weights = self.log_weights + log_shares.log_softmax(0).to(self.log_weights)[:, None]

    def of(self, kind: Tensor) -> Base:
        """The distribution of latents whose kinds are known, ``(N,)``."""
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
    """A base of latents whose kinds are known."""

    def __init__(self, mixture: GaussianMixture, kind: Tensor) -> None:
        self.log_prob = partial(mixture.log_prob, kind=kind)
        self.radius = partial(mixture.radius, kind=kind)


def _kernels(z: Tensor, centres: Tensor) -> Tensor:
    """Return z c - |c|^2 / 2 of latents, ``(N, k)``, and means, ``(M, k)``, or those of each: ``(N, M)``."""
    # By a matrix product: no tensor of N x modes x k numbers.
    constant = -0.5 * centres.square().sum(-1)
    if centres.ndim == 2:
        return torch.addmm(constant, z, centres.T)
    return constant + (centres @ z[..., None])[..., 0]


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
    n, k = len(points), some.shape[1]
    moments = Moments()
    sums, sizes = torch.zeros(runs, modes, k).double(), torch.zeros(runs, modes).double()

    def find(run: int) -> KMeans:
        # Random starts and few steps: the mean over runs makes up for what each of them lacks.
        return KMeans(modes, init="random", n_init=1, max_iter=10, random_state=run).fit(some)

    def count_in(clusters: KMeans, total: Tensor, size: Tensor) -> None:
        kind = torch.from_numpy(clusters.predict(single)).long()
        total.index_add_(0, kind, exact)
        size += kind.bincount(minlength=modes)

    # Runs side by side, each by one thread: from three on, scikit-learn adds up its sums in the order in which they are
    # done. OpenMP's limit is of a thread; BLAS's, which scikit-learn sets and takes back meanwhile, of the process.
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
    # Where points are the same, clusters may be without any: these are left out.
    found = sizes > 0
    means, size = sums[found] / sizes[found][:, None], sizes[found]
    deviations = (means - moments.mean) * size[:, None].sqrt()
    scatter = n * runs * moments.covariance - deviations.T @ deviations
    return means, size / (n * runs), scatter / max(1, n * runs - len(means))
