# SPDX-License-Identifier: Apache-2.0
"""A fast form of PatchCore's coreset (Roth et al. 2022, section 3.2): points that are far from one another.

The next point is always the one that is farthest from those taken so far (Gonzalez 1985). Reading all points from
memory for each one that is taken would take most of the time. But distances to the taken points only shrink. So points
can be taken from the set of those that were farthest at some moment, as long as the next one is farther than any point
outside of the set was at that moment. Only then are all points read again, once for all that were taken since.
anomalib's ``KCenterGreedy`` takes the same points from the same start, but reads all points for each one, and starts
and projects by the global random state, so that a fit would depend on the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomalib_flowood.flows import full_precision

DISTANCES = 2**25
"""Distances in memory at a time."""

AT_ONCE = 8192
"""Size of the set of farthest points from which points are taken."""


@full_precision
def farthest_first(points: Tensor, count: int, start: int, at_once: int = AT_ONCE) -> list[int]:
    """Take points, each the farthest from those before it.

    Args:
        points: ``(N, D)``.
        count: Number of points to take.
        start: Index of the first one.
        at_once: Size of the set of farthest points from which points are taken before all are read again.

    Returns:
        Their indices, in order.
    """
    squares = points.square().sum(1)
    nearest = torch.full_like(squares, torch.inf)
    taken, new = [start], [start]
    while len(taken) < count:
        step = max(1, DISTANCES // len(new))
        for first in range(0, len(points), step):
            some = slice(first, first + step)
            to_new = _squared(points[some], squares[some], points[new], squares[new])
            nearest[some] = torch.minimum(nearest[some], to_new.amin(1))
        # Not nearest[taken] = 0.0, of which PyTorch 2.15 makes an index that no subclass of Tensor sees.
        nearest.index_fill_(0, torch.tensor(taken, device=points.device), 0.0)
        distances, indices = nearest.topk(min(at_once + 1, len(points)))
        farthest_outside = float(distances[-1]) if len(points) > at_once else -1.0
        distances, indices = distances[:at_once].clone(), indices[:at_once]
        candidates, candidate_squares = points[indices], squares[indices]
        new = []
        while len(taken) < count:
            best = int(distances.argmax())
            if new and float(distances[best]) < farthest_outside:
                break
            new.append(int(indices[best]))
            taken.append(new[-1])
            own = slice(best, best + 1)
            to_best = _squared(candidates, candidate_squares, candidates[own], candidate_squares[own])
            distances = torch.minimum(distances, to_best[:, 0])
            distances[best] = 0.0
    return taken


def _squared(points: Tensor, squares: Tensor, others: Tensor, other_squares: Tensor) -> Tensor:
    """Squared distances, ``(N, M)``."""
    return (squares[:, None] - 2 * (points @ others.T) + other_squares).clamp(min=0)
