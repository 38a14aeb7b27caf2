# SPDX-License-Identifier: Apache-2.0
"""Which images go into which split, and in what order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from anomalib_flowood import conformal

MOST_IMAGES = 2**40
"""Where the search for a number of images that would do ends."""

_SHARE = 0.1
"""Of the normal images, held out for validation where there are many."""

_LARGEST_SHARE = 0.25
"""The most of them that go into what the default level of labels takes: see docs/decisions.md."""


def held_out(images: int, ratio: float | None) -> int:
    """Return how many normal images are held out for validation.

    Args:
        images: Number of normal images, two at least.
        ratio: Share to hold out; ``None`` for a tenth, and where these are fewer than the default level of labels
            takes (20), for so many, but at most a quarter.

    Returns:
        At least one, and so few that one is left; never fewer of more images.
    """
    if ratio is None:
        enough = conformal.images_needed(conformal.DEFAULT_ALPHA)
        wanted = max(round(_SHARE * images), min(enough, int(_LARGEST_SHARE * images)))
    else:
        wanted = round(ratio * images)
    return min(max(1, wanted), images - 1)


def needed_for(validation: int, ratio: float | None, images: int) -> int:
    """Return how many normal images it takes, these at least, of which so many are :func:`held_out`."""
    return images + bisect_left(range(images, MOST_IMAGES), validation, key=lambda number: held_out(number, ratio))


def limited(rows: np.ndarray, limit: int | None, seed: int | None) -> np.ndarray:
    """Draw at most ``limit`` of ``rows``, ascending; the draw of a smaller limit is part of that of a larger one."""
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[:limit])


def train_and_val(
    rows: np.ndarray, limit: int | None, val_ratio: float | None, seed: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide normal images into those to train on and those to validate on.

    Validation images come from a part of ``rows`` that does not depend on ``limit``: those of one limit are never
    trained on with another.

    Args:
        rows: Positions of shape ``(N,)``, two at least.
        limit: The most to take, two at least; ``None`` for all.
        val_ratio: Share of them that is held out for validation, or ``None``: see :func:`held_out`.
        seed: Seed of the division.

    Returns:
        Positions to train on and to validate on, ascending.
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    order = np.random.default_rng(seed).permutation(rows)
    val = np.sort(order[: held_out(count, val_ratio)])
    return np.sort(order[held_out(len(rows), val_ratio) :][: count - len(val)]), val


def mixed(sources: Sequence[str] | np.ndarray) -> np.ndarray:
    """Order images, by the names of their sources, ``(N,)``, so that these are spread evenly; return N positions."""
    names, code, counts = np.unique(np.asarray(sources, dtype=str), return_inverse=True, return_counts=True)
    place = np.empty(len(code))
    for number in range(len(names)):
        place[code == number] = (np.arange(counts[number]) + 0.5) / counts[number]
    return np.argsort(place, kind="stable")
