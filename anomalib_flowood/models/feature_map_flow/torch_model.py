# SPDX-License-Identifier: Apache-2.0
"""PyTorch model of FeatureMapFlow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from anomalib.data import InferenceBatch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn
from torch.nn import functional

from anomalib_flowood import flows
from anomalib_flowood.features import create_feature_maps, run_backbone
from anomalib_flowood.models.components import FlowModel
from anomalib_flowood.scores import Score
from anomalib_flowood.scores.score import Inputs

from .map_layer import MapLayer


def _map_flows(shapes: Sequence[tuple[int, int, int]], **arguments: object) -> flows.SideBySide:
    """Build one flow for each layer, side by side."""
    return flows.SideBySide(flows.map_flow(shape, **arguments) for shape in shapes)  # type: ignore[arg-type]


class FeatureMapFlowModel(FlowModel):
    """Density of the reduced feature maps of a frozen network, one flow per layer; says where it is low.

    Every position of a layer's map of C channels gets a descriptor of 2 C numbers
    (:class:`~anomalib_flowood.features.Descriptors`), of which the flow models the D principal directions over all
    positions and training images; the others have an isotropic Gaussian
    (:class:`~anomalib_flowood.flows.PrincipalSubspace`).

    The layout of the whole map, D × h × w values, is whitened next (:class:`~anomalib_flowood.flows.Whitening`): what
    varies from image to image as a whole (light, texture) no longer stands out, what a single place does to itself
    still does. A flow of couplings models the whitened map. Couplings scale and shift each value, so that the density
    has a share for each direction d at each position p::

        a(d, p) = 1/2 z(d, p)^2 - sum of log-scales at (d, p) + constant

    The anomaly map is their sum over the directions, and the rest of the density at the position: many directions show
    well where something is, and the map sums to −log p. The image score takes the leading ``score_dims`` directions
    alone, which say best whether an image belongs: they change with what it shows, the others with its texture.

    Arguments are those of :class:`~anomalib_flowood.FeatureMapFlow`, but for what training takes.

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
        layers: Sequence[str | int] | None = None,
        image_size: tuple[int, int] = (224, 224),
        *,
        pre_trained: bool = True,
        subspace_dim: int = 96,
        layout_dims: int = 128,
        mask: str = "cycle",
        subnet: str = "bottleneck",
        bottleneck_dim: int = 128,
        coupling_layers: int = 4,
        hidden_channels: int = 256,
        scale: str = "tanh",
        score_dims: int = 16,
        score_fraction: float = 1.0,
    ) -> None:
        if not 0 < score_fraction <= 1:
            msg = f"score_fraction must be above 0 and at most 1, got {score_fraction}."
            raise ValueError(msg)
        for argument, value, least in (("score_dims", score_dims, 1), ("layout_dims", layout_dims, 0)):
            if value < least:
                msg = f"{argument} must be at least {least}, got {value}."
                raise ValueError(msg)
        network = create_feature_maps(backbone, layers, pre_trained=pre_trained, image_size=image_size)
        with torch.no_grad():
            maps = run_backbone(network, torch.zeros(1, 3, *image_size))
        names = network.feature_info.module_name()  # type: ignore[operator, union-attr]
        shapes = [(min(subspace_dim, 2 * layer.shape[1]), *layer.shape[2:]) for layer in maps]
        reduced = [
            MapLayer(name, layer.shape[1], shape, layout_dims)
            for name, layer, shape in zip(names, maps, shapes, strict=True)
        ]
        new_flow = partial(
            _map_flows,
            shapes,
            mask=mask,
            subnet=subnet,
            coupling_layers=coupling_layers,
            hidden_channels=hidden_channels,
            scale=scale,
            bottleneck_dim=bottleneck_dim,
        )
        super().__init__(new_flow, flows.StandardNormal(), sum(2 * layer.numel() for layer in maps), levels=1)
        self.backbone = network
        height, width = image_size
        self.image_size = (height, width)
        self.score_dims = score_dims
        self.score_fraction = score_fraction
        self.layers = nn.ModuleList(reduced)

    @property
    def scores_are_likelihoods(self) -> bool:
        """No: the score takes the leading directions alone."""
        return False

    def train(self, mode: bool = True) -> FeatureMapFlowModel:
        """Set the flow's mode; the backbone is frozen, its batch norms included."""
        super().train(mode)
        self.backbone.eval()
        return self

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of pre-processed images.

        Args:
            images: Images as the backbone wants them, ``(N, 3, H, W)``.

        Returns:
            One map for each layer, ``(N, C, h, w)``.

        Raises:
            ValueError: If a pixel is NaN or infinite, or the images have another size than the model's.
        """
        return run_backbone(self.backbone, self.checked(images, size=self.image_size))

    def fit_features(self, maps: tuple[Tensor, ...]) -> None:
        """Fit everything but the flow, and the scales that depend on it.

        Args:
            maps: The feature maps of all training images, one tensor ``(N, C, h, w)`` for each layer; in main memory,
                if they are many.

        Raises:
            ValueError: If there are fewer than 3 images, or the features are all alike or vary in too few directions.
        """
        if len(maps[0]) < 3:
            msg = f"A density of whole maps needs at least 3 training images, more are better; got {len(maps[0])}."
            raise ValueError(msg)
        for layer, layer_maps in zip(self.layers, maps, strict=True):
            layer.fit(layer_maps)  # type: ignore[operator]

    def reduce(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Turn feature maps into what the flow models.

        Args:
            maps: One map for each layer, ``(N, C, h, w)``. They may lie on another device than the model, and have
                another precision.

        Returns:
            Two tensors for each layer: its reduced map, ``(N, D, h, w)``, and the rest of the log-density at each
            position, ``(N, h, w)``, nats.
        """
        return tuple(part for layer, layer_maps in zip(self.layers, maps, strict=True) for part in layer(layer_maps))

    def inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Extract and reduce the maps of pre-processed images, ``(N, 3, H, W)``; errors as for :meth:`extract`."""
        return self.reduce(self.extract(images))

    def density(self, inputs: Inputs, flow: InvertibleModule | None = None) -> flows.Density:
        """Evaluate the density of the descriptors of all positions, from what :meth:`reduce` returns."""
        sides = (self.flow if flow is None else flow).flows
        return flows.independent(
            [
                flows.density(side, self.base, reduced, rest.flatten(1).sum(1))
                for side, (reduced, rest) in zip(sides, _pairs(inputs), strict=True)
            ]
        )

    def layer_maps(self, reduced: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each layer, its anomaly map and the share that the leading directions have in it.

        Yields:
            Pairs of ``(N, h, w)``, nats. The values of all anomaly maps sum to −log p.
        """
        for side, (layer, rest) in zip(self.flow.flows, _pairs(reduced), strict=True):
            shares = flows.shares(side, self.base, layer)
            yield shares.sum(1) - rest, shares[:, : self.score_dims].sum(1)

    def fit_map_scale(self, reduced: tuple[Tensor, ...]) -> None:
        """Set the location and scale by which layers are brought together, from normal images' reduced maps."""
        for layer, maps in zip(self.layers, self.layer_maps(reduced), strict=True):
            layer.fit_scale(maps)  # type: ignore[operator]

    def predict(self, inputs: Inputs, scorer: Score | None = None) -> InferenceBatch:
        """Score reduced maps.

        Args:
            inputs: What :meth:`reduce` returned.
            scorer: Not used: the score goes with the map.

        Returns:
            A batch with ``anomaly_map``, ``(N, 1, H, W)``: the layers' maps in units of their standard deviation over
            normal images, up-sampled (bicubic, which blurs a coarse map less than bilinear) and averaged; and
            ``pred_score``, ``(N,)``: the mean of the leading directions' share over the positions where it is highest,
            likewise in units of its standard deviation and averaged over the layers.
        """
        del scorer
        maps, scores = [], []
        for layer, pair in zip(self.layers, self.layer_maps(inputs), strict=True):
            whole, leading = layer.standardise(pair)  # type: ignore[operator]
            maps.append(functional.interpolate(whole[:, None], self.image_size, mode="bicubic", align_corners=False))
            leading = leading.flatten(1)
            highest = leading.topk(max(1, round(self.score_fraction * leading.shape[1])), dim=1).values
            scores.append(highest.mean(1))
        score = torch.stack(scores).mean(0)
        score = torch.where(torch.isnan(score), torch.full_like(score, math.inf), score)
        return InferenceBatch(pred_score=score, anomaly_map=torch.stack(maps).mean(0))


def _pairs(inputs: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
    """Take what belongs to one layer after the other."""
    return zip(inputs[::2], inputs[1::2], strict=True)
