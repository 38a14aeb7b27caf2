# SPDX-License-Identifier: Apache-2.0
"""Pixels of large maps, counted in bins, whose memory does not grow with the number of images.

Small maps are kept, so that their metrics are exact. A photograph of 48 million pixels would take 0.2 GiB in each
metric until the end of a test, and several times as much then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

logger = logging.getLogger(__name__)

MOST_KEPT = 512 * 512
"""The most pixels of a map that is kept."""
_BITS = 22
BINS = 2**_BITS
"""Number of bins: one for each pattern of a float32's leading 22 bits (sign, exponent and 13 bits of mantissa). Values
in a bin differ by less than 1 / 8,192 of their size."""

_AT_ONCE = 2**20
"""Pixels that are sorted into bins at a time."""


def are_large(maps: Tensor) -> bool:
    """Whether the pixels of maps, ``(N, 1, H, W)`` or ``(N, H, W)``, are counted, and not kept; N may be 0."""
    return math.prod(maps.shape[1:]) > MOST_KEPT


def bins_of(values: Tensor) -> Tensor:
    """Return the bin of each value, int64; bins ascend as the values do."""
    bits = (values.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    # Negative numbers descend as their bit patterns ascend.
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - _BITS)).long() + BINS // 2


def no_counts(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return counts of zero, ``(2 * BINS,)``, on the device of a tensor if that is CUDA's, else on the CPU.

    Other devices lack float64 and other things that counting takes.
    """
    return torch.zeros(2 * BINS, dtype=dtype, device=like.device if like.is_cuda else "cpu")


def count(counts: Tensor, values: Tensor, labels: Tensor) -> None:
    """Count pixels.

    Args:
        counts: The number of pixels in each bin, those with label 0 first, ``(2 * BINS,)``, int64; it is updated.
        values: Of any shape, without NaN.
        labels: 0 or 1 for each of them.
    """
    for some, of_some in _parts(counts, values, labels):
        counts.scatter_add_(0, bins_of(some) + BINS * of_some, torch.ones_like(of_some))


def regions_of(masks: np.ndarray) -> Tensor:
    """Number the regions of masks, ``(N, h, w)``, from 1 on across all masks: int32, 0 where nothing is anomalous.

    A region is connected, corners included, and within one mask.
    """
    neighbours = np.zeros((3, 3, 3))
    neighbours[1] = 1
    return torch.from_numpy(ndimage.label(masks != 0, neighbours)[0])


def count_overlap(counts: Tensor, maps: Tensor, masks: Tensor) -> int:
    """Count normal pixels, and add up how much of its region each anomalous pixel is.

    Args:
        counts: The number of normal pixels in each bin, then the sum of the shares of regions in each bin,
            ``(2 * BINS,)``, float64; it is updated.
        maps: ``(N, 1, H, W)`` or ``(N, H, W)``, without NaN.
        masks: Ground truth, ``(N, H, W)``; what is not 0 is anomalous. A region is connected, corners included.

    Returns:
        The number of regions.
    """
    normal, shares = counts.view(2, BINS)
    for some, of_some in _parts(counts, maps, masks):
        normal.scatter_add_(0, bins_of(some), (1 - of_some).to(normal))
    regions = 0
    for one, mask in zip(maps.reshape(masks.shape), masks.bool(), strict=True):
        rows, columns = (mask.any(side).nonzero().flatten() for side in (1, 0))
        if not len(rows):
            continue
        box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        labels, found = ndimage.label(mask[box].cpu().numpy(), np.ones((3, 3)))
        labels = labels[labels > 0] - 1
        of_pixels = torch.from_numpy(1 / np.bincount(labels))[torch.from_numpy(labels)]
        shares.scatter_add_(0, bins_of(one[box][mask[box]].to(counts.device)), of_pixels.to(shares))
        regions += found
    return regions


def occupied(counts: Tensor) -> np.ndarray:
    """Add up the counts of several processes, and drop empty bins.

    Args:
        counts: Those of n processes, one after the other, ``(n * 2 * BINS,)``.

    Returns:
        ``(2, m)``, float64.
    """
    sides = counts.view(-1, 2, BINS).cpu().numpy()
    whole = sides[0] if len(sides) == 1 else sides.sum(0)
    return whole[:, whole.any(0)].astype(float)


def auroc_of(counts: np.ndarray) -> tuple[float, float]:
    """Area under the ROC curve of counts, ``(2, m)``, and the most that it is off by; NaN with one class only.

    Pairs in the same bin count one half each, as ties do.
    """
    inner, outer = counts
    pairs = inner.sum() * outer.sum()
    if not pairs:
        return math.nan, 0.0
    half = 0.5 * inner
    below = np.cumsum(inner) - half
    return float((outer * below).sum() / pairs), float((outer * half).sum() / pairs)


def aupro_of(counts: np.ndarray, regions: float, limit: float) -> tuple[float, float]:
    """Area under the per-region overlap up to a false positive rate, and the most that it is off by.

    Args:
        counts: Those of :func:`count_overlap`, ``(2, m)``.
        regions: The number of regions.
        limit: The false positive rate; the area is divided by it.

    Returns:
        Both; NaN without normal pixels or without regions. The curve is linear between bins, as it is between scores.
    """
    normal, shares = (side[::-1] for side in counts)
    if not normal.sum() or not regions:
        return math.nan, 0.0
    rates = np.concatenate([[0], np.cumsum(normal) / normal.sum()])
    overlap = np.concatenate([[0], np.cumsum(shares) / regions])
    last = int(np.searchsorted(rates, limit, side="right"))  # the first beyond it
    if last < len(rates):
        at_limit = np.interp(limit, rates[last - 1 : last + 1], overlap[last - 1 : last + 1])
        cut_rates, cut = np.append(rates[:last], limit), np.append(overlap[:last], at_limit)
        beyond = (limit - rates[last - 1]) * (overlap[last] - overlap[last - 1])
    else:
        cut_rates, cut, beyond = rates, overlap, 0.0
    steps = np.diff(cut_rates)
    error = 0.5 * float((steps * np.diff(cut)).sum()) + float(beyond)
    area = float((steps * (cut[1:] + cut[:-1])).sum()) / 2
    return area / limit, error / limit


def tell(name: str, error: float) -> None:
    """Log that a metric counted pixels in bins."""
    logger.info(
        "%s: maps are larger than %d pixels, so that they were not kept but counted in %s bins; it differs from the "
        "exact value by %.1g at most.",
        name,
        MOST_KEPT,
        f"{BINS:,}",
        error,
    )


def _parts(counts: Tensor, values: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Values and their labels, int64, some at a time, where counts are."""
    pairs = (part.detach().reshape(-1).split(_AT_ONCE) for part in (values, labels))
    for some, of_some in zip(*pairs, strict=True):
        yield some.to(counts.device), (of_some != 0).long().to(counts.device)
