# SPDX-License-Identifier: Apache-2.0
"""PyTorch model of EmbeddingFlow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from anomalib_flowood import flows
from anomalib_flowood.features import Embedding
from anomalib_flowood.models.components import FlowModel

_FIT_IMAGES = 10_000
"""Most training images from which subspace and base are fitted, for the time and the memory it takes."""


class EmbeddingFlowModel(FlowModel):
    """Density of a frozen network's embeddings: a flow in their principal subspace, a Gaussian in the rest.

    What an embedding is, :class:`~anomalib_flowood.features.Embedding` says, and how its density is split,
    :class:`~anomalib_flowood.flows.PrincipalSubspace`. The flow is a RealNVP, whose base distribution is a mixture of
    Gaussians (:class:`~anomalib_flowood.flows.GaussianMixture`): what is inside comes in several kinds. Directions of
    the subspace are those of the covariance within these kinds.

    The density is that of embeddings with some noise, of variance a = ``feature_noise`` * s in every direction of the
    embedding, s the mean variance within kinds over the directions of the subspace. It keeps few images from being
    learned by heart.

    Arguments are those of :class:`~anomalib_flowood.EmbeddingFlow`, but for what training takes.

    Raises:
        ValueError: If the backbone or a layer is unknown, or the configuration makes no sense.
        BackboneUnavailableError: If the backbone's weights cannot be had.
    """

    parts = 3

    base: flows.GaussianMixture
    noise_variance: Tensor
    """a, ``()``."""

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str | int] | None = None,
        image_size: tuple[int, int] | None = None,
        *,
        pre_trained: bool = True,
        map_dims: int = 32,
        subspace_dim: int = 128,
        modes: int = 256,
        feature_noise: float = 1.0,
        subnet: str = "mlp",
        coupling_layers: int = 6,
        hidden_channels: int = 128,
        scale: str = "tanh",
        bottleneck_dim: int = 16,
        score: str = "nll",
    ) -> None:
        if not feature_noise >= 0:
            msg = f"feature_noise must be at least 0, got {feature_noise}."
            raise ValueError(msg)
        new_flow = partial(
            flows.vector_flow,
            subspace_dim,
            subnet=subnet,
            coupling_layers=coupling_layers,
            hidden_channels=hidden_channels,
            scale=scale,
            bottleneck_dim=bottleneck_dim,
        )
        embedding = Embedding(backbone, layers, image_size, pre_trained=pre_trained, map_dims=map_dims)
        if subspace_dim >= embedding.dims:
            msg = f"subspace_dim must be below the {embedding.dims} numbers of an embedding, got {subspace_dim}."
            raise ValueError(msg)
        super().__init__(new_flow, flows.GaussianMixture(subspace_dim, modes), embedding.dims, levels=1, score=score)
        self.embedding = embedding
        self.subspace = flows.PrincipalSubspace(embedding.dims, subspace_dim)
        self.feature_noise = feature_noise
        self.register_buffer("noise_variance", torch.zeros(()))

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what embeddings are made of.

        Args:
            images: Images as the backbone wants them, ``(N, 3, H, W)``.

        Returns:
            The pooled features, ``(N, P)``, and for each layer its map, ``(N, C, h, w)``.

        Raises:
            ValueError: If a pixel is NaN or infinite, or the images have another size than the model's.
        """
        return self.embedding.extract(self.checked(images, size=self.embedding.image_size))

    def embed(self, images: Tensor) -> Tensor:
        """Embed pre-processed images, ``(N, 3, H, W)``: ``(N, D)``, length 1; errors as for :meth:`extract`."""
        return self.embedding(self.extract(images))

    def fit_features(self, features: tuple[Tensor, ...]) -> None:
        """Fit everything but the flow.

        Args:
            features: What :meth:`extract` returns for all training images; in main memory, if they are many.

        Raises:
            ValueError: If there are too few of them, or they are all alike.
        """
        drawn = torch.randperm(len(features[0]), generator=torch.Generator().manual_seed(0))[:_FIT_IMAGES].sort().values
        features = tuple(part[drawn] for part in features)
        self.embedding.fit(features)
        self.fit_embeddings(self.embedding.embed_stored(features))

    def fit_embeddings(self, embeddings: Tensor) -> None:
        """Fit the principal subspace, the variance of the rest, and the base distribution.

        Args:
            embeddings: Training embeddings, ``(N, D)``.

        Raises:
            ValueError: If there are too few of them, or they are all alike.
        """
        self.subspace.fit(embeddings, what="training images")
        covariance = self.base.fit(self.subspace.coordinates(embeddings))
        variances, turn = map(torch.from_numpy, np.linalg.eigh(covariance.numpy()))
        tail = self.subspace.tail_variance.to(variances)
        variances = torch.maximum(variances, tail)
        noise = self.feature_noise * variances.mean()
        self.noise_variance.copy_(noise)
        self.subspace.rotate(turn, variances + noise, tail + noise)
        self.base.transform(turn / (variances + noise).sqrt())

    def prepare(self, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Embed features, as :meth:`extract` returns them, and split the density as the subspace does.

        Returns:
            Standardised coordinates, ``(N, k)``, and the rest of the log-density, ``(N,)``, nats.
        """
        return self.subspace(self.embedding(features))

    def blur(self, coordinates: Tensor) -> Tensor:
        """Add the noise to standardised coordinates, ``(N, k)``, on which the flow trains."""
        return coordinates + (self.noise_variance / self.subspace.variances).sqrt() * torch.randn_like(coordinates)

    def inputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed pre-processed images, ``(N, 3, H, W)``, as :meth:`prepare` does; errors as for :meth:`extract`."""
        return self.prepare(self.extract(images))
