# SPDX-License-Identifier: Apache-2.0
"""Points that are far from one another, PatchCore's coreset (Roth et al. 2022, section 3.2), quickly.

The next point is always the one that is farthest from those that were taken (Gonzalez 1985). Most of the time would
pass with reading all of them from memory, for each that is taken. Distances to what was taken only ever shrink: of the
points that are farthest at some moment one can be taken after the other, for as long as it is farther than any point
beside them was at that moment. Only then all points are looked at again, once for all that were taken since. anomalib's
``KCenterGreedy`` takes the same points of the same start, looks at all for each, and starts and projects by the global
random state, so that a fit would depend on the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomalib_flowood.flows import full_precision

DISTANCES = 2**25
"""Distances at a time."""

AT_ONCE = 8192
"""Farthest points among which points are taken."""


@full_precision
def farthest_first(points: Tensor, count: int, start: int, at_once: int = AT_ONCE) -> list[int]:
    """Take points, each the farthest from those before it.

    Args:
        points: ``(N, D)``.
        count: How many to take.
        start: Index of the first.
        at_once: Points among which are taken what is farthest, before all are looked at again.

    Returns:
        Their indices, in order.
    """
    squares = points.square().sum(1)
    nearest = torch.full_like(squares, torch.inf)
    taken, fresh = [start], [start]
    while len(taken) < count:
        step = max(1, DISTANCES // len(fresh))
        for first in range(0, len(points), step):
            some = slice(first, first + step)
            to_fresh = _squared(points[some], squares[some], points[fresh], squares[fresh])
            nearest[some] = torch.minimum(nearest[some], to_fresh.amin(1))
        nearest[taken] = 0.0
        values, places = nearest.topk(min(at_once + 1, len(points)))
        beyond = float(values[-1]) if len(points) > at_once else -1.0
        values, places = values[:at_once].clone(), places[:at_once]
        block, lengths = points[places], squares[places]
        fresh = []
        while len(taken) < count:
            best = int(values.argmax())
            if fresh and float(values[best]) < beyond:
                break
            fresh.append(int(places[best]))
            taken.append(fresh[-1])
            to_it = _squared(block, lengths, block[best : best + 1], lengths[best : best + 1])
            values = torch.minimum(values, to_it[:, 0])
            values[best] = 0.0
    return taken


def _squared(points: Tensor, squares: Tensor, others: Tensor, other_squares: Tensor) -> Tensor:
    """Squared distances, ``(N, M)``."""
    return (squares[:, None] - 2 * (points @ others.T) + other_squares).clamp(min=0)
