# SPDX-License-Identifier: Apache-2.0
"""Distances of a map's positions to the nearest normal ones: a memory bank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from anomalib_flowood import flows

from .coreset import farthest_first
from .training_rows import TrainingRows

_CANDIDATES = 100_000
"""Most positions among which those of the memory bank are chosen: more take longer and gain little (docs/tried.md)."""
_PART = 512
"""Positions of the bank that are compared at a time: the results for one image fit into a processor's cache, and an
exported graph has few parts."""
ALIKE = 1e-5
"""Least squared distance, as a share of a position's squared length. Otherwise the distance of a position in the bank
would be the square root of a rounding error, thousands of times as large as the error."""
_DISTANCES = 2**20
"""Distances in memory at a time, of some images to one part of the bank."""


class NearestPatches(flows.ForEachKind):
    """Distance of each position of a map to the nearest normal position, in any image and at any place.

    A Gaussian for each position knows what belongs there, which does not help if parts may lie anywhere, or each has
    another layout. Then an anomaly is what occurs nowhere in normal images. As in PatchCore (Roth et al. 2022, "Towards
    Total Recall in Industrial Anomaly Detection", section 3.2) normal positions are kept in a memory bank, each the
    farthest from those before it, so that rare ones are included. Distances are those of reduced maps, whose directions
    all have variance 1 over normal positions.

    Args:
        dims: D, the channels of a position.
        size: Most positions in the bank.
    """

    bank: Tensor
    """``(K, D)``; a buffer, like the others. Before a fit it holds only the mean of all positions."""
    location: Tensor
    """Mean of the distances of normal positions, ``()``."""
    spread: Tensor
    """Their standard deviation, ``()``."""

    def __init__(self, dims: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.of_kind = {"bank": 1, "location": 0, "spread": 0}
        self.register_buffer("bank", torch.zeros(1, dims))
        self.register_buffer("location", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))

    def fit(self, maps: Tensor, scored: Tensor, training: TrainingRows | None = None) -> Tensor:
        """Choose the positions of the bank, and set the scale of distances.

        Args:
            maps: Reduced maps of training images, ``(N, D, h, w)``.
            scored: Rows of some of them, ``(m,)``.
            training: What the rows are; by default an image each.

        Returns:
            Distances of their positions to the nearest ones of other images in the bank, ``(m, h, w)``.
        """
        training = training or TrainingRows(len(maps))
        _, _, height, width = maps.shape
        candidates = flows.draw(training.fitted * height * width, _CANDIDATES).to(maps.device)
        rows, places = candidates // (height * width), candidates % (height * width)
        points = maps[rows, :, places // width, places % width].to(self.bank)
        start = int(points.square().sum(1).argmax())
        chosen = torch.tensor(farthest_first(points, min(self.size, len(points)), start), device=points.device)
        self.bank = points[chosen]
        images = rows.to(points.device) // training.copies
        found = []
        for row, image in zip(scored.tolist(), training.image(scored).tolist(), strict=True):
            others = self.bank[images[chosen] != image]
            if not len(others):  # the whole bank is from this image
                others = points[images != image]
            found.append(self._distances(maps[row : row + 1].to(others), others))
        distances = torch.cat(found)
        normal = distances[scored < training.fitted]
        self.location, self.spread = normal.mean(), normal.std().clamp(min=1e-6)
        return distances

    def forget(self) -> None:
        """Forget the bank, except for the mean."""
        self.bank = self.bank.new_zeros(1, self.bank.shape[-1])
        self.location, self.spread = self.location.new_zeros(()), self.spread.new_ones(())

    def join(self, fits: Sequence[tuple[Tensor, ...]]) -> None:
        """Hold several fits; smaller banks are padded with their last position."""
        most = max(len(bank) for bank, *_ in fits)
        super().join([(torch.cat([bank, bank[-1:].expand(most - len(bank), -1)]), *scale) for bank, *scale in fits])

    def standardise(self, distances: Tensor, kind: Tensor | None = None) -> Tensor:
        """Standardise distances, ``(N, h, w)``, by those of normal images of the kind."""
        return standardised(distances, self.location, self.spread, kind)

    def forward(self, maps: Tensor, kind: Tensor | None = None) -> Tensor:
        """Return the distance of each position of reduced maps, ``(N, D, h, w)``, to the bank: ``(N, h, w)``."""
        return self.by_kind(lambda some, bank, *_: self._distances(some, bank), maps, kind)

    @flows.full_precision
    def _distances(self, maps: Tensor, bank: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._nearest(maps, bank)
        at_once = max(1, _DISTANCES // (min(_PART, len(bank)) * maps.shape[2:].numel()))
        return torch.cat([self._nearest(some, bank) for some in maps.split(at_once)])

    @staticmethod
    def _nearest(maps: Tensor, bank: Tensor) -> Tensor:
        """Return the distance to the nearest b, by ``|x - b|^2 = |x|^2 - 2 (x·b - |b|^2 / 2)``."""
        half_squares = 0.5 * bank.square().sum(-1)
        parts = zip(bank.split(_PART, dim=-2), half_squares.split(_PART, dim=-1), strict=True)
        similarity = reduce(torch.maximum, (NearestPatches._similarity(maps, *part) for part in parts))
        square = maps.square().sum(1)
        return torch.maximum(square - 2 * similarity, ALIKE * square).sqrt()

    @staticmethod
    def _similarity(maps: Tensor, bank: Tensor, half_squares: Tensor) -> Tensor:
        """Return the largest ``x·b - |b|^2 / 2`` at each position, ``(N, h, w)``."""
        if bank.ndim == 2:
            return functional.conv2d(maps, bank[:, :, None, None], -half_squares).amax(1)
        # An exported graph has a bank for each map.
        return (bank @ maps.flatten(2) - half_squares[:, :, None]).amax(1).unflatten(1, maps.shape[2:])


def standardised(maps: Tensor, location: Tensor, spread: Tensor, kind: Tensor | None) -> Tensor:
    """Standardise maps, ``(N, h, w)``, with one location and spread for all, ``()``, or for each kind, ``(K,)``."""
    if kind is not None:
        location, spread = (part[kind][:, None, None] for part in (location, spread))
    return (maps - location) / spread
