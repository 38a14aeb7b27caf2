# SPDX-License-Identifier: Apache-2.0
"""Everything except the flow for one layer of FeatureMapFlow: descriptors, subspace, whitening, memory bank, scales."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from FrEIA.framework import SequenceINN
from torch import Tensor
from torch.nn import functional

from anomalib_flowood import flows
from anomalib_flowood.features import Descriptors

from .layer_flows import coupled
from .nearest_patches import NearestPatches, standardised
from .rare_patches import RarePatches
from .training_rows import TrainingRows

_CHUNK = 64
"""Images whose latents are computed and whitened at a time in a fit."""

_DISTANCE_WEIGHT = 0.5
"""Weight of the map of distances relative to the anomaly map, which knows what belongs where."""

_RARE_WEIGHT = 0.5
"""Weight in the image score of the patch that is rarest for its place, which depends on the memory bank, too."""

_BLOCKS = (4, 2, 1)
"""Sides of the blocks over which the layout of the finest layer may be constant, in order of preference."""


class MapLayer(flows.ForEachKind):
    """Descriptors of one layer's maps, their principal subspace, and the whitening of the flow's latents.

    Args:
        name: The layer's name, for errors.
        channels: C, the channels of the layer's map.
        shape: ``(D, h, w)`` of the reduced map.
        layout_dims: Directions of whole maps that are whitened.
        top: Whether the layer's map is shown, and the mean over its most anomalous positions is evidence.
        whole: Whether the mean over all positions is evidence.
        top_fraction: The share of positions that count as the most anomalous.
        finer: ``(D, h, w)`` of each finer map that is shown. In the finest layer the directions of whole maps are
            constant over blocks of positions, as lighting and texture are, unless the mean over all positions is
            evidence, which depends on what whitening leaves.
        bank_size: Most positions in the memory bank of the finest shown layer (:class:`NearestPatches`). Distances to
            the nearest of them are shown, too, and the largest one in an image is evidence. Coarser shown layers keep
            more positions, in inverse proportion to their size. In the finest layer, the patch that is rarest for its
            place (:class:`RarePatches`) is evidence in place of the most anomalous positions. 0 for no bank.
    """

    location: Tensor
    """Mean of the anomaly map over normal images, ``()``, nats."""
    spread: Tensor
    """Its standard deviation, ``()``, which brings layers to a common scale."""

    def __init__(
        self,
        name: str,
        channels: int,
        shape: tuple[int, int, int],
        layout_dims: int,
        *,
        top: bool,
        whole: bool,
        finer: Sequence[tuple[int, int, int]],
        top_fraction: float,
        bank_size: int,
    ) -> None:
        super().__init__()
        self.name = name
        self.top, self.whole, self.dims = top, whole, shape[0]
        self.size = shape[1:]
        self.most = max(1, round(top_fraction * math.prod(self.size)))
        self.descriptors = Descriptors(channels, name)
        self.subspace = flows.PrincipalSubspace(2 * channels, shape[0])
        self.positions = flows.PositionWhitening([shape])
        block = _block(self.size) if top and not finer and not whole else 1
        self.layout = flows.Whitening([shape], layout_dims, block=block)
        compared = [*finer, shape]
        size = bank_size * math.prod(compared[0][1:]) // math.prod(self.size)
        self.nearest = NearestPatches(sum(dims for dims, *_ in compared), size) if top and bank_size else None
        self.rare = RarePatches(self.size) if self.nearest is not None and not finer else None
        self.of_kind = {"location": 0, "spread": 0}
        self.register_buffer("location", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))

    def check_number(self, images: int) -> None:
        """Check that there are enough training images for the directions of descriptors; errors as for the subspace."""
        self.subspace.check(images * math.prod(self.size), self._points)

    @property
    def _points(self) -> str:
        return f"descriptors of layer {self.name}"

    def fit(self, maps: Tensor) -> None:
        """Fit descriptors and subspace to the maps of all training images, ``(N, C, h, w)``; errors as for these."""
        described = self.descriptors.fit(maps)
        self.subspace.fit(described, what=self._points, solver="covariance_eigh")

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce maps, ``(N, C, h, w)``.

        Returns:
            The input of the flow, ``(N, D, h, w)``, and the rest of the log-density at each position, ``(N, h, w)``,
            nats.
        """
        return self.subspace(self.descriptors(maps))

    def reduced(self, maps: Tensor) -> Tensor:
        """Reduce maps as :meth:`forward` does, but without the rest of the log-density, which scores do not need."""
        return self.subspace.coordinates(self.descriptors.unscaled(maps), self.descriptors.scale)

    def fit_behind(
        self, flow: SequenceINN, maps: Tensor, shown: Sequence[Tensor], training: TrainingRows
    ) -> list[Tensor]:
        """Fit everything after the flow: whitening, memory bank, scales.

        Args:
            flow: The layer's flow.
            maps: Reduced maps of training images, ``(N, D, h, w)``, in any precision.
            shown: As for :meth:`fit_nearest`.
            training: What the rows are.

        Returns:
            The :meth:`statistics` of the :attr:`~TrainingRows.scored` rows, ``(m,)`` each, from fits to other images.
        """
        like = self.location
        latents = torch.empty_like(maps, dtype=like.dtype, device=like.device)
        scales = like.new_empty(len(maps), *self.size)
        for rows in training.apart(_CHUNK):
            latents[rows], scales[rows] = coupled(flow, maps[rows].to(like))
        unseen = self.fit_whitening(latents, scales, training)
        self.fit_scale(unseen[training.scored < training.fitted])
        return self.statistics(unseen, *self.fit_nearest(shown, training))

    def fit_whitening(self, latents: Tensor, scales: Tensor, training: TrainingRows) -> Tensor:
        """Fit the whitening to the latents of training images.

        Args:
            latents: The flow's latents, ``(N, D, h, w)``.
            scales: Log-scales of the couplings at each position, ``(N, h, w)``.
            training: What the rows are.

        Returns:
            Anomaly maps of the :attr:`~TrainingRows.scored` rows, ``(m, h, w)``, from fits to other images, nats.
        """
        moments = flows.PositionMoments(latents[: training.fitted])
        unseen = []
        for seen, held_out, scored in training.folds():
            self.positions.fit(moments.without(flows.PositionMoments(latents[held_out], moments.around)))
            self._fit_layout(latents, seen)
            unseen.append(self.anomaly_map(latents[scored], scales[scored]))
        self.positions.fit(moments)
        self._fit_layout(latents, torch.arange(training.fitted))
        return torch.cat(unseen)

    def _fit_layout(self, latents: Tensor, index: Tensor) -> None:
        """Fit the whitening of whole maps to the rows at some indices, after that of positions."""
        whitened = torch.empty_like(latents[: len(index)])
        for some, filled in zip(index.split(_CHUNK), whitened.split(_CHUNK), strict=True):
            filled.copy_(self.positions.whitened(latents[some]))
        self.layout.fit(whitened, overwrite=True)

    def forget_whitening(self) -> None:
        """Forget everything that was fitted to other weights of the flow; the whitening becomes the identity."""
        self.positions.forget()
        self.layout.forget()
        if self.nearest is not None:
            self.nearest.forget()
        if self.rare is not None:
            self.rare.forget()
        self.location, self.spread = self.location.new_zeros(()), self.spread.new_ones(())

    def whiten(self, latents: Tensor, kind: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whiten the flow's latents, ``(N, D, h, w)``; also return the log-determinant, ``(N,)``."""
        latents, log_det_positions = self.positions.transform(latents, rev=False, kind=kind)
        latents, log_det_layout = self.layout.transform(latents, rev=False, kind=kind)
        return latents, log_det_positions + log_det_layout

    def anomaly_map(self, latents: Tensor, scales: Tensor, kind: Tensor | None = None) -> Tensor:
        """Return anomaly maps, ``(N, h, w)``, nats.

        The log-determinant of the whitening is left out: with it, all images would look anomalous at positions where
        normal images vary more.

        Args:
            latents: The flow's latents, ``(N, D, h, w)``.
            scales: Log-scales of the couplings at each position, ``(N, h, w)``.
            kind: The index of each image's kind, ``(N,)``, if there are several.
        """
        return 0.5 * self.whitened(latents, kind).square().sum(1) - scales

    def whitened(self, latents: Tensor, kind: Tensor | None = None) -> Tensor:
        """Whiten the flow's latents, ``(N, D, h, w)``, without the log-determinant, a constant of each kind."""
        return self.layout.whitened(self.positions.whitened(latents, kind), kind)

    def fit_nearest(self, shown: Sequence[Tensor], training: TrainingRows) -> tuple[Tensor | None, Tensor | None]:
        """Fill the memory bank, and find what is usual.

        Args:
            shown: Reduced maps of training images, in any precision, of the finer shown layers and of this one.
            training: What the rows are.

        Returns:
            The :meth:`distances` of the :attr:`~TrainingRows.scored` rows, from fits to other images.
        """
        if self.nearest is None:
            return None, None
        own = compared = shown[-1]
        if len(shown) > 1:
            chunks = zip(*(maps.split(_CHUNK) for maps in shown), strict=True)
            parts = [self._compared([maps.to(self.location) for maps in some]).to(own) for some in chunks]
            compared = torch.cat(parts)
        scored = training.scored
        distances = self.nearest.fit(compared, scored, training)
        if self.rare is None:
            return distances, None
        return distances, self.rare.fit(compared[scored], distances, training.undamaged(scored))

    def distances(self, shown: Sequence[Tensor], kind: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Return how far positions are from normal ones.

        Args:
            shown: Reduced maps of the finer shown layers and of this one, ``(N, D, h, w)`` each.
            kind: The index of each image's kind, ``(N,)``, if there are several.

        Returns:
            The distance to the nearest one in the memory bank, ``(N, h, w)``, ``None`` if there is no bank; and by how
            much a position is rarer than usual at its place, ``(N, h, w)``, ``None`` except in the finest layer.
        """
        if self.nearest is None:
            return None, None
        compared = self._compared(shown)
        distances = self.nearest(compared, kind)
        return distances, None if self.rare is None else self.rare(compared, distances, kind)

    def _compared(self, shown: Sequence[Tensor]) -> Tensor:
        """Return the vectors by which positions are compared, ``(N, sum of D, h, w)``; finer maps are averaged."""
        *finer, own = shown
        return torch.cat([*(functional.adaptive_avg_pool2d(maps, self.size) for maps in finer), own], dim=1)

    def fit_scale(self, maps: Tensor) -> None:
        """Set location and spread from anomaly maps of normal images, ``(n, h, w)``."""
        self.location = maps.mean()
        self.spread = maps.std().clamp(min=1e-6)

    def standardise(self, maps: Tensor, kind: Tensor | None = None) -> Tensor:
        """Standardise anomaly maps, ``(N, h, w)``, by those of normal images of the kind."""
        return standardised(maps, self.location, self.spread, kind)

    @property
    def shares(self) -> list[float]:
        """The weight of each map that is :meth:`shown`."""
        return [1.0] * self.top + [_DISTANCE_WEIGHT] * (self.nearest is not None)

    def shown(self, maps: Tensor, distances: Tensor | None, kind: Tensor | None = None) -> list[Tensor]:
        """Return the maps to show, ``(N, h, w)``, standardised; arguments as for :meth:`statistics`."""
        shown = [self.standardise(maps, kind)] if self.top else []
        if distances is not None and self.nearest is not None:
            shown.append(self.nearest.standardise(distances, kind))
        return shown

    def statistics(self, maps: Tensor, distances: Tensor | None, rarity: Tensor | None) -> list[Tensor]:
        """Return the layer's evidence about images: one to three statistics, ``(N,)`` each.

        Args:
            maps: Anomaly maps, ``(N, h, w)``.
            distances: The first of what :meth:`distances` returns.
            rarity: The second one.
        """
        positions = maps.flatten(1)
        statistics = []
        if rarity is not None:
            statistics.append(rarity.flatten(1).amax(1))
        elif self.top:
            statistics.append(positions.topk(self.most, dim=1).values.mean(1))
        if distances is not None:
            statistics.append(distances.flatten(1).amax(1))
        return [*statistics, positions.mean(1)] if self.whole else statistics

    def weights(self, images: int) -> list[float]:
        """Return the weights of :meth:`statistics` after a fit to a number of images.

        With fewer images than a position has dimensions, its Gaussian is unreliable, while a bank draws on all
        positions. Beside a bank, the weight of the most anomalous positions is then reduced in proportion
        (docs/tried.md).
        """
        bank = self.nearest is not None
        top_weight = min(1.0, images / self.dims) if bank else 1.0
        return [_RARE_WEIGHT if self.rare else top_weight] * self.top + [1.0] * bank + [1.0] * self.whole

    @property
    def statistic_names(self) -> list[str]:
        """The names of :meth:`statistics`."""
        first = "its patch that is rarest for its place" if self.rare else "its most anomalous positions"
        return [
            *([f"{self.name}: {first}"] * self.top),
            *([f"{self.name}: its patch that is least like any normal one"] * (self.nearest is not None)),
            *([f"{self.name}: its whole map"] * self.whole),
        ]


def new_layers(
    names: Sequence[str],
    channels: Sequence[int],
    shapes: Sequence[tuple[int, int, int]],
    roles: Sequence[tuple[bool, bool]],
    **arguments: Any,
) -> list[MapLayer]:
    """Return layers, the finest first, given their names, channels, shapes and roles, ``(top, whole)``."""
    layers: list[MapLayer] = []
    finer: list[tuple[int, int, int]] = []
    for name, layer_channels, shape, (top, whole) in zip(names, channels, shapes, roles, strict=True):
        layers.append(MapLayer(name, layer_channels, shape, finer=finer, top=top, whole=whole, **arguments))
        finer = [*finer, shape] if top else finer
    return layers


def shown_before(layers: Iterable[MapLayer], reduced: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield for each layer the reduced maps of the shown layers up to it, the finest first."""
    shown: list[Tensor] = []
    for layer, maps in zip(layers, reduced, strict=True):
        shown = [*shown, maps] if layer.top else shown
        yield shown


def _block(size: tuple[int, int]) -> int:
    """Return the side of the largest blocks that divide a map."""
    return next(block for block in _BLOCKS if not any(side % block for side in size))
