# SPDX-License-Identifier: Apache-2.0
"""Gaussians as invertible layers: for whole samples, and for each position of a map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import copy
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .fitted import principal_directions
from .kinds import ForEachKind
from .layers import Layer
from .precision import full_precision, with_doubles

_POINTS_PER_DIRECTION = 2
"""Fewest points per direction: with fewer, whitening would overfit."""

_POSITIONS = 64
"""Positions whose covariances are computed at a time, since their vectors are copied."""

_SHIFT = 1.0
"""Standard deviation of the shifts between images that the covariances allow for, in positions."""

_FARTHEST = 2
"""Largest shift that is taken into account, in rows and in columns."""

_SHARED = 2
"""Weight of the shared covariance, as a number of images for each training image."""

_RIDGE = 1e-6
"""Ridge, as a share of the mean variance: covariances stay invertible where a channel is constant."""

_ROUNDING = 1e-6
"""Bound on the relative error of sums and means in float32."""


class Whitening(ForEachKind, Layer):
    """Whiten samples as a whole along their leading principal directions, and keep their shape.

    With the leading principal directions W over the training samples (k of them, variances u), the mean variance r of
    the rest and the mean m::

        w = (x - m) / sqrt(r) + W (1 / sqrt(u) - 1 / sqrt(r)) W^T (x - m)

    is symmetric and invertible. With a standard normal for w it is the Gaussian of probabilistic PCA (Tipping and
    Bishop 1999, section 3). Before a fit it is the identity.

    If samples are maps, directions can be constant over square blocks of positions: variation of whole images is
    coarse, and W takes less memory.

    Args:
        dims_in: One shape, of any rank.
        directions: Most directions k that a fit uses. It uses at most one for every two samples, and, of no more
            samples than dimensions, fewer than those in which they vary.
        dims_c: FrEIA's convention; none are supported.
        block: Rows and columns of a block.

    Raises:
        ValueError: If there is more than one input, there is a condition, k is negative, or blocks do not divide the
            input.
    """

    mean: Tensor
    """m, of the shape of a sample; a buffer, like the others."""
    directions: Tensor
    """W^T, unit vectors in rows, ``(k, ...)``, with one value for each block; k is known after a fit."""
    variances: Tensor
    """u, ``(k,)``."""
    rest: Tensor
    """r, ``()``."""

    def __init__(
        self,
        dims_in: Iterable[tuple[int, ...]],
        directions: int,
        dims_c: Iterable[tuple[int, ...]] | None = None,
        *,
        block: int = 1,
    ) -> None:
        super().__init__(dims_in, dims_c)
        if directions < 0:
            msg = f"directions must be at least 0, got {directions}."
            raise ValueError(msg)
        if block < 1 or (block > 1 and (len(self.shape) != 3 or any(side % block for side in self.shape[1:]))):
            msg = f"Blocks of {block} x {block} positions do not make up the shape {self.shape}."
            raise ValueError(msg)
        self.most = directions
        self.block = block
        self.of_kind = {"mean": len(self.shape), "directions": 1, "variances": 0, "rest": 0}
        self.register_buffer("mean", torch.zeros(self.shape))
        self.register_buffer("directions", self._none())
        self.register_buffer("variances", torch.ones(0))
        self.register_buffer("rest", torch.ones(()))

    @full_precision
    def fit(self, samples: Tensor, *, overwrite: bool = False) -> None:
        """Fit mean, directions and variances to samples, ``(n, ...)``.

        The mean variance of the rest is at least 1e-6. That suits values of about unit variance, such as standardised
        coordinates and the outputs of :class:`PositionWhitening`; others have to be scaled first.

        Args:
            samples: The samples; rotated copies of images count as samples, too.
            overwrite: Whether they may be overwritten, which saves a copy.

        Raises:
            ValueError: If there are fewer than two.
        """
        n = len(samples)
        if n < 2:
            msg = f"Whitening is fitted to at least 2 samples, got {n}."
            raise ValueError(msg)
        centre = samples.mean(0)
        centred = samples.sub_(centre) if overwrite else samples - centre
        blocks = self._blocks(centred).cpu()
        most = min(self.most, n // _POINTS_PER_DIRECTION)
        variances, directions = principal_directions(blocks, most + 1)
        # With all directions in which few samples vary, the rest would be rounding error only, and the distance of any
        # new sample unbounded.
        kept = max(0, min(most, len(directions) - (n <= blocks.shape[1])))
        variances, directions = variances[:kept].to(samples) * n / (n - 1), directions[:kept]
        # Norms per sample, then a sum in float64: on a CPU, a single sum of squares in float32 is too small by 2 % for
        # 100 million numbers, and by 6 % for 200 million.
        squares = torch.linalg.vector_norm(centred.flatten(1), dim=1).cpu().double().square()
        remainder = (squares.sum() / (n - 1)).to(samples) - variances.sum()
        others = centre.numel() - len(variances)
        # Without other dimensions the remainder is rounding error, and the variance of the rest has no effect.
        rest = (remainder / others if others else variances[-1]).clamp(min=1e-6)
        self.mean = centre.to(self.mean)
        self.rest = rest.to(self.mean)
        self.directions = directions.to(self.mean)
        self.variances = torch.maximum(variances, rest).to(self.mean)

    def join(self, fits: Sequence[tuple[Tensor, ...]]) -> None:
        """Hold several fits; those with fewer directions are padded with zero vectors, which have no effect."""
        most = max(len(directions) for _, directions, _, _ in fits)
        super().join(
            [
                (
                    mean,
                    torch.cat([directions, directions.new_zeros(most - len(directions), directions.shape[1])]),
                    torch.cat([variances, rest.expand(most - len(variances))]),
                    rest,
                )
                for mean, directions, variances, rest in fits
            ]
        )

    def forget(self) -> None:
        """Become the identity again."""
        self.mean = self.mean.new_zeros(self.shape)
        self.rest = self.rest.new_ones(())
        self.directions = self._none().to(self.directions)
        self.variances = self.variances.new_ones(0)

    @property
    def log_det(self) -> Tensor:
        """Log-determinant of the forward direction, the same for every sample, ``()``, or for each kind, ``(K,)``."""
        along = (self.variances / self.rest[..., None]).log().sum(-1)
        return -0.5 * (along + math.prod(self.shape) * self.rest.log())

    def transform(self, x: Tensor, rev: bool, kind: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whiten ``x``, ``(N, ...)``, or undo it, given the kind of each sample, ``(N,)``, if there are several."""
        log_det = self.log_det.expand(x.shape[0]) if kind is None else self.log_det[kind]
        return (self.by_kind(self._restored, x, kind), -log_det) if rev else (self.whitened(x, kind), log_det)

    def whitened(self, x: Tensor, kind: Tensor | None = None) -> Tensor:
        """Whiten ``x``, ``(N, ...)``, without the log-determinant, which is the same for all samples of a kind."""
        return self.by_kind(self._whitened, x, kind)

    def _whitened(self, x: Tensor, mean: Tensor, *covariance: Tensor) -> Tensor:
        return self._scaled(x - mean, -0.5, *covariance)

    def _restored(self, x: Tensor, mean: Tensor, *covariance: Tensor) -> Tensor:
        return self._scaled(x, 0.5, *covariance) + mean

    @full_precision
    def _scaled(self, x: Tensor, power: float, directions: Tensor, variances: Tensor, rest: Tensor) -> Tensor:
        """Multiply by a power of the covariance, one for all samples or one for each."""
        scale = rest**power
        if directions.shape[-2]:  # OpenVINO cannot multiply by an empty matrix
            stretch = variances**power / scale[..., None] - 1
            blocks = self._blocks(x)
            if directions.ndim == 2:
                added = ((blocks @ directions.T) * stretch) @ directions
            else:
                coordinates = (directions @ blocks[..., None])[..., 0] * stretch
                added = (coordinates[:, None] @ directions)[:, 0]
            x = self._added(x, added)
        return x * scale.reshape(-1, *[1] * len(self.shape))

    def _none(self) -> Tensor:
        """Return a matrix of no directions."""
        return torch.zeros(0, math.prod(self.shape) // self.block**2)

    def _blocks(self, x: Tensor) -> Tensor:
        """Return the coordinates of samples, ``(N, ...)``, along the unit vectors that are constant over one block."""
        if self.block > 1:
            x = functional.avg_pool2d(x, self.block) * self.block
        return x.flatten(1)

    def _added(self, x: Tensor, blocks: Tensor) -> Tensor:
        """Add to samples, ``(N, ...)``, what has the given coordinates along the unit vectors of :meth:`_blocks`."""
        if self.block == 1:
            return x + blocks.unflatten(1, self.shape)
        dims, height, width = self.shape
        rows, columns = height // self.block, width // self.block
        # Broadcasting and not an interpolation, which would leave single precision in OpenVINO.
        split = x.reshape(-1, dims, rows, self.block, columns, self.block)
        return (split + blocks.reshape(-1, dims, rows, 1, columns, 1) / self.block).reshape(-1, *self.shape)


class PositionMoments:
    """Number, mean and scatter of the vectors at each position of maps; those of some maps can be subtracted.

    Args:
        maps: ``(n, D, h, w)``.
        around: The vectors relative to which sums are computed, ``(h * w, D)``; by default the mean.
    """

    def __init__(self, maps: Tensor, around: Tensor | None = None) -> None:
        vectors = maps.flatten(2).permute(2, 0, 1)  # (h * w, n, D)
        self.count = vectors.shape[1]
        self.around = vectors.mean(1) if around is None else around
        self._sum, self._scatter = _sums(vectors, self.around)
        self._unsure = _ROUNDING * self._total + self.count * float((_ROUNDING * self.around).square().sum())

    def without(self, others: PositionMoments) -> PositionMoments:
        """Return the moments of all maps except others among them, which have the same :attr:`around`."""
        rest = copy(self)
        rest.count, rest._sum = self.count - others.count, self._sum - others._sum
        rest._scatter = self._scatter - others._scatter
        return rest

    @property
    def _total(self) -> float:
        """The trace of the scatter, summed over all positions."""
        return float(self._scatter.diagonal(dim1=1, dim2=2).sum() - self._sum.square().sum() / self.count)

    @property
    def vary(self) -> bool:
        """Whether the vectors differ by more than rounding error; ``False`` if a value is NaN or infinite."""
        return self._unsure < self._total < math.inf

    @property
    def mean(self) -> Tensor:
        """``(h * w, D)``, float64."""
        return self.around.to(self._sum.device) + self._sum / self.count

    @property
    def scatter(self) -> Tensor:
        """``(h * w, D, D)``, float64."""
        return torch.baddbmm(self._scatter, self._sum[:, :, None], self._sum[:, None], alpha=-1 / self.count)


def _sums(vectors: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum and scatter of vectors, ``(h * w, n, D)``, relative to others, ``(h * w, D)``; float64."""
    positions, _, dims = vectors.shape
    total = torch.empty(positions, dims, dtype=torch.float64, device=with_doubles(vectors.device))
    scatter = total.new_empty(positions, dims, dims)
    for some, centre, some_total, some_scatter in zip(
        *(part.split(_POSITIONS) for part in (vectors, around, total, scatter)), strict=True
    ):
        # In float64: where the moments of some maps are subtracted, the rest may be smaller than float32's error.
        centred = (some - centre[:, None]).to(total.device).double()
        some_total.copy_(centred.sum(1))
        torch.bmm(centred.mT, centred, out=some_scatter)
    return total, scatter


class PositionWhitening(ForEachKind, Layer):
    """Whiten each position of a map by a mean and a covariance of its own.

    With a standard normal for the output, it is the Gaussian at each position of Defard et al. (2021, "PaDiM", section
    3.2). With few images their covariances need a ridge; here the covariance at position p is shrunk towards
    W + B_p. W is the mean of all positions' covariances, as for classes in regularised discriminant analysis (Friedman
    1989, equation 18). B_p is the covariance that shifts would add: parts are not aligned to the pixel, so that what
    belongs at a nearby position q, with mean m_q, may appear at p. With the scatter S_p over n images of D channels::

        C_p = (S_p + a (W + B_p)) / (n - 1 + a) + e I,    a = max(D, 2 (n - 1)),    e = 1e-6 tr(W) / D
        w = L_p^-1 (x - m_p),    C_p = L_p L_p^T
        B_p = sum over q of k(q - p) (m_q - m_p) (m_q - m_p)^T

    with a Gaussian k of a standard deviation of one position, over all q of the map up to two rows and columns away,
    over which it sums to 1. The shared covariance has the weight a of at least D images, the fewest that determine a
    covariance, and of twice as many as a position's own. Rotated copies of images count as images, too: n is the number
    of maps. Before a fit it is the identity.

    Args:
        dims_in: One map shape, ``[(D, h, w)]``.
        dims_c: FrEIA's convention; none are supported.

    Raises:
        ValueError: If the input is no map, or there is a condition.
    """

    mean: Tensor
    """m, ``(h * w, D)``; a buffer, like the other."""
    factors: Tensor
    """L_p^-1, lower triangular, ``(h * w, D, D)``."""

    def __init__(self, dims_in: Iterable[tuple[int, ...]], dims_c: Iterable[tuple[int, ...]] | None = None) -> None:
        super().__init__(dims_in, dims_c)
        if len(self.shape) != 3:
            msg = f"PositionWhitening takes one map (D, h, w), got the shape {self.shape}."
            raise ValueError(msg)
        dims, height, width = self.shape
        self.of_kind = {"mean": 2, "factors": 3}
        self.register_buffer("mean", torch.zeros(height * width, dims))
        self.register_buffer("factors", torch.eye(dims).repeat(height * width, 1, 1))

    @full_precision
    def fit(self, samples: Tensor | PositionMoments) -> None:
        """Fit means and covariances.

        Args:
            samples: Maps of training images, ``(n, D, h, w)``, on the CPU if they are many; or their moments.

        Raises:
            ValueError: If there are fewer than two, they are all the same, or a value is NaN or infinite.
        """
        n, dims = samples.count if isinstance(samples, PositionMoments) else len(samples), self.shape[0]
        if n < 2:
            msg = f"A Gaussian for each position is fitted to at least 2 images, got {n}."
            raise ValueError(msg)
        moments = samples if isinstance(samples, PositionMoments) else PositionMoments(samples.to(self.mean.dtype))
        if not moments.vary:
            msg = (
                f"The maps of {n} training images hold NaN or infinite values, or are all the same: give more varied "
                "images."
            )
            raise ValueError(msg)
        covariances = moments.scatter  # a new tensor, which becomes the covariances in place
        shared = covariances.mean(0) / (n - 1)
        ridge = _RIDGE * shared.trace() / dims * torch.eye(dims).to(shared)
        weight, mean = max(dims, _SHARED * (n - 1)), moments.mean
        shifts = self._shifts(mean).contiguous()  # strided matrices would be multiplied one by one
        covariances.add_(weight * shared).baddbmm_(shifts, shifts.mT, alpha=weight).div_(n - 1 + weight).add_(ridge)
        # In NumPy: PyTorch's batched triangular solve takes a hundred times as long while another process uses one of
        # its cores, and its batched factorisations have hung on some CPUs.
        lower = np.linalg.cholesky(covariances.cpu().numpy())
        self.factors = torch.from_numpy(np.linalg.inv(lower)).tril().to(self.factors)
        self.mean = mean.to(self.mean)

    def _shifts(self, mean: Tensor) -> Tensor:
        """Return sqrt(k(q - p)) (m_q - m_p), ``(h * w, D, Q)`` for Q positions q around each p: a root of B_p."""
        dims, height, width = self.shape
        distances = torch.arange(-_FARTHEST, _FARTHEST + 1).to(mean)
        weights = (-0.5 * (distances / _SHIFT).square()).exp()
        neighbours = partial(functional.unfold, kernel_size=len(distances), padding=_FARTHEST)
        kernel = neighbours(mean.new_ones(1, 1, height, width))[0] * torch.outer(weights, weights).flatten()[:, None]
        neighbour_means = neighbours(mean.T.reshape(1, dims, height, width))[0].unflatten(0, (dims, -1))
        return ((neighbour_means - mean.T[:, None]) * (kernel / kernel.sum(0)).sqrt()).permute(2, 0, 1)

    def forget(self) -> None:
        """Become the identity again."""
        dims, height, width = self.shape
        self.mean = self.mean.new_zeros(height * width, dims)
        self.factors = torch.eye(dims).repeat(height * width, 1, 1).to(self.factors)

    @property
    def log_dets(self) -> Tensor:
        """Log-determinant of the forward direction at each position, ``(h, w)``, or for each kind, ``(K, h, w)``."""
        return self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1).unflatten(-1, self.shape[1:])

    def transform(self, x: Tensor, rev: bool, kind: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whiten maps, ``(N, D, h, w)``, or undo it; also return the log-determinant of this direction, ``(N,)``.

        If there are several kinds, ``kind`` is that of each map, ``(N,)``.
        """
        log_det = self.log_dets.sum((-2, -1))
        log_det = log_det.expand(x.shape[0]) if kind is None else log_det[kind]
        return (self.by_kind(self._restored, x, kind), -log_det) if rev else (self.whitened(x, kind), log_det)

    def whitened(self, x: Tensor, kind: Tensor | None = None) -> Tensor:
        """Whiten maps, ``(N, D, h, w)``, without the log-determinant, which is the same for all maps of a kind."""
        return self.by_kind(self._whitened, x, kind)

    @full_precision
    def _whitened(self, x: Tensor, mean: Tensor, factors: Tensor) -> Tensor:
        if factors.ndim > 3:  # an exported graph has the factors of each map
            vectors = x.flatten(2).mT - mean  # (N, h * w, D)
            return (factors @ vectors[..., None])[..., 0].mT.unflatten(2, self.shape[1:])
        # Contiguous vectors: PyTorch multiplies others in a loop, five times as slowly.
        vectors = x.flatten(2).permute(2, 0, 1).contiguous() - mean[:, None]  # (h * w, N, D)
        return (factors @ vectors.mT).permute(2, 1, 0).unflatten(2, self.shape[1:])

    @full_precision
    def _restored(self, z: Tensor, mean: Tensor, factors: Tensor) -> Tensor:
        vectors = z.flatten(2).permute(2, 1, 0)
        x = torch.linalg.solve_triangular(factors, vectors, upper=False)
        return x.permute(2, 1, 0).unflatten(2, self.shape[1:]) + mean.T.reshape(self.shape)
