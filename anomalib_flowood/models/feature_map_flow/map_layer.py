# SPDX-License-Identifier: Apache-2.0
"""What comes before the flow of one layer of FeatureMapFlow."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from anomalib_flowood import flows
from anomalib_flowood.features import Descriptors

_LAYOUT_IMAGES = 2_000
"""Training images from which the layout's directions are fitted."""

_CHUNK = 256
"""Images whose maps are described at once."""


class MapLayer(nn.Module):
    """What comes before the flow of one layer: descriptors, their principal subspace, and whitened whole maps.

    Args:
        name: The layer's name, for errors.
        channels: C, the channels of the layer's map.
        shape: ``(D, h, w)`` of the reduced map.
        layout_dims: Directions of whole maps that are whitened.

    Raises:
        ValueError: If the map has one row or column of positions only.
    """

    location: Tensor
    """Mean over normal images of the anomaly map, and of the leading directions' share; ``(2,)``, nats."""
    spread: Tensor
    """Their standard deviations, ``(2,)``, by which layers are brought to a common scale."""

    def __init__(self, name: str, channels: int, shape: tuple[int, int, int], layout_dims: int) -> None:
        super().__init__()
        if min(shape[1:]) < 2:
            msg = (
                f"The map of layer {name!r} has {shape[1]} x {shape[2]} positions, which leaves a coupling nothing to "
                "work with. Use larger images (image_size), an earlier layer, or EmbeddingFlow."
            )
            raise ValueError(msg)
        self.name = name
        self.descriptors = Descriptors(channels, name)
        self.subspace = flows.PrincipalSubspace(2 * channels, shape[0])
        self.whitening = flows.Whitening([shape], layout_dims)
        self.register_buffer("location", torch.zeros(2))
        self.register_buffer("spread", torch.ones(2))

    def fit(self, maps: Tensor) -> None:
        """Fit to the maps of all training images, ``(N, C, h, w)``; errors as for what is fitted."""
        described = self.descriptors.fit(maps)
        self.subspace.fit(described, what=f"descriptors of layer {self.name}", solver="covariance_eigh")
        drawn = torch.randperm(len(maps), generator=torch.Generator().manual_seed(0))[:_LAYOUT_IMAGES].sort().values
        chunks = [self.subspace(self.descriptors(maps[some]))[0] for some in drawn.split(_CHUNK)]
        self.whitening.fit(torch.cat(chunks))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce maps, ``(N, C, h, w)``.

        Returns:
            What the flow models, ``(N, D, h, w)``, and what else belongs to the log-density at each position,
            ``(N, h, w)``, nats; the log-determinant of the whitening is spread evenly.
        """
        coordinates, rest = self.subspace(self.descriptors(maps))
        whitened, _ = self.whitening.transform(coordinates, rev=False)
        return whitened, rest + self.whitening.log_det / math.prod(rest.shape[1:])

    def fit_scale(self, maps: tuple[Tensor, Tensor]) -> None:
        """Set location and spread from anomaly map and leading share of normal images, ``(N, h, w)`` each."""
        self.location.copy_(torch.stack([part.mean() for part in maps]))
        self.spread.copy_(torch.stack([part.std() for part in maps]).clamp(min=1e-6))

    def standardise(self, maps: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Bring anomaly map and leading share, ``(N, h, w)`` each, to the scale of normal images."""
        return [(part - self.location[kind]) / self.spread[kind] for kind, part in enumerate(maps)]
