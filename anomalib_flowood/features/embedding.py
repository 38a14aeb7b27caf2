# SPDX-License-Identifier: Apache-2.0
"""Embeddings of images: a frozen network's pooled features, and the layout of its maps, which pooling discards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional

from anomalib_flowood.flows import Computed, draw, full_precision

from .backbones import PooledAndMaps, run_backbone
from .catalogue import default_layers, feature_layers

_GRID = 7
"""Positions per side, about, to which larger maps are pooled."""

_FIT_POSITIONS = 60_000
"""The most positions that the directions of feature vectors are fitted to, to save time."""


class Embedding(nn.Module):
    """Embeddings of length 1 from one pass of a frozen backbone.

    An embedding has D numbers: the network's pooled features, and for each of ``layers`` the layout of its map. At
    every position of the map the feature vector is projected onto the leading principal directions (``map_dims`` of
    them, over all positions and training images) and divided by the fourth root of their variances, so that none of
    them drowns the others. Each part is brought to the same length, and the whole to length 1.

    Args:
        backbone: A timm name or ``local-dir:FOLDER``, see :mod:`anomalib_flowood.features.catalogue`.
        layers: Layers by timm's module names (``blocks.4``) or indices; by default the one of
            :func:`anomalib_flowood.features.default_layers`, where things are, and the network's last, what they are.
            An empty list for the pooled features alone.
        image_size: Height and width of the images; by default the size that the backbone was trained at.
        pre_trained: Load the backbone's weights.
        map_dims: Principal directions of each layer's feature vectors; all where a layer has fewer channels.

    Raises:
        ValueError: If a name is unknown, ``map_dims`` is below 1, or the backbone takes no images of this size.
        BackboneUnavailableError: If the backbone's weights cannot be had.
    """

    dims: int
    """D, the numbers of an embedding."""
    part_dims: list[int]
    """Those of its parts: of the pooled features, then of each layout."""
    image_size: tuple[int, int]
    """Height and width of the images."""

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str | int] | None = None,
        image_size: tuple[int, int] | None = None,
        *,
        pre_trained: bool = True,
        map_dims: int = 32,
    ) -> None:
        super().__init__()
        if map_dims < 1:
            msg = f"map_dims must be at least 1, got {map_dims}."
            raise ValueError(msg)
        layers = _default_layers(backbone) if layers is None else layers
        self.network = PooledAndMaps(backbone, layers, pre_trained=pre_trained, image_size=image_size)
        height, width = image_size or self.network.pretrained_cfg["input_size"][-2:]
        self.image_size = (height, width)
        with torch.no_grad():
            pooled, *maps = self.network(torch.zeros(1, 3, height, width))
        grids = [_to_grid(layer) for layer in maps]
        self.layouts = nn.ModuleList(Layout(layer.shape[1], map_dims) for layer in grids)
        self.part_dims = [pooled.shape[1]] + [
            len(layout.directions) * grid[0, 0].numel()  # type: ignore[arg-type]
            for layout, grid in zip(self.layouts, grids, strict=True)
        ]
        self.dims = sum(self.part_dims)

    @property
    def part_names(self) -> list[str]:
        """The names of the parts."""
        return ["pooled features", *(f"layout of {name}" for name in self.network.layer_names)]

    def train(self, mode: bool = True) -> Embedding:
        """Set the mode; the backbone is frozen, its batch norms included."""
        super().train(mode)
        self.network.eval()
        return self

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the features that embeddings are made of.

        Args:
            images: Images as the backbone wants them, ``(N, 3, H, W)``, in the precision of its weights.

        Returns:
            The pooled features, ``(N, P)``, and for each layer its map, ``(N, C, h, w)``.
        """
        pooled, *maps = run_backbone(self.network, images)
        return (pooled, *(_to_grid(layer) for layer in maps))

    def fit(self, features: tuple[Tensor, ...]) -> None:
        """Fit the principal directions of each layer's feature vectors, over all positions and images.

        Args:
            features: What :meth:`extract` returns for the training images; in main memory or mapped to a file, if they
                are many.
        """
        for layout, layer in zip(self.layouts, features[1:], strict=True):
            layout.fit(layer)  # type: ignore[operator]

    @full_precision
    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """Make embeddings from what :meth:`extract` returned.

        Args:
            features: They may lie on another device than the module, and have another precision.

        Returns:
            Embeddings of length 1, ``(N, D)``.
        """
        like = next(self.network.parameters())  # of the device and precision of the module, with or without layers
        pooled, *maps = (part.to(like) for part in features)
        parts = [pooled, *(layout(layer).flatten(1) for layout, layer in zip(self.layouts, maps, strict=True))]
        length = math.sqrt(len(parts))
        return torch.cat([functional.normalize(part, dim=1) / length for part in parts], dim=1)

    def of_stored(self, features: tuple[Tensor, ...]) -> Computed:
        """Embeddings of stored features, ``(N, D)``, on the module's device, computed when they are asked for."""
        return Computed(self, features)


class Layout(nn.Module):
    """Projects the feature vectors of a map onto their principal directions, position by position.

    Args:
        channels: C, the numbers of a feature vector.
        dims: The most directions d to keep.
    """

    mean: Tensor
    """Mean feature vector, ``(C,)``."""
    directions: Tensor
    """Directions over the fourth roots of their variances, ``(d, C)``; zero before a fit, and beyond the rank."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("directions", torch.zeros(min(dims, channels), channels))

    def fit(self, layer: Tensor) -> None:
        """Fit mean and directions.

        Args:
            layer: The map of all training images, ``(N, C, h, w)``, on any device.
        """
        images, _, height, width = layer.shape
        drawn = draw(images * height * width, _FIT_POSITIONS)
        image, place = drawn // (height * width), drawn % (height * width)
        vectors = layer[image, :, place // width, place % width]
        pca = PCA(svd_solver="covariance_eigh").fit(vectors.cpu().double().numpy())
        count = len(self.directions)
        variances = torch.from_numpy(pca.explained_variance_[:count])
        scale = variances.clamp(min=max(1e-6 * float(variances[0]), 1e-12)) ** -0.25
        self.mean.copy_(torch.from_numpy(pca.mean_))
        self.directions.zero_()
        self.directions[: len(variances)] = (torch.from_numpy(pca.components_[:count]) * scale[:, None]).to(
            self.directions
        )

    def forward(self, layer: Tensor) -> Tensor:
        """Project a map, ``(N, C, h, w)``, of this module's device and precision: ``(N, d, h, w)``."""
        return functional.conv2d(layer - self.mean[:, None, None], self.directions[:, :, None, None])


def _default_layers(backbone: str) -> list[str]:
    """Return the last layer of stride 16 or less, as :func:`default_layers` does, and the last one of all."""
    last = list(feature_layers(backbone))[-1]
    return list(dict.fromkeys([*default_layers(backbone), last]))


def _to_grid(layer: Tensor) -> Tensor:
    """Pool a map, ``(N, C, h, w)``, to about seven positions to a side; smaller ones stay as they are."""
    kernel = [max(1, round(length / _GRID)) for length in layer.shape[2:]]
    return functional.avg_pool2d(layer, kernel) if max(kernel) > 1 else layer
