# SPDX-License-Identifier: Apache-2.0
"""PyTorch model of FeatureMapFlow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import cast

import torch
from anomalib.data import InferenceBatch
from FrEIA.framework import SequenceINN
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from anomalib_flowood import flows
from anomalib_flowood.features import create_feature_maps, run_backbone
from anomalib_flowood.models.components.capabilities import LayerView
from anomalib_flowood.models.components.kinds import Kinds, fit_to_each, pooled
from anomalib_flowood.models.components.rotations import rows_of
from anomalib_flowood.scores import Evidence, Score
from anomalib_flowood.scores.score import Inputs

from .extraction import MAP_STRIDES, SCORE_STRIDES, MapExtraction, indices_of
from .layer_flows import DRAWN, POSITION, coupled, draws_positions, new_flow, transformed
from .map_layer import MapLayer, new_layers, shown_before
from .mean_features import MeanFeatures
from .shown_map import ShownMap
from .tiles import AT_ONCE, new_tiles, normalise_of
from .training_rows import TrainingRows

_MOST_STEPS = 500
"""Most training steps of an epoch: with thousands of images it need not see every position."""


class FeatureMapFlowModel(MapExtraction):
    """Density of the feature maps of a frozen network, one flow per layer, with an anomaly score and an anomaly map.

    With ``context="mean"`` it is the density of maps given the image's mean vector. Every position of a layer's map of
    C channels has a descriptor of 2 C numbers (:class:`~anomalib_flowood.features.Descriptors`). The flow models its D
    principal directions over all positions and training images; the others have an isotropic Gaussian
    (:class:`~anomalib_flowood.flows.PrincipalSubspace`).

    First comes the flow, one for all positions of a layer (:func:`~anomalib_flowood.flows.position_flow`), which learns
    what positions can show. After its training, its latents are whitened in closed form: each position by a Gaussian of
    its own (:class:`~anomalib_flowood.flows.PositionWhitening`), then the whole map
    (:class:`~anomalib_flowood.flows.Whitening`), so that variation of whole images, such as lighting and texture, does
    not stand out. Without couplings there is only the whitening. With the whitened latents z::

        a(p) = sum over d of 1/2 z(d, p)^2 - log-scales of the couplings at (d, p)

    is the anomaly map of a layer. It sums to −log p, up to a constant and the Gaussian of the other directions. The
    anomaly map of an image combines those of ``map_layers``. Its score is a weighted mean of several kinds of evidence
    (:class:`~anomalib_flowood.scores.Evidence`): for each of ``map_layers``, the mean over the most anomalous
    positions, which detects small defects (in the finest layer the patch that is rarest for its place,
    :class:`RarePatches`), and the largest distance of a position from its nearest normal one
    (:class:`NearestPatches`); for each of ``score_layers``, the mean over the map, which detects what is wrong with
    whole images; and −log p of the mean features of all layers under a shrunk Gaussian, which depends on what an image
    shows, but not on where. Each is standardised by training images that are scored by fits to others, and weighted by
    how well it tells damaged copies of them.

    With a named mask the flow transforms whole maps and not single positions
    (:func:`~anomalib_flowood.flows.map_flow`); all else is the same. The arguments are those of
    :class:`~anomalib_flowood.FeatureMapFlow`, except those of the training.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense.
        BackboneUnavailableError: If the backbone's weights cannot be had.
    """

    parts = 3
    flow: flows.SideBySide
    base: flows.StandardNormal

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        map_layers: Sequence[str | int] | None = None,
        score_layers: Sequence[str | int] | None = None,
        image_size: tuple[int, int] = (320, 320),
        *,
        pre_trained: bool = True,
        subspace_dim: int = 64,
        layout_dims: int = 256,
        mask: str = POSITION,
        context: str = "mean",
        subnet: str = "mlp",
        bottleneck_dim: int = 16,
        coupling_layers: int = 0,
        hidden_channels: int = 256,
        scale: str = "none",
        score_fraction: float = 0.01,
        bank_size: int = 1000,
        kind_images: int = 20,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
    ) -> None:
        if not 0 < score_fraction <= 1:
            msg = f"score_fraction must be above 0 and at most 1, got {score_fraction}."
            raise ValueError(msg)
        least = {"subspace_dim": (subspace_dim, 1), "layout_dims": (layout_dims, 0), "bank_size": (bank_size, 0)}
        for argument, (value, limit) in least.items():
            if value < limit:
                msg = f"{argument} must be at least {limit}, got {value}."
                raise ValueError(msg)
        tops = indices_of(backbone, map_layers, MAP_STRIDES)
        wholes = indices_of(backbone, score_layers, SCORE_STRIDES)
        if not tops:
            msg = "map_layers must name at least one layer: the anomaly map is made of theirs."
            raise ValueError(msg)
        indices = sorted({*tops, *wholes})
        height, width = image_size
        tiles = new_tiles((height, width), tile_size, tile_stride)
        size = tiles.size if tiles else (height, width)
        network = create_feature_maps(backbone, indices, pre_trained=pre_trained, image_size=size)
        with torch.no_grad():
            maps = run_backbone(network, torch.zeros(1, 3, *size))
        names = network.feature_info.module_name()  # type: ignore[operator, union-attr]
        shapes = [(min(subspace_dim, 2 * layer.shape[1]), *layer.shape[2:]) for layer in maps]
        channels = [layer.shape[1] for layer in maps]
        roles = [(index in tops, index in wholes) for index in indices]
        sizes = {"layout_dims": layout_dims, "top_fraction": score_fraction, "bank_size": bank_size}
        layers = new_layers(names, channels, shapes, roles, **sizes)
        arguments = {"subnet": subnet, "bottleneck_dim": bottleneck_dim, "coupling_layers": coupling_layers}
        arguments |= {"hidden_channels": hidden_channels, "scale": scale}
        new_flows = partial(new_flow, shapes, mask, context, **arguments)
        dims = sum(2 * layer.numel() for layer in maps) * (len(tiles) if tiles else 1)
        super().__init__(new_flows, flows.StandardNormal(), dims, levels=1)
        self.backbone = network
        self.image_size = (height, width)
        self.tiles = tiles
        self.normalise = normalise_of(backbone) if tiles else None
        self.layers = nn.ModuleList(layers)
        self.means = MeanFeatures(sum(channels))
        self.evidence_names = [*(name for layer in layers for name in layer.statistic_names), self.means.name]
        self.evidence = Evidence(len(self.evidence_names))
        self.kinds = Kinds(0 if tiles else kind_images)
        shown, shares = zip(*((layer.size, share) for layer in layers for share in layer.shares), strict=True)
        self.shown_map = ShownMap(shown, shares, size)
        self._coarsest = min(map(math.prod, shown))

    @property
    def scores_are_likelihoods(self) -> bool:
        """Whether ``pred_score`` is a likelihood: no, it combines several kinds of evidence."""
        return False

    def fit_features(self, maps: tuple[Tensor, ...]) -> None:
        """Fit what comes before the flow.

        Args:
            maps: The maps of all training images, ``(N, C, h, w)`` for each layer; on the CPU if they are many.

        Raises:
            ValueError: If there are fewer than 3 images, or the features are all alike or vary in too few directions.
        """
        maps = tuple(self.alone(layer_maps) for layer_maps in maps)
        if len(maps[0]) < 3:
            msg = f"A density of maps needs at least 3 training images, more are better; got {len(maps[0])}."
            raise ValueError(msg)
        for layer, layer_maps in zip(self.layers, maps, strict=True):
            layer.fit(layer_maps)  # type: ignore[operator]

    def reduce(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Reduce feature maps to the principal directions that the flow models.

        Args:
            maps: One map for each layer, as :meth:`extract` returns them. Their device and precision may differ from
                the model's.

        Returns:
            Two tensors for each layer: its reduced map, ``(N, D, h, w)``, and the rest of the log-density at each
            position, ``(N, h, w)``, nats; in a model with tiles, the tiles are the second axis of both.
        """
        pairs = zip(self.layers, maps, strict=True)
        parts = tuple(part for layer, layer_maps in pairs for part in layer(self.alone(layer_maps)))
        return parts if self.tiles is None else tuple(part.unflatten(0, maps[0].shape[:2]) for part in parts)

    def prepare(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Reduce maps as :meth:`reduce` does, and append the mean features, ``(N, P)``, or ``(N, T, P)`` with tiles."""
        means = self._means(tuple(self.alone(layer) for layer in maps))
        return *self.reduce(maps), means if self.tiles is None else means.unflatten(0, maps[0].shape[:2])

    def _means(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the mean features of images, ``(N, P)``, which also determine their kinds."""
        return pooled(maps, like=self.evidence.location)

    def inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Extract and prepare the maps of pre-processed images, ``(N, 3, H, W)``; errors as for :meth:`extract`."""
        return self.prepare(self.extract(images))

    def density(self, inputs: Inputs, flow: InvertibleModule | None = None) -> flows.Density:
        """Evaluate the density of the descriptors of all positions, from what :meth:`prepare` returns.

        An image's tiles are treated as independent. If there are several kinds, the density is that of the image's.
        """
        kind = self.kinds(inputs[-1])
        alone = flows.independent(
            [
                flows.density(side, self.base, reduced, rest.flatten(1).sum(1), after=partial(layer.whiten, kind=kind))
                for layer, side, reduced, rest, _ in self._sides(inputs, flow)
            ]
        )
        if self.tiles is None:
            return alone
        count = inputs[0].shape[:2]
        terms = tuple(term.unflatten(0, count).sum(1) for term in alone.terms)
        return flows.Density(terms, tuple(z.unflatten(0, count) for z in alone.latents), alone.base)

    def _sides(
        self, inputs: Inputs, flow: InvertibleModule | None = None
    ) -> Iterator[tuple[MapLayer, SequenceINN, Tensor, Tensor, list[Tensor]]]:
        """Yield, for each layer: itself, its flow, what :meth:`reduce` returns, and the maps that its bank compares."""
        sides = (self.flow if flow is None else flow).flows
        reduced, rest = ([self.alone(part) for part in inputs[start : 2 * len(self.layers) : 2]] for start in (0, 1))
        layers = cast("Sequence[MapLayer]", self.layers)
        return zip(layers, sides, reduced, rest, shown_before(layers, reduced), strict=True)

    def epoch_steps(self, images: int) -> int | None:
        """Return the steps of an epoch: it draws as many positions as the coarsest shown map has in all images.

        ``None`` if the flow trains on whole maps.
        """
        if not draws_positions(self.flow.flows[0]):
            return None
        return max(1, min(_MOST_STEPS, round(images * self._coarsest / DRAWN)))

    def loss(self, inputs: Inputs, noise: float = 0.0) -> Tensor:
        """Training loss: mean −log p of the flow's input per dimension, nats, ``()``.

        A flow on single positions is evaluated at some of them, drawn anew at every call.

        Args:
            inputs: What :meth:`reduce` returned, reduced maps in any precision.
            noise: Standard deviation of the noise that is added to the input.
        """
        losses = []
        for _, flow, reduced, *_ in self._sides(inputs):
            z, log_det = transformed(flow, reduced, noise, self.dtype)
            losses.append(-(self.base.log_prob(z) + log_det).mean() / z[0].numel())
        return torch.stack(losses).mean()

    def layer_maps(self, inputs: Inputs) -> Iterator[Tensor]:
        """Yield the anomaly map of each layer, ``(N, h, w)``, nats, from what :meth:`prepare` returns."""
        kind = self.kinds(inputs[-1])
        for layer, flow, maps, *_ in self._sides(inputs):
            yield layer.anomaly_map(*coupled(flow, maps), kind)

    @property
    def views_layers(self) -> bool:
        """Whether there are :meth:`layer_views`; not if there are tiles."""
        return self.tiles is None

    def layer_views(self, images: Tensor) -> list[LayerView]:
        """Return what each layer makes of pre-processed images, ``(N, 3, H, W)``.

        Raises:
            ValueError: As for :meth:`extract`, and if the model has tiles.
        """
        if self.tiles is not None:
            msg = "What a score is made of is shown of whole images, and this detector has tiles (tile_size)."
            raise ValueError(msg)
        found, statistics, inputs = [], [], self.inputs(images)
        kind = self.kinds(inputs[-1])
        for layer, flow, reduced, _, shown in self._sides(inputs):
            latents, scales = coupled(flow, reduced)
            maps = layer.anomaly_map(latents, scales, kind)
            found.append((layer, reduced, layer.whitened(latents, kind), maps))
            statistics += layer.statistics(maps, *layer.distances(shown, kind))
        statistics.append(self.means(inputs[-1], kind))
        *parts, of_means = self.evidence.parts(torch.stack(statistics, dim=1), kind).unbind(1)
        of_layers = iter(parts)
        views = [
            LayerView(
                layer.name,
                reduced,
                whitened,
                layer.standardise(maps, kind),
                {name: next(of_layers) for name in layer.statistic_names},
                kind,
            )
            for layer, reduced, whitened, maps in found
        ]
        views[-1].shares[self.means.name] = of_means
        return views

    @torch.no_grad()
    def fit_whitening(
        self,
        inputs: Inputs,
        copies: int = 1,
        progress: Callable[..., object] = lambda **_: None,
        damaged: tuple[Tensor, Inputs] | None = None,
    ) -> list[int]:
        """Fit the whitening, and scales of maps and evidence, to each kind of image, for the flow's current weights.

        Args:
            inputs: What :meth:`prepare` returns for training images, on the CPU; reduced maps in any precision.
            copies: Consecutive rows of each image: the image and rotated copies, which are not independent of it.
            progress: Called with the number of layers fitted, over all kinds, as ``completed`` and ``total``.
            damaged: Indices of training images, ``(m,)``, and the same inputs for a damaged copy of each.

        Returns:
            The number of training images of each kind.
        """
        images = self.kinds.fit(len(inputs[0]) // copies, inputs[-1][::copies])
        of, more = damaged or (torch.zeros(0, dtype=torch.int64), tuple(part[:0] for part in inputs))
        tiles = 1 if self.tiles is None else inputs[0].shape[1]  # to a fit, each tile is an image
        fitted = count(1)

        def fit(own: Tensor) -> None:
            rows, here = rows_of(own, copies), torch.isin(of, own)
            some = tuple(torch.cat([part[rows], other[here]]) for part, other in zip(inputs, more, strict=True))
            training = TrainingRows(len(own) * tiles, copies, torch.searchsorted(own, of[here]))
            statistics, weights = list[Tensor](), list[float]()
            for layer, flow, maps, _, shown in self._sides(some):
                statistics += layer.fit_behind(flow, maps, shown, training)
                weights += layer.weights(training.images)
                progress(completed=next(fitted), total=len(images) * len(self.layers))
            statistics.append(self.means.fit(self.alone(some[-1]), training))
            self.evidence.fit(torch.stack(statistics, dim=1), [*weights, 1.0], training.scored < training.fitted)

        fit_to_each(images, fit, [module for module in self.modules() if isinstance(module, flows.ForEachKind)])
        return [len(some) for some in images]

    def forget_whitening(self) -> None:
        """Make the whitening the identity and forget all scales, since the flow's weights are about to change."""
        self.kinds.forget()
        self.evidence.forget()
        self.means.forget()
        for layer in self.layers:
            layer.forget_whitening()  # type: ignore[operator]

    def predict(self, inputs: Inputs, scorer: Score | None = None) -> InferenceBatch:
        """Score reduced maps as :meth:`forward` scores images.

        Args:
            inputs: What :meth:`prepare` returned.
            scorer: Not used: there is only one score.
        """
        del scorer
        parts = (*inputs[: 2 * len(self.layers) : 2], inputs[-1])
        if self.tiles is None:
            return self._judge(*parts)
        return self.tiles.joined(
            map(self._judge, *(part.split(AT_ONCE) for part in image)) for image in zip(*parts, strict=True)
        )

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score pre-processed images, ``(N, 3, H, W)``; errors as for :meth:`extract`.

        Returns:
            A batch with ``pred_score``, ``(N,)``, the combined evidence, and ``anomaly_map``, ``(N, 1, H, W)``: the
            maps of ``map_layers`` and of the distances to the nearest normal positions, standardised over normal
            images, up-sampled and averaged (:class:`ShownMap`). With tiles, the map is stitched together, and the score
            is the highest of all tiles.
        """
        if self.tiles is None:
            return self._judge_maps(self.extract(images))
        self.check(images)
        return self.tiles.joined(map(self._judge_maps, self.tile_maps(image)) for image in images)

    def judged(self, images: Tensor) -> tuple[InferenceBatch, Tensor]:
        """Score images by their tiles, some at a time; also return −log p per dimension, nats, ``(N,)``."""
        assert self.tiles is not None
        self.check(images)
        log_prob = torch.zeros(len(images), dtype=self.dtype, device=images.device)

        def parts(number: int) -> Iterator[InferenceBatch]:
            for maps in self.tile_maps(images[number]):
                inputs = self.prepare(tuple(layer[None] for layer in maps))
                log_prob[number] += self.log_prob_of(inputs)[0]
                yield self._judge(*(part[0] for part in (*inputs[:-1:2], inputs[-1])))

        found = self.tiles.joined(map(parts, range(len(images))))
        return found, -log_prob / self.dims

    def _judge_maps(self, maps: Sequence[Tensor]) -> InferenceBatch:
        """Score feature maps, without the rest of the log-density."""
        reduced = (layer.reduced(own) for layer, own in zip(self.layers, maps, strict=True))  # type: ignore[operator]
        return self._judge(*reduced, self._means(maps))

    def _judge(self, *parts: Tensor) -> InferenceBatch:
        """Score images, given each layer's reduced maps, ``(N, D, h, w)``, and the mean features, ``(N, P)``."""
        *reduced, means = parts
        kind = self.kinds(means)
        shown, statistics = list[Tensor](), list[Tensor]()
        layers = cast("Sequence[MapLayer]", self.layers)
        for layer, flow, latents, compared in zip(
            layers, self.flow.flows, reduced, shown_before(layers, reduced), strict=True
        ):
            maps = layer.anomaly_map(*coupled(flow, latents), kind)
            distances, rarity = layer.distances(compared, kind)
            statistics += layer.statistics(maps, distances, rarity)
            shown += layer.shown(maps, distances, kind)
        statistics.append(self.means(means, kind))
        score = self.evidence(torch.stack(statistics, dim=1), kind)
        score = torch.where(torch.isnan(score), torch.full_like(score, math.inf), score)
        return InferenceBatch(pred_score=score, anomaly_map=self.shown_map(shown))
