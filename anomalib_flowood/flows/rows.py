# SPDX-License-Identifier: Apache-2.0
"""Rows of numbers that need not be in memory all at once, and moments that one pass over them yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .fitted import directions_of, principal_directions

AT_ONCE = 512
"""Rows that are in memory at a time."""

_SHUFFLED = 2**24
"""Most indices that are shuffled in order to draw some of them: 128 MiB."""


class Rows(Protocol):
    """The part of a tensor's interface that a fit needs: rows, read some at a time."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """Return some rows."""
        ...


class Computed:
    """Rows that are computed from others when they are read.

    Args:
        compute: Turns rows of all ``sources`` into as many computed rows.
        sources: What the rows are computed from, all of the same length.
    """

    def __init__(self, compute: Callable[[tuple[Tensor, ...]], Tensor], sources: Sequence[Rows]) -> None:
        self.compute, self.sources = compute, sources

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sources[0])

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """Compute some rows."""
        return self.compute(tuple(source[index] for source in self.sources))


def in_turn(rows: Rows, size: int = AT_ONCE) -> Iterator[Tensor]:
    """Yield all rows in order, ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def take(rows: Rows, index: Tensor) -> Tensor:
    """Return the rows at the given indices, ``(m,)``, read :data:`AT_ONCE` at a time."""
    return torch.cat([rows[part] for part in index.split(AT_ONCE)])


def draw(count: int, most: int) -> Tensor:
    """Draw at most ``most`` of the numbers below ``count``, without replacement and always the same ones; sorted.

    If ``count`` is above 16 million, numbers that are drawn twice are dropped, so that a few in a thousand are missing.
    """
    if count <= most:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    if count <= _SHUFFLED:
        return torch.randperm(count, generator=generator)[:most].sort().values
    return torch.randint(count, (most,), generator=generator).unique()


class Moments:
    """Number, mean and scatter of points that are added some at a time, ``(n, D)``; float64, on the CPU.

    As long as there are no more points than dimensions, the points themselves are kept, which takes less memory.

    Args:
        points: The first points.
    """

    def __init__(self, points: Tensor | None = None) -> None:
        self.count = 0
        self._kept: list[Tensor] = []
        self._scatter: Tensor | None = None
        if points is not None:
            self.add(points)

    def add(self, points: Tensor) -> None:
        """Add points, ``(n, D)``."""
        if not len(points):
            return
        points = points.cpu().double()
        self.count += len(points)
        if self._scatter is None:
            self._kept.append(points)
            if self.count <= points.shape[1]:
                return
            points = torch.cat(self._kept)
            self._kept.clear()
            # Relative to the mean of the first points: squares of a mean far from 0 would swamp the variances.
            self._shift, self._sum = points.mean(0), points.new_zeros(points.shape[1])
            self._scatter = points.new_zeros(points.shape[1], points.shape[1])
        centred = points - self._shift
        self._sum += centred.sum(0)
        self._scatter.addmm_(centred.T, centred)

    @property
    def mean(self) -> Tensor:
        """Mean, ``(D,)``."""
        return torch.cat(self._kept).mean(0) if self._scatter is None else self._shift + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance with the divisor n, ``(D, D)``."""
        if self._scatter is None:
            centred = torch.cat(self._kept) - self.mean
            return centred.T @ centred / self.count
        offset = self._sum / self.count
        return self._scatter / self.count - offset[:, None] * offset

    @property
    def variances(self) -> Tensor:
        """Variance along each dimension with the divisor n, ``(D,)``."""
        if self._scatter is None:
            return torch.cat(self._kept).var(0, correction=0)
        return self._scatter.diagonal() / self.count - (self._sum / self.count).square()

    def principal_directions(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """See :func:`~anomalib_flowood.flows.fitted.principal_directions`; of the points minus their mean."""
        if self._scatter is None:
            return principal_directions(torch.cat(self._kept) - self.mean, most)
        return directions_of(self.covariance, most)
