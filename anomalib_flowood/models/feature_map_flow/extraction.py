# SPDX-License-Identifier: Apache-2.0
"""The backbone of FeatureMapFlow, and its input: whole images, or their tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize

from anomalib_flowood.data.items import in_unit_range
from anomalib_flowood.features import default_layers, layer_indices, run_backbone
from anomalib_flowood.models.components import FlowModel
from anomalib_flowood.models.components.flow_model import check_images, check_precision

from .tiles import Tiles

MAP_STRIDES = (8, 16)
"""Strides of the layers that show small defects; finer maps show only edges."""
SCORE_STRIDES = (32,)
"""Stride of the layer that tells whether an image belongs as a whole."""


def indices_of(backbone: str, layers: Sequence[str | int] | None, strides: Sequence[int]) -> list[int]:
    """Return the indices of layers of a backbone; by default of the last ones of the given strides."""
    return layer_indices(backbone, default_layers(backbone, strides) if layers is None else layers)


class MapExtraction(FlowModel):
    """A density of the feature maps of a frozen backbone, which sees whole images or their tiles."""

    backbone: nn.Module
    image_size: tuple[int, int]
    tiles: Tiles | None
    normalise: Normalize | None
    """Normalisation of tiles for the backbone."""

    def train(self, mode: bool = True) -> MapExtraction:
        """Set the flow's mode; the backbone stays in evaluation mode, batch norms included."""
        super().train(mode)
        self.backbone.eval()
        return self

    @property
    def tiler(self) -> Tiles | None:
        """The tiles, which ``anomalib.callbacks.TilerConfigurationCallback`` may set only to the same ones."""
        return self.tiles

    @tiler.setter
    def tiler(self, tiler: object) -> None:
        if self.tiles != tiler:
            msg = (
                "The flow is built for tiles of one size: give the detector tile_size and tile_stride, and the size of "
                "whole images as image_size. The callback may name the same, without a removed border."
            )
            raise ValueError(msg)

    def extract(self, images: Tensor, which: Sequence[Sequence[int]] | None = None) -> tuple[Tensor, ...]:
        """Return the feature maps of pre-processed images.

        Args:
            images: Images normalised for the backbone, ``(N, 3, H, W)``; with tiles, images in [0, 1], or bytes, of
                which tiles are converted to floats.
            which: For each image the indices of the wanted tiles, equally many; all by default.

        Returns:
            One map for each layer, ``(N, C, h, w)``, or ``(N, T, C, h, w)`` with T tiles.

        Raises:
            ValueError: If a pixel is NaN or infinite, or the images have another size than the model's.
        """
        self.check(images)
        if self.tiles is None:
            return run_backbone(self.backbone, images.to(self.dtype))
        chosen: Sequence[Sequence[int] | None] = which or [None] * len(images)
        of_images = [list(self.tile_maps(*one)) for one in zip(images, chosen, strict=True)]
        layers = zip(*([torch.cat(parts) for parts in zip(*image, strict=True)] for image in of_images), strict=True)
        return tuple(torch.stack(layer) for layer in layers)

    def check(self, images: Tensor) -> None:
        """Check that images can be scored; errors as for :meth:`extract`."""
        check_precision(self.dtype)
        check_images(images, size=self.image_size)

    def tile_maps(self, image: Tensor, which: Sequence[int] | None = None) -> Iterator[tuple[Tensor, ...]]:
        """Yield the feature maps of an image's tiles, in batches of tiles."""
        assert self.tiles is not None and self.normalise is not None  # noqa: PT018
        for tiles in self.tiles.cut(image, which):
            yield run_backbone(self.backbone, self.normalise(in_unit_range(tiles).to(self.dtype)))

    def alone(self, part: Tensor) -> Tensor:
        """Merge the axes of images and tiles, if there are tiles: ``(N, T, ...)`` to ``(N * T, ...)``."""
        return part if self.tiles is None else part.flatten(0, 1)
