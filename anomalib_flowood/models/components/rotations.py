# SPDX-License-Identifier: Apache-2.0
"""Training images turned by multiples of 90°, and which turns leave normal images normal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anomalib_flowood.flows import full_precision
from anomalib_flowood.metrics import auroc

QUARTERS = (0, 2, 1, 3)
"""Quarter turns, ordered so that the first, the first two and all four each form a group."""

LIMIT = 0.75
"""The AUROC above which turned images count as another kind of image: halfway between chance and certainty."""

SAMPLE = 32
"""Images of the sample that is turned first, if there are four times as many or more."""

SURE = 0.9
"""The AUROC above which the sample leaves no doubt: with 32 images an AUROC of :data:`LIMIT` scatters by 0.06."""

_PLACES = 4
"""Rows and columns to which maps are pooled: turns show in what lies where."""


def turned(images: Tensor, turns: int) -> list[Tensor]:
    """Turn images.

    Args:
        images: ``(N, C, H, W)``; square, if there are 4 turns.
        turns: The number of rotations, the first ones of :data:`QUARTERS`: 1, 2 or 4.

    Returns:
        The images in each of these rotations, ``(N, C, H, W)`` each.
    """
    return [images.rot90(quarters, (2, 3)) if quarters else images for quarters in QUARTERS[:turns]]


def together(features: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Interleave the features of each rotation, ``(N, ...)``: ``(turns * N, ...)``, image by image.

    Maps in channels-last memory format stay in it.
    """
    if len(features) == 1:
        return features[0]
    images = len(features[0][0])
    rows = torch.arange(len(features) * images).view(-1, images).T.flatten()
    return tuple(torch.cat(parts)[rows] for parts in zip(*features, strict=True))


def rows_of(images: Tensor, copies: int) -> Tensor:
    """Return the rows of images, ``(n,)``, that have several rows each, one after the other: ``(n * copies,)``."""
    return (images[:, None] * copies + torch.arange(copies)).flatten()


def first_turns(features: tuple[Tensor, ...], turns: int, kept: int) -> tuple[Tensor, ...]:
    """Keep the first ``kept`` of the ``turns`` rows that :func:`together` returns for each image."""
    if kept == turns:
        return features
    return tuple(part[torch.arange(len(part)) % turns < kept] for part in features)


def turns_that_fit(features: tuple[Tensor, ...], turns: int, limit: float = LIMIT) -> tuple[int, list[float]]:
    """Find out which turns leave normal images normal, from their features.

    A nearest-neighbour two-sample test (Schilling 1986, Journal of the American Statistical Association 81), in which
    no image is compared with itself: if images come in any rotation, a turned image is as near to the nearest other
    image as it was unturned, and if they come in one rotation it is farther away. Where the test finds that a turn
    fits, these features could not detect turned images as anomalies either.

    Args:
        features: What a backbone gives for N images in each rotation, as :func:`together` brings it together: pooled,
            ``(turns * N, C)``, or maps, ``(turns * N, C, h, w)``. At least two images.
        turns: 1, 2 or 4.
        limit: The AUROC above which a turn does not fit.

    Returns:
        How many of :data:`QUARTERS` fit, 1, 2 or 4, and for each turn the AUROC of the turned images' distances
        against those of the images: 0.5 is no difference.
    """
    distances = torch.stack([_squares(part, turns) for part in features]).sum(0).sqrt()  # (turns, N, N)
    nearest = distances.masked_fill(torch.eye(distances.shape[1], dtype=torch.bool), torch.inf).amin(2)
    labels = torch.tensor([[0], [1]]).expand(2, nearest.shape[1])
    aurocs = [auroc(torch.stack([nearest[0], of_turn]), labels) for of_turn in nearest]
    fitting = [count for count in (1, 2, 4) if count <= turns and max(aurocs[:count]) <= limit]
    return fitting[-1], aurocs


@full_precision
def _squares(part: Tensor, turns: int) -> Tensor:
    """Squared distances of turned images to unturned ones, by a part of their features, ``(turns, N, N)``."""
    part = part.float()
    if part.ndim == 4:
        part = nn.functional.adaptive_avg_pool2d(part, (min(_PLACES, part.shape[2]), min(_PLACES, part.shape[3])))
    part = part.flatten(2) if part.ndim == 4 else part.unsqueeze(2)
    spread = part.std((0, 2), keepdim=True)
    part = part / spread.clamp(min=1e-6 * float(spread.max()) + 1e-12)
    points = part.flatten(1).unflatten(0, (-1, turns)).transpose(0, 1)  # (turns, N, D)
    return torch.cdist(points, points[:1]).square() / points.shape[2]
