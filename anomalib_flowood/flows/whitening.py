# SPDX-License-Identifier: Apache-2.0
"""Gaussians as invertible layers: of whole samples, and of each position of a map."""

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
"""With fewer points for each direction, whitening would learn them by heart."""

_POSITIONS = 64
"""Positions whose covariances are computed at once, for which their vectors are copied."""

_SHIFT = 1.0
"""Standard deviation of the shift of a part from image to image that covariances allow for, positions."""

_FARTHEST = 2
"""Rows and columns to the farthest position that a shift leads to, beyond which few do."""

_SHARED = 2
"""Images that what all positions share counts as, for each of the images that are fitted to."""

_RIDGE = 1e-6
"""Of the mean variance, added to every variance: a number that is constant stays invertible."""

_ROUNDING = 1e-6
"""What float32 may lose of a sum, and of a mean."""


class Whitening(ForEachKind, Layer):
    """Remove what varies from sample to sample as a whole, and keep the shape: a vector stays a vector, a map a map.

    With the leading principal directions W over the training samples (k of them, variances u), the mean variance r of
    the rest and the mean m::

        w = (x - m) / sqrt(r) + W (1 / sqrt(u) - 1 / sqrt(r)) W^T (x - m)

    is symmetric and invertible. With a standard normal for w it is the Gaussian of probabilistic PCA (Tipping and
    Bishop 1999, section 3). Before a fit it is the identity.

    Where samples are maps, directions can be held constant over square blocks of positions: what varies as a whole is
    coarse, and W has fewer numbers.

    Args:
        dims_in: One shape, of any rank.
        directions: The most directions k that a fit takes; one for two samples at most, and no more than there
            are numbers; of no more samples than numbers fewer than those in which they vary.
        dims_c: FrEIA's convention; none are supported.
        block: Rows and columns of a block.

    Raises:
        ValueError: If there is more than one input, a condition, k is negative, or the input is not made of blocks.
    """

    mean: Tensor
    """m, of the shape of a sample; a buffer, as the others."""
    directions: Tensor
    """W^T, ``(k, ...)`` with a row for each, of length 1, a number for each block; k is known after a fit."""
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

        The mean variance of the rest is 1e-6 at least. That is for numbers of about variance 1, as standardised
        coordinates and what :class:`PositionWhitening` leaves have: others have to be scaled before.

        Args:
            samples: The samples; each counts as one of n, turned copies of others, too.
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
        # With all in which few samples vary, the rest would be rounding alone, and anything new without bound.
        kept = max(0, min(most, len(directions) - (n <= blocks.shape[1])))
        variances, directions = variances[:kept].to(samples) * n / (n - 1), directions[:kept]
        # Of each sample, and then in float64: a single sum of squares in float32 is too small on a CPU, of 100 million
        # numbers by 2 %, of 200 million by 6 %.
        squares = torch.linalg.vector_norm(centred.flatten(1), dim=1).cpu().double().square()
        left, others = (squares.sum() / (n - 1)).to(samples) - variances.sum(), centre.numel() - len(variances)
        # Where there are no others, what is left is rounding alone, and their variance counts for nothing.
        rest = (left / others if others else variances[-1]).clamp(min=1e-6)
        self.mean = centre.to(self.mean)
        self.rest = rest.to(self.mean)
        self.directions = directions.to(self.mean)
        self.variances = torch.maximum(variances, rest).to(self.mean)

    def join(self, fits: Sequence[tuple[Tensor, ...]]) -> None:
        """Hold several fits; those with fewer directions get further ones, of length 0, which change nothing."""
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
        """Be the identity again."""
        self.mean = self.mean.new_zeros(self.shape)
        self.rest = self.rest.new_ones(())
        self.directions = self._none().to(self.directions)
        self.variances = self.variances.new_ones(0)

    @property
    def log_det(self) -> Tensor:
        """Log-determinant of the forward direction, the same for every sample, ``()``; or of each kind, ``(K,)``."""
        along = (self.variances / self.rest[..., None]).log().sum(-1)
        return -0.5 * (along + math.prod(self.shape) * self.rest.log())

    def transform(self, x: Tensor, rev: bool, kind: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whiten ``x``, or undo it; where there are kinds, that of each sample is given, ``(N,)``."""
        log_det = self.log_det.expand(x.shape[0]) if kind is None else self.log_det[kind]
        return (self.by_kind(self._restored, x, kind), -log_det) if rev else (self.whitened(x, kind), log_det)

    def whitened(self, x: Tensor, kind: Tensor | None = None) -> Tensor:
        """Whiten ``x``, ``(N, ...)``, and leave out the log-determinant, which is the same for all of a kind."""
        return self.by_kind(self._whitened, x, kind)

    def _whitened(self, x: Tensor, mean: Tensor, *covariance: Tensor) -> Tensor:
        return self._scaled(x - mean, -0.5, *covariance)

    def _restored(self, x: Tensor, mean: Tensor, *covariance: Tensor) -> Tensor:
        return self._scaled(x, 0.5, *covariance) + mean

    @full_precision
    def _scaled(self, x: Tensor, power: float, directions: Tensor, variances: Tensor, rest: Tensor) -> Tensor:
        """Multiply with the covariance, one for all or one for each, to some power."""
        scale = rest**power
        if directions.shape[-2]:  # OpenVINO multiplies with no empty matrix
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
        """No direction: the product with it is that of nothing."""
        return torch.zeros(0, math.prod(self.shape) // self.block**2)

    def _blocks(self, x: Tensor) -> Tensor:
        """Coordinates of samples, ``(N, ...)``, along what is constant over each block, and 0 elsewhere; length 1."""
        if self.block > 1:
            x = functional.avg_pool2d(x, self.block) * self.block
        return x.flatten(1)

    def _added(self, x: Tensor, blocks: Tensor) -> Tensor:
        """Samples, ``(N, ...)``, plus those that have these coordinates, and none that :meth:`_blocks` leaves out."""
        if self.block == 1:
            return x + blocks.unflatten(1, self.shape)
        dims, height, width = self.shape
        rows, columns = height // self.block, width // self.block
        # By shapes alone: an interpolation would leave single precision in OpenVINO.
        apart = x.reshape(-1, dims, rows, self.block, columns, self.block)
        return (apart + blocks.reshape(-1, dims, rows, 1, columns, 1) / self.block).reshape(-1, *self.shape)


class PositionMoments:
    """Number, mean and scatter of the vectors at each position of maps, as those of all maps but some, too.

    Args:
        maps: ``(n, D, h, w)``.
        around: What the sums are taken around, ``(h * w, D)``; by default the mean.
    """

    def __init__(self, maps: Tensor, around: Tensor | None = None) -> None:
        vectors = maps.flatten(2).permute(2, 0, 1)  # (h * w, n, D)
        self.count = vectors.shape[1]
        self.around = vectors.mean(1) if around is None else around
        self._sum, self._scatter = _sums(vectors, self.around)
        self._unsure = _ROUNDING * self._total + self.count * float((_ROUNDING * self.around).square().sum())

    def without(self, others: PositionMoments) -> PositionMoments:
        """Return those of all maps but some, whose sums were taken around the same."""
        rest = copy(self)
        rest.count, rest._sum = self.count - others.count, self._sum - others._sum
        rest._scatter = self._scatter - others._scatter
        return rest

    @property
    def _total(self) -> float:
        """The scatter of all numbers at all positions."""
        return float(self._scatter.diagonal(dim1=1, dim2=2).sum() - self._sum.square().sum() / self.count)

    @property
    def vary(self) -> bool:
        """Whether the vectors differ by more than rounding; not where a value is NaN or infinite."""
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
    """Sum and scatter of vectors, ``(h * w, n, D)``, around others, ``(h * w, D)``; float64."""
    positions, _, dims = vectors.shape
    total = torch.empty(positions, dims, dtype=torch.float64, device=with_doubles(vectors.device))
    scatter = total.new_empty(positions, dims, dims)
    for some, centre, some_total, some_scatter in zip(
        *(part.split(_POSITIONS) for part in (vectors, around, total, scatter)), strict=True
    ):
        # In float64: where a few are taken off few, less may be left than float32 loses of a sum.
        centred = (some - centre[:, None]).to(total.device).double()
        some_total.copy_(centred.sum(1))
        torch.bmm(centred.mT, centred, out=some_scatter)
    return total, scatter


class PositionWhitening(ForEachKind, Layer):
    """Whiten each position of a map by a mean and a covariance of its own: what belongs there becomes standard normal.

    With a standard normal for what comes out, it is the Gaussian for each position of Defard et al. (2021, "PaDiM",
    section 3.2). Their covariances of few images need a ridge; here each is shrunk towards the mean W of all positions'
    covariances, as classes are in regularised discriminant analysis (Friedman 1989, equation 18), plus the covariance
    B_p that a shift would add: a part does not lie to the pixel, and what belongs to a position q around, of mean m_q,
    may come to lie at p. With the scatter S_p over n images, D numbers at each::

        C_p = (S_p + a (W + B_p)) / (n - 1 + a) + e I,    a = max(D, 2 (n - 1)),    e = 1e-6 tr(W) / D
        w = L_p^-1 (x - m_p),    C_p = L_p L_p^T
        B_p = sum over q of k(q - p) (m_q - m_p) (m_q - m_p)^T

    with a Gaussian k of one position, over q up to two rows and columns away and within the map, where its sum is 1.
    What is shared counts as D images at least, the fewest that determine a covariance, and twice as much as a
    position's own. Turned copies of an image, where they are fitted to, count as images, too: n is the number of maps.
    Before a fit it is the identity.

    Args:
        dims_in: One map shape, ``[(D, h, w)]``.
        dims_c: FrEIA's convention; none are supported.

    Raises:
        ValueError: If the input is no map, or there is a condition.
    """

    mean: Tensor
    """m, ``(h * w, D)``; a buffer, as the other."""
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
            samples: Maps of training images, ``(n, D, h, w)``, in main memory, if they are many; or their moments.

        Raises:
            ValueError: If there are fewer than two, they are all the same, or a value is NaN or infinite.
        """
        n, dims = samples.count if isinstance(samples, PositionMoments) else len(samples), self.shape[0]
        if n < 2:
            msg = f"A Gaussian for each position is fitted to at least 2 images, got {n}."
            raise ValueError(msg)
        known = samples if isinstance(samples, PositionMoments) else PositionMoments(samples.to(self.mean.dtype))
        if not known.vary:
            msg = (
                f"The maps of {n} training images hold NaN or infinite values, or are all the same: give more varied "
                "images."
            )
            raise ValueError(msg)
        covariances = known.scatter
        shared = covariances.mean(0) / (n - 1)
        ridge = _RIDGE * shared.trace() / dims * torch.eye(dims).to(shared)
        count, mean = max(dims, _SHARED * (n - 1)), known.mean
        steps = self._steps(mean)
        covariances.add_(count * shared).baddbmm_(steps, steps.mT, alpha=count).div_(n - 1 + count).add_(ridge)
        # In NumPy, matrix after matrix: PyTorch's batched factorisations have hung on some CPUs.
        lower = torch.from_numpy(np.linalg.cholesky(covariances.cpu().numpy()))
        one = torch.eye(dims, dtype=torch.float64).expand_as(lower)
        self.factors = torch.linalg.solve_triangular(lower, one, upper=False).tril().to(self.factors)
        self.mean = mean.to(self.mean)

    def _steps(self, mean: Tensor) -> Tensor:
        """Differences of means, ``(h * w, D)``, from those around, times the root of k: ``(h * w, D, around)``."""
        dims, height, width = self.shape
        distances = torch.arange(-_FARTHEST, _FARTHEST + 1).to(mean)
        weights = (-0.5 * (distances / _SHIFT).square()).exp()
        around = partial(functional.unfold, kernel_size=len(distances), padding=_FARTHEST)
        inside = around(mean.new_ones(1, 1, height, width))[0] * torch.outer(weights, weights).flatten()[:, None]
        of_others = around(mean.T.reshape(1, dims, height, width))[0].unflatten(0, (dims, -1))
        return ((of_others - mean.T[:, None]) * (inside / inside.sum(0)).sqrt()).permute(2, 0, 1)

    def forget(self) -> None:
        """Be the identity again."""
        dims, height, width = self.shape
        self.mean = self.mean.new_zeros(height * width, dims)
        self.factors = torch.eye(dims).repeat(height * width, 1, 1).to(self.factors)

    @property
    def log_dets(self) -> Tensor:
        """Log-determinant of the forward direction at each position, ``(h, w)``, or of each kind, ``(K, h, w)``."""
        return self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1).unflatten(-1, self.shape[1:])

    def transform(self, x: Tensor, rev: bool, kind: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whiten maps, ``(N, D, h, w)``, or undo it; also return the log-determinant of this direction, ``(N,)``.

        Where there are kinds, that of each map is given, ``(N,)``.
        """
        log_det = self.log_dets.sum((-2, -1))
        log_det = log_det.expand(x.shape[0]) if kind is None else log_det[kind]
        return (self.by_kind(self._restored, x, kind), -log_det) if rev else (self.whitened(x, kind), log_det)

    def whitened(self, x: Tensor, kind: Tensor | None = None) -> Tensor:
        """Whiten maps, ``(N, D, h, w)``, and leave out the log-determinant, which is the same for all of a kind."""
        return self.by_kind(self._whitened, x, kind)

    @full_precision
    def _whitened(self, x: Tensor, mean: Tensor, factors: Tensor) -> Tensor:
        if factors.ndim > 3:  # those of each map
            vectors = x.flatten(2).mT - mean  # (N, h * w, D)
            return (factors @ vectors[..., None])[..., 0].mT.unflatten(2, self.shape[1:])
        # Vectors that lie in memory one after the other: PyTorch multiplies others by a loop, five times as slow.
        vectors = x.flatten(2).permute(2, 0, 1).contiguous() - mean[:, None]  # (h * w, N, D)
        return (factors @ vectors.mT).permute(2, 1, 0).unflatten(2, self.shape[1:])

    @full_precision
    def _restored(self, z: Tensor, mean: Tensor, factors: Tensor) -> Tensor:
        vectors = z.flatten(2).permute(2, 1, 0)
        x = torch.linalg.solve_triangular(factors, vectors, upper=False)
        return x.permute(2, 1, 0).unflatten(2, self.shape[1:]) + mean.T.reshape(self.shape)
