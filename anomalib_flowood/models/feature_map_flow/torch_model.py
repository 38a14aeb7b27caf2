# SPDX-License-Identifier: Apache-2.0
"""PyTorch model of FeatureMapFlow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from anomalib.data import InferenceBatch
from FrEIA.framework import GraphINN, InputNode, Node, OutputNode
from FrEIA.modules import InvertibleModule
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional

from anomalib_flowood import flows
from anomalib_flowood.backbones import create_feature_maps, run_backbone
from anomalib_flowood.models.components import FlowModel, check_images

_FIT_POSITIONS = 60_000
"""Positions from which the principal subspaces are fitted; more change nothing but the time."""


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


class FeatureMapFlowModel(FlowModel):
    """Density of the reduced feature maps of a frozen network, one flow per layer; says where it is low.

    A layer's map, of C channels at h × w positions, is projected onto the d principal directions of its channels over
    all positions and training images, and standardised. A flow models the whole d × h × w map at once. At every
    position p the anomaly map is::

        a(p) = 1/2 |z(p)|^2 - sum of log-scales at p + 1/2 sum log v + d/2 log(2 pi)

    and its sum over the positions is −log p of the reduced map.

    Args:
        backbone: A timm name or ``local-dir:FOLDER``.
        layers: Layers by timm's module names (``blocks.4``) or indices.
        image_size: Height and width of the images.
        pre_trained: Load the backbone's weights.
        subspace_dim: d, the principal directions of each layer's channels; all channels where a layer has fewer.
        mask: Coupling mask, one of :data:`anomalib_flowood.flows.MASKS`.
        subnet: s,t-network, one of :data:`anomalib_flowood.flows.SUBNETS`.
        bottleneck_dim: Numbers that pass the squeeze of the ``bottleneck`` network.
        coupling_layers: Number of couplings.
        hidden_channels: Width of the s,t-networks.
        score_fraction: The image score is the mean of the highest values of the anomaly map, this share of them.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense.
        BackboneUnavailableError: If the backbone's weights cannot be had.
    """

    map_mean: Tensor
    map_std: Tensor

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str | int] = ("blocks.4",),
        image_size: tuple[int, int] = (224, 224),
        *,
        pre_trained: bool = True,
        subspace_dim: int = 48,
        mask: str = "cycle",
        subnet: str = "bottleneck",
        bottleneck_dim: int = 32,
        coupling_layers: int = 8,
        hidden_channels: int = 256,
        score_fraction: float = 1.0,
    ) -> None:
        if not 0 < score_fraction <= 1:
            msg = f"score_fraction must be above 0 and at most 1, got {score_fraction}."
            raise ValueError(msg)
        network = create_feature_maps(backbone, layers, pre_trained=pre_trained)
        with torch.no_grad():
            maps = network(torch.zeros(1, 3, *image_size))
        shapes = [(min(subspace_dim, layer.shape[1]), *layer.shape[2:]) for layer in maps]
        inputs = [InputNode(*shape, name=f"layer {number}") for number, shape in enumerate(shapes)]
        arguments = {
            "mask": mask,
            "subnet": subnet,
            "coupling_layers": coupling_layers,
            "hidden_channels": hidden_channels,
            "bottleneck_dim": bottleneck_dim,
        }
        middle = [Node(node, LayerFlow, arguments) for node in inputs]
        graph = GraphINN([*inputs, *middle, *(OutputNode(node) for node in middle)])
        super().__init__(graph, sum(math.prod(shape) for shape in shapes), levels=1)
        # The graph sorts its modules in an order of its own.
        self._places = [list(graph.module_list).index(node.module) for node in middle]
        self.backbone = network
        self.image_size = tuple(image_size)
        self.score_fraction = score_fraction
        for number, (layer, shape) in enumerate(zip(maps, shapes, strict=True)):
            self.register_buffer(f"mean_{number}", torch.zeros(layer.shape[1]))
            self.register_buffer(f"components_{number}", torch.zeros(shape[0], layer.shape[1]))
            self.register_buffer(f"variances_{number}", torch.ones(shape[0]))
        # Location and scale of each layer's anomaly map on normal images, to bring layers to a common scale.
        self.register_buffer("map_mean", torch.zeros(len(shapes)))
        self.register_buffer("map_std", torch.ones(len(shapes)))

    @property
    def layer_flows(self) -> list[LayerFlow]:
        """The flow of each layer."""
        return [self.flow.module_list[place] for place in self._places]

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
            ValueError: If a pixel is NaN or infinite.
        """
        check_images(images)
        return run_backbone(self.backbone, images)

    def fit_subspaces(self, maps: tuple[Tensor, ...]) -> None:
        """Fit each layer's principal subspace over positions and images.

        Args:
            maps: The feature maps of all training images, one tensor ``(N, C, h, w)`` for each layer.

        Raises:
            ValueError: If the features are all alike, or vary in too few directions.
        """
        generator = torch.Generator().manual_seed(0)
        for number, layer in enumerate(maps):
            components = getattr(self, f"components_{number}")
            n, _, height, width = layer.shape
            count = min(_FIT_POSITIONS, n * height * width)
            place = torch.randperm(n * height * width, generator=generator)[:count].sort().values
            image, row, column = place // (height * width), place // width % height, place % width
            # One channel vector for each position drawn; NumPy's solver runs once per fit.
            vectors = layer[image, :, row, column].double().numpy()
            if len(components) >= count:
                msg = f"{count} positions have no {len(components)} principal directions: give more training images."
                raise ValueError(msg)
            pca = PCA(n_components=len(components), random_state=0).fit(vectors)
            variances = torch.from_numpy(pca.explained_variance_)
            if float(variances[-1]) <= 1e-8 * float(variances[0]) or float(variances[0]) <= 1e-12:
                msg = (
                    f"The features of layer {number} vary in fewer than subspace_dim={len(components)} directions: "
                    "are the training images all the same, or constant? Set subspace_dim lower."
                )
                raise ValueError(msg)
            getattr(self, f"mean_{number}").copy_(torch.from_numpy(pca.mean_))
            components.copy_(torch.from_numpy(pca.components_))
            getattr(self, f"variances_{number}").copy_(variances)

    def reduce(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Project feature maps onto their principal directions and standardise them.

        Args:
            maps: One map for each layer, ``(N, C, h, w)``.

        Returns:
            One map for each layer, ``(N, d, h, w)``.
        """
        reduced = []
        for number, layer in enumerate(maps):
            components = getattr(self, f"components_{number}")
            scale = getattr(self, f"variances_{number}").rsqrt()
            weight = (components * scale[:, None])[:, :, None, None]
            bias = -(components @ getattr(self, f"mean_{number}")) * scale
            reduced.append(functional.conv2d(layer.to(weight.dtype), weight, bias))
        return tuple(reduced)

    def reduced_log_prob(self, reduced: tuple[Tensor, ...]) -> Tensor:
        """Log-density of reduced maps, before their standardisation; nats, ``(N,)``."""
        total = torch.zeros(len(reduced[0]), dtype=reduced[0].dtype, device=reduced[0].device)
        for number, (layer, flow) in enumerate(zip(reduced, self.layer_flows, strict=True)):
            (z,), log_det = flow((layer,))
            positions = layer.shape[2] * layer.shape[3]
            scales = 0.5 * positions * getattr(self, f"variances_{number}").log().sum()
            total = total + flows.standard_normal_log_prob(z) + log_det - scales
        return total

    def log_prob(self, images: Tensor) -> Tensor:
        """Log-density of the images' reduced feature maps.

        Args:
            images: Pre-processed images, ``(N, 3, H, W)``.

        Returns:
            Nats, ``(N,)``.

        Raises:
            ValueError: If a pixel is NaN or infinite.
        """
        return self.reduced_log_prob(self.reduce(self.extract(images)))

    def layer_maps(self, reduced: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the anomaly map of each layer, ``(N, h, w)``; all of their values sum to −log p."""
        maps = []
        for number, (layer, flow) in enumerate(zip(reduced, self.layer_flows, strict=True)):
            z, scales = flow.latents_and_scales(layer)
            constant = 0.5 * (getattr(self, f"variances_{number}").log() + math.log(2 * math.pi)).sum()
            maps.append((0.5 * z.square() - scales).sum(1) + constant)
        return maps

    def fit_map_scale(self, reduced: tuple[Tensor, ...]) -> None:
        """Set the location and scale by which layers are brought together, from normal images' reduced maps."""
        for number, layer in enumerate(self.layer_maps(reduced)):
            self.map_mean[number] = layer.mean()
            self.map_std[number] = layer.std().clamp(min=1e-6)

    def score_maps(self, reduced: tuple[Tensor, ...]) -> InferenceBatch:
        """Score reduced maps.

        Returns:
            A batch with ``anomaly_map``, ``(N, 1, H, W)``: the layers' maps in units of their standard deviation over
            normal images, up-sampled and averaged; and ``pred_score``, ``(N,)``: the mean of its highest values.
        """
        maps = []
        for number, layer in enumerate(self.layer_maps(reduced)):
            layer = ((layer - self.map_mean[number]) / self.map_std[number])[:, None]
            maps.append(functional.interpolate(layer, size=self.image_size, mode="bilinear", align_corners=False))
        anomaly_map = torch.stack(maps).mean(0)
        values = anomaly_map.flatten(1)
        top = values.topk(max(1, round(self.score_fraction * values.shape[1])), dim=1).values
        score = top.mean(1)
        score = torch.where(torch.isnan(score), torch.full_like(score, float("inf")), score)
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score pre-processed images, ``(N, 3, H, W)``; see :meth:`score_maps`."""
        return self.score_maps(self.reduce(self.extract(images)))
