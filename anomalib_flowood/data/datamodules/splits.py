# SPDX-License-Identifier: Apache-2.0
"""Which images go into which split, and in what order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def limited(rows: np.ndarray, limit: int | None, seed: int | None) -> np.ndarray:
    """Draw at most ``limit`` of ``rows``, ascending; the choice for a smaller limit is part of that for a larger one.

    Args:
        rows: Positions of shape ``(N,)``.
        limit: The most to draw; ``None`` for all.
        seed: Seed of the draw.
    """
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[:limit])


def train_and_val(
    rows: np.ndarray, limit: int | None, val_ratio: float, seed: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide normal images into those to train on and those to validate on.

    Validation images come from a part of ``rows`` that does not depend on ``limit``: those of one limit are never
    trained on with another.

    Args:
        rows: Positions of shape ``(N,)``, two at least.
        limit: The most to take, two at least; ``None`` for all.
        val_ratio: Share of them that is held out for validation: one image at least, and one is left.
        seed: Seed of the division.

    Returns:
        Positions to train on and to validate on, ascending.
    """

    def held_out(number: int) -> int:
        return min(max(1, round(val_ratio * number)), number - 1)

    count = len(rows) if limit is None else min(limit, len(rows))
    order = np.random.default_rng(seed).permutation(rows)
    val = np.sort(order[: held_out(count)])
    return np.sort(order[held_out(len(rows)) :][: count - len(val)]), val


def mixed(sources: Sequence[str] | np.ndarray) -> np.ndarray:
    """Find an order in which the sources are spread evenly.

    Args:
        sources: Name of each image's source, of shape ``(N,)``.

    Returns:
        The N positions in that order.
    """
    names, code, counts = np.unique(np.asarray(sources, dtype=str), return_inverse=True, return_counts=True)
    place = np.empty(len(code))
    for number in range(len(names)):
        place[code == number] = (np.arange(counts[number]) + 0.5) / counts[number]
    return np.argsort(place, kind="stable")
