# SPDX-License-Identifier: Apache-2.0
"""PyTorch model of FeatureMapFlow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from anomalib.data import InferenceBatch
from FrEIA.framework import GraphINN, InputNode, Node, OutputNode
from FrEIA.modules import InvertibleModule
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional

from anomalib_flowood import flows
from anomalib_flowood.features import create_feature_maps, run_backbone
from anomalib_flowood.models.components import FlowModel
from anomalib_flowood.scores import Density, Score
from anomalib_flowood.scores.score import Inputs

_FIT_POSITIONS = 60_000
"""Positions from which the principal subspaces are fitted; more change nothing but the time."""

_LAYOUT_IMAGES = 2_000
"""Training images from which the layout's directions are fitted."""

_IMAGES_PER_LAYOUT_DIRECTION = 5
"""With fewer training images for each direction, the whitening would learn the images by heart."""

_CHUNK = 256
"""Images whose maps are described at once."""


class LayerFlow(InvertibleModule):
    """One layer's flow as a module of a graph: principal coordinates in, latents out.

    Args:
        dims_in: One shape, ``[(d, h, w)]``.
        dims_c: FrEIA's convention; none are supported.
        **kwargs: Arguments of :func:`anomalib_flowood.flows.map_flow`.
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, int, int]],
        dims_c: Sequence[tuple[int, ...]] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(dims_in, dims_c)
        self.couplings = flows.map_flow(tuple(self.dims_in[0]), **kwargs)  # type: ignore[arg-type]

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shape of the output, which is that of the input."""
        return input_dims

    def forward(
        self,
        x_or_z: Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor], Tensor]:
        """Run the flow; see :class:`FrEIA.modules.InvertibleModule` for the convention."""
        del c, jac
        y, log_det = self.couplings(x_or_z[0], rev=rev)
        return (y,), log_det

    def latents_and_scales(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents, and for each value the sum of its log-scales over the couplings; ``(N, d, h, w)``."""
        total = torch.zeros_like(x)
        for coupling in self.couplings:
            x, s = coupling.couple(x)
            total = total + coupling.spread(s)
        return x, total


def _layer_flows(shapes: Sequence[tuple[int, int, int]], **arguments: object) -> GraphINN:
    """Build a graph with one flow for each layer, side by side."""
    inputs = [InputNode(*shape, name=f"layer {number}") for number, shape in enumerate(shapes)]
    middle = [Node(node, LayerFlow, arguments) for node in inputs]
    return GraphINN([*inputs, *middle, *(OutputNode(node) for node in middle)])


class FeatureMapFlowModel(FlowModel):
    """Density of the reduced feature maps of a frozen network, one flow per layer; says where it is low.

    Every position of a layer's map of C channels gets a descriptor of 2 C numbers: its feature vector, and the mean of
    the L2-normalised vectors in the 3 × 3 positions around it (Roth et al. 2022, section 3.1, pool likewise). The two
    halves are scaled to one total variance, projected onto the D principal directions over all positions and training
    images, and standardised.

    The layout of the whole map, D × h × w values, is whitened next. With its leading principal directions W over the
    training images (k of them, variances u, the mean variance of the rest r, the mean map m)::

        w = (x - m) / sqrt(r) + W (1 / sqrt(u) - 1 / sqrt(r)) W^T (x - m)

    is invertible, and it is a map as before: what varies from image to image as a whole (light, texture) no longer
    stands out, what a single place does to itself still does. Alone it is the Gaussian of probabilistic PCA (Tipping
    and Bishop 1999, section 3) of whole maps. A flow of couplings models w. Couplings scale and shift each value, so
    that the density has a share for each direction d at each position p::

        a(d, p) = 1/2 z(d, p)^2 - sum of log-scales at (d, p) + constant

    whose constant holds the log-determinants of standardising and whitening, the latter spread evenly. The shares sum
    to −log p of the reduced map. The anomaly map is their sum over the directions: many directions show
    well where something is. The image score takes the leading ``score_dims`` directions alone, which say best whether
    an image belongs: they change with what it shows, the others with its texture.

    With ``tail``, what the projection leaves out at a position has an isotropic Gaussian, whose share of the density
    joins the anomaly map.

    Args:
        backbone: A timm name or ``local-dir:FOLDER``.
        layers: Layers by timm's module names (``blocks.4``) or indices; by default the one of
            :func:`anomalib_flowood.features.default_layers`.
        image_size: Height and width of the images.
        pre_trained: Load the backbone's weights.
        subspace_dim: D, the principal directions of each layer's descriptors; all where a layer has fewer.
        layout_dims: k, the directions of the layout; at most one for five training images are used.
        tail: Add a Gaussian for the discarded directions of each position.
        mask: Coupling mask, one of :data:`anomalib_flowood.flows.MASKS`.
        subnet: s,t-network, one of :data:`anomalib_flowood.flows.SUBNETS`.
        bottleneck_dim: Numbers that pass the squeeze of the ``bottleneck`` network.
        coupling_layers: Number of couplings.
        hidden_channels: Width of the s,t-networks.
        score_dims: Leading directions of each layer that make the image score.
        score_fraction: The image score is a mean over the positions where those directions are least likely, this
            share of all positions.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense.
        BackboneUnavailableError: If the backbone's weights cannot be had.
    """

    parts = 3

    map_mean: Tensor
    map_std: Tensor
    score_mean: Tensor
    score_std: Tensor

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str | int] | None = None,
        image_size: tuple[int, int] = (224, 224),
        *,
        pre_trained: bool = True,
        subspace_dim: int = 96,
        layout_dims: int = 128,
        tail: bool = True,
        mask: str = "cycle",
        subnet: str = "bottleneck",
        bottleneck_dim: int = 128,
        coupling_layers: int = 4,
        hidden_channels: int = 256,
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
        shapes = [(min(subspace_dim, 2 * layer.shape[1]), *layer.shape[2:]) for layer in maps]
        for layer, (_, height, width) in zip(network.feature_info.module_name(), shapes, strict=True):  # type: ignore[operator, union-attr]
            if min(height, width) < 2:
                msg = (
                    f"The map of layer {layer!r} has {height} x {width} positions for images of {image_size[0]} x "
                    f"{image_size[1]}, which leaves a coupling nothing to work with. Use larger images, an earlier "
                    "layer, or EmbeddingFlow."
                )
                raise ValueError(msg)
        new_flow = partial(
            _layer_flows,
            shapes,
            mask=mask,
            subnet=subnet,
            coupling_layers=coupling_layers,
            hidden_channels=hidden_channels,
            bottleneck_dim=bottleneck_dim,
        )
        tail_dims = [2 * layer.shape[1] - shape[0] for layer, shape in zip(maps, shapes, strict=True)]
        dims = sum(
            math.prod(shape) + tail * left * math.prod(shape[1:]) for shape, left in zip(shapes, tail_dims, strict=True)
        )
        super().__init__(new_flow, dims, levels=1)
        self._tail_dims = tail_dims
        # The graph sorts its modules in an order of its own; its inputs are in ours.
        modules = list(self.flow.module_list)
        self._places = [modules.index(node.outputs[0][0].module) for node in self.flow.in_nodes]
        self.backbone = network
        height, width = image_size
        self.image_size = (height, width)
        self.tail = tail
        self.score_dims = score_dims
        self.score_fraction = score_fraction
        for number, (layer, shape) in enumerate(zip(maps, shapes, strict=True)):
            channels = 2 * layer.shape[1]
            self.register_buffer(f"scale_{number}", torch.ones(channels))
            self.register_buffer(f"mean_{number}", torch.zeros(channels))
            self.register_buffer(f"components_{number}", torch.zeros(shape[0], channels))
            self.register_buffer(f"variances_{number}", torch.ones(shape[0]))
            self.register_buffer(f"tail_variance_{number}", torch.ones(()))
            self.register_buffer(f"layout_mean_{number}", torch.zeros(shape))
            self.register_buffer(f"layout_directions_{number}", torch.zeros(layout_dims, math.prod(shape)))
            self.register_buffer(f"layout_variances_{number}", torch.ones(layout_dims))
            self.register_buffer(f"layout_rest_{number}", torch.ones(()))
        # Location and scale of each layer's map and of its leading directions on normal images, to bring layers to a
        # common scale.
        for name in ("map", "score"):
            self.register_buffer(f"{name}_mean", torch.zeros(len(shapes)))
            self.register_buffer(f"{name}_std", torch.ones(len(shapes)))

    @property
    def layer_flows(self) -> list[LayerFlow]:
        """The flow of each layer."""
        return self._layers_of(self.flow)

    def _layers_of(self, flow: InvertibleModule) -> list[LayerFlow]:
        return [flow.module_list[place] for place in self._places]

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
        images = self.checked(images, size=self.image_size)
        return run_backbone(self.backbone, images)

    def fit_subspaces(self, maps: tuple[Tensor, ...]) -> None:
        """Fit each layer's principal subspace over positions and images.

        Args:
            maps: The feature maps of all training images, one tensor ``(N, C, h, w)`` for each layer; in main memory,
                if they are many.

        Raises:
            ValueError: If there are fewer than 3 images, or the features are all alike or vary in too few directions.
        """
        if len(maps[0]) < 3:
            msg = f"A density of whole maps needs at least 3 training images, more are better; got {len(maps[0])}."
            raise ValueError(msg)
        for number, layer in enumerate(maps):
            components = getattr(self, f"components_{number}")
            vectors = _descriptors(layer, components).double().cpu().numpy()
            directions, channels = components.shape
            if directions >= len(vectors):
                msg = (
                    f"{len(vectors)} positions have no {directions} principal directions: give more training images, "
                    f"or set subspace_dim to at most {max(1, len(vectors) // 2)}."
                )
                raise ValueError(msg)
            # Both halves of a descriptor get one total variance.
            totals = vectors.var(axis=0).reshape(2, -1).sum(axis=1)
            scale = (1 / np.sqrt(np.maximum(totals, 1e-12))).repeat(channels // 2)
            pca = PCA(n_components=directions, svd_solver="covariance_eigh").fit(vectors * scale)
            variances = torch.from_numpy(pca.explained_variance_)
            if totals.min() <= 1e-10 or float(variances[-1]) <= 1e-8 * float(variances[0]):
                msg = (
                    f"The features of layer {number} vary in fewer than subspace_dim={directions} directions: "
                    "are the training images all the same, or constant? Set subspace_dim lower."
                )
                raise ValueError(msg)
            tail = torch.tensor(pca.noise_variance_)  # mean variance of what is left out
            for name, value in (
                ("scale", torch.from_numpy(scale)),
                ("mean", torch.from_numpy(pca.mean_)),
                ("components", torch.from_numpy(pca.components_)),
                ("variances", variances),
                # A floor for descriptors that lie in the subspace.
                ("tail_variance", torch.maximum(tail, 1e-3 * variances[-1])),
            ):
                getattr(self, f"{name}_{number}").copy_(value)
            self._fit_layout(number, layer)

    def _fit_layout(self, number: int, layer: Tensor) -> None:
        """Fit the whitening of a layer's whole maps."""
        n = len(layer)
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:_LAYOUT_IMAGES].sort().values
        maps = torch.cat([self._standardise(number, layer[some])[0].flatten(1) for some in drawn.split(_CHUNK)])
        mean, directions, variances, rest = (
            getattr(self, f"layout_{name}_{number}") for name in ("mean", "directions", "variances", "rest")
        )
        centre = maps.mean(0)
        mean.copy_(centre.unflatten(0, mean.shape))
        total = maps.var(0).sum()
        rank = min(len(directions), len(maps) // _IMAGES_PER_LAYOUT_DIRECTION)
        pca = PCA(n_components=rank, random_state=0).fit((maps - centre).cpu().numpy()) if rank else None
        kept = torch.from_numpy(pca.explained_variance_).to(total) if pca else total.new_zeros(0)
        rest.copy_(((total - kept.sum()) / (maps.shape[1] - rank)).clamp(min=1e-6))
        # Directions that are not used are zero, and their variances without effect.
        directions.zero_()
        variances.copy_(rest.expand_as(variances))
        if pca:
            directions[:rank] = torch.from_numpy(pca.components_).to(directions)
            variances[:rank] = torch.maximum(kept, rest)

    @flows.full_precision
    def _whiten(self, number: int, standardised: Tensor) -> Tensor:
        mean, directions, variances, rest = (
            getattr(self, f"layout_{name}_{number}") for name in ("mean", "directions", "variances", "rest")
        )
        centred = standardised - mean
        coordinates = centred.flatten(1) @ directions.T
        leading = (coordinates * (variances.rsqrt() - rest.rsqrt())) @ directions
        return centred * rest.rsqrt() + leading.unflatten(1, mean.shape)

    def _log_scale(self, number: int) -> Tensor:
        """Mean log-scale per value that standardising and whitening take away, for each direction: ``(D, 1, 1)``."""
        mean, variances, rest = (getattr(self, f"layout_{name}_{number}") for name in ("mean", "variances", "rest"))
        whitening = 0.5 * (variances / rest).log().sum() / mean.numel() + 0.5 * rest.log()
        return (0.5 * getattr(self, f"variances_{number}").log() + whitening)[:, None, None]

    def reduce(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Turn feature maps into what the flow models: descriptors, projected, standardised, their layout whitened.

        Args:
            maps: One map for each layer, ``(N, C, h, w)``. They may lie on another device than the model, and have
                another precision.

        Returns:
            One map for each layer, ``(N, D, h, w)``; with ``tail``, ``(N, D + 1, h, w)``, the last of them what the
            discarded directions add to −log p at each position.
        """
        reduced = []
        for number, layer in enumerate(maps):
            standardised, tail = self._standardise(number, layer)
            parts = [self._whiten(number, standardised)]
            if self.tail:
                parts.append(tail)
            reduced.append(torch.cat(parts, dim=1))
        return tuple(reduced)

    @flows.full_precision
    def _standardise(self, number: int, layer: Tensor) -> tuple[Tensor, Tensor]:
        """Return the standardised principal coordinates, ``(N, D, h, w)``, and the tail's share, ``(N, 1, h, w)``."""
        scale, mean, components, variances, tail_variance = (
            getattr(self, f"{name}_{number}") for name in ("scale", "mean", "components", "variances", "tail_variance")
        )
        described = _describe(layer.to(scale)) * scale[:, None, None] - mean[:, None, None]
        coordinates = functional.conv2d(described, components[:, :, None, None])
        left = (described.square().sum(1, keepdim=True) - coordinates.square().sum(1, keepdim=True)).clamp(min=0)
        constant = 0.5 * self._tail_dims[number] * torch.log(2 * math.pi * tail_variance)
        return coordinates * variances.rsqrt()[:, None, None], 0.5 * left / tail_variance + constant

    def inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Extract and reduce feature maps.

        Args:
            images: Pre-processed images, ``(N, 3, H, W)``.

        Returns:
            What :meth:`reduce` returns.

        Raises:
            ValueError: If a pixel is NaN or infinite, or the images have another size than the model's.
        """
        return self.reduce(self.extract(images))

    def density(self, inputs: Inputs, flow: InvertibleModule | None = None) -> Density:
        """Evaluate the density of reduced maps, as it was before they were standardised and whitened.

        Parts: latents, log-determinants (those of standardising and whitening included), and the tail.
        """
        shares = []
        radius = torch.zeros(len(inputs[0]), dtype=inputs[0].dtype, device=inputs[0].device)
        for number, (layer, layer_flow) in enumerate(zip(inputs, self._layers_of(flow or self.flow), strict=True)):
            standardised, tail = self._split(number, layer)
            (z,), log_det = layer_flow((standardised,))
            scales = self._log_scale(number).expand(standardised.shape[1:]).sum()
            base = flows.standard_normal_log_prob(z)
            shares.append(-torch.stack([base, log_det - scales, -tail.flatten(1).sum(1)], dim=1))
            radius = radius + z.square().flatten(1).sum(1)
        parts = torch.stack(shares).sum(0)
        return Density(-parts.sum(1), radius.sqrt(), parts)

    def layer_maps(self, reduced: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        """Return, for each layer, its anomaly map and the share that the leading directions have in it.

        Returns:
            Pairs of ``(N, h, w)``, nats. The values of all anomaly maps sum to −log p.
        """
        maps = []
        for number, (layer, flow) in enumerate(zip(reduced, self.layer_flows, strict=True)):
            standardised, tail = self._split(number, layer)
            z, scales = flow.latents_and_scales(standardised)
            shares = 0.5 * (z.square() + math.log(2 * math.pi)) - scales + self._log_scale(number)
            maps.append((shares.sum(1) + tail.sum(1), shares[:, : self.score_dims].sum(1)))
        return maps

    def fit_map_scale(self, reduced: tuple[Tensor, ...]) -> None:
        """Set the location and scale by which layers are brought together, from normal images' reduced maps."""
        for number, maps in enumerate(self.layer_maps(reduced)):
            for name, values in zip(("map", "score"), maps, strict=True):
                getattr(self, f"{name}_mean")[number] = values.mean()
                getattr(self, f"{name}_std")[number] = values.std().clamp(min=1e-6)

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
        for number, (layer, leading) in enumerate(self.layer_maps(inputs)):
            layer = ((layer - self.map_mean[number]) / self.map_std[number])[:, None]
            maps.append(functional.interpolate(layer, size=self.image_size, mode="bicubic", align_corners=False))
            leading = ((leading - self.score_mean[number]) / self.score_std[number]).flatten(1)
            highest = leading.topk(max(1, round(self.score_fraction * leading.shape[1])), dim=1).values
            scores.append(highest.mean(1))
        score = torch.stack(scores).mean(0)
        score = torch.where(torch.isnan(score), torch.full_like(score, float("inf")), score)
        return InferenceBatch(pred_score=score, anomaly_map=torch.stack(maps).mean(0))

    def _split(self, number: int, layer: Tensor) -> tuple[Tensor, Tensor]:
        """Split a reduced map into standardised coordinates and the tail's share, which may have no channel."""
        directions = len(getattr(self, f"variances_{number}"))
        return layer[:, :directions], layer[:, directions:]


def _describe(layer: Tensor) -> Tensor:
    """Return every position's descriptor, before scaling: ``(N, C, h, w)`` to ``(N, 2 C, h, w)``."""
    directions = functional.normalize(layer, dim=1)
    return torch.cat([layer, functional.avg_pool2d(directions, 3, 1, 1, count_include_pad=False)], dim=1)


def _descriptors(layer: Tensor, like: Tensor) -> Tensor:
    """Draw descriptors from the maps of all training images, ``(N, C, h, w)``: at most ``(_FIT_POSITIONS, 2 C)``.

    They are of the device and the precision of another tensor.
    """
    n, _, height, width = layer.shape
    positions = height * width
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(n * positions, generator=generator)[:_FIT_POSITIONS].sort().values
    parts = []
    for start, chunk in zip(range(0, n, _CHUNK), layer.split(_CHUNK), strict=True):
        inside = drawn[(drawn >= start * positions) & (drawn < (start + len(chunk)) * positions)] - start * positions
        parts.append(_describe(chunk.to(like)).permute(0, 2, 3, 1).flatten(0, 2)[inside])
    return torch.cat(parts)
