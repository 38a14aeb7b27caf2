# SPDX-License-Identifier: Apache-2.0
"""Rows of splits: limits, validation images held out, classes mixed evenly."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np


def _slug(text: str) -> str:
    """Text as part of a folder's name: ``T-shirt/top`` has a slash."""
    return re.sub(r"[^\w.-]+", "_", text)


def _limited(rows: np.ndarray, limit: int | None, seed: int | None) -> np.ndarray:
    """At most ``limit`` of ``rows``, ascending; the choice for a smaller limit is part of that for a larger one."""
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[:limit])


def _mixed(sources: Sequence[str] | np.ndarray) -> np.ndarray:
    """An order of N positions in which the sources are spread evenly."""
    names, code, counts = np.unique(np.asarray(sources, dtype=str), return_inverse=True, return_counts=True)
    place = np.empty(len(code))
    for number in range(len(names)):
        place[code == number] = (np.arange(counts[number]) + 0.5) / counts[number]
    return np.argsort(place, kind="stable")
