# SPDX-License-Identifier: Apache-2.0
"""Baselines without a flow, on exactly the features that our flows get.

Whatever a flow is better at than these, it has earned by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import InferenceBatch
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from lightning.pytorch.utilities.types import STEP_OUTPUT
from sklearn.covariance import LedoitWolf
from torch import Tensor

from anomalib_flowood.models.embedding_flow import EmbeddingFlowModel
from anomalib_flowood.models.feature_map_flow import FeatureMapFlowModel

NEIGHBOURS = 5
_SCALE_IMAGES = 256  # as FeatureMapFlow measures its layers' scales


class KNNModel(EmbeddingFlowModel):
    """Mean cosine distance of an embedding to its five nearest training embeddings."""

    bank: Tensor
    location: Tensor
    precision: Tensor

    def __init__(self, *args: Any, neighbours: int = NEIGHBOURS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.neighbours = neighbours
        for name in ("bank", "location", "precision"):  # sized by what is fitted
            self.register_buffer(name, torch.zeros(0), persistent=False)

    def observe(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what the embeddings of training images are made of."""
        return self.extract(images)

    def fit(self, features: tuple[Tensor, ...]) -> None:
        """Fit the embedding, then the baseline on training embeddings of length 1."""
        self.fit_maps(features[1:])
        self.fit_embeddings(self.embed_stored(features))

    def fit_embeddings(self, embeddings: Tensor) -> None:
        """Keep the training embeddings, ``(N, D)``."""
        self.bank = embeddings

    def distance(self, embeddings: Tensor) -> Tensor:
        """Score embeddings ``(N, D)``."""
        nearest = (embeddings @ self.bank.T).topk(min(self.neighbours, len(self.bank)), dim=1).values
        return 1 - nearest.mean(1)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score pre-processed images."""
        return InferenceBatch(pred_score=self.distance(self.embed(images)))


class MahalanobisModel(KNNModel):
    """Squared Mahalanobis distance from the mean of the training embeddings, covariance after Ledoit and Wolf."""

    def fit_embeddings(self, embeddings: Tensor) -> None:
        """Fit mean and shrunk covariance to ``(N, D)``."""
        fitted = LedoitWolf().fit(embeddings.double().cpu().numpy())
        self.location = torch.from_numpy(fitted.location_).to(embeddings.device)
        self.precision = torch.from_numpy(fitted.precision_).to(embeddings.device)

    def distance(self, embeddings: Tensor) -> Tensor:
        """Score embeddings ``(N, D)``."""
        centred = embeddings.double() - self.location
        return ((centred @ self.precision) * centred).sum(1)


class GaussianMixtureModel(KNNModel):
    """−log p of `EmbeddingFlow` with an untrained flow, which is the identity: a mixture of Gaussians, and the tail."""

    def fit_embeddings(self, embeddings: Tensor) -> None:
        """Fit subspace and base to ``(N, D)``."""
        self.fit_subspace(embeddings)

    def distance(self, embeddings: Tensor) -> Tensor:
        """Score embeddings ``(N, D)``."""
        return -self.density(self.project(embeddings)).log_prob / self.dims


class PPCAModel(GaussianMixtureModel):
    """−log p under probabilistic PCA: the same with one Gaussian and no noise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, modes=1, feature_noise=0.0, **kwargs)


class GaussianMapModel(FeatureMapFlowModel):
    """`FeatureMapFlow` with an untrained flow, which is the identity: a whitened Gaussian."""

    def observe(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of training images in half precision, as `FeatureMapFlow` keeps them."""
        return tuple(layer.clamp(-6e4, 6e4).half() for layer in self.extract(images))

    def fit(self, features: tuple[Tensor, ...]) -> None:
        """Fit the principal subspaces, and the layers' scales."""
        self.fit_subspaces(features)
        self.fit_map_scale(self.reduce(tuple(layer[:_SCALE_IMAGES] for layer in features)))


class Baseline(MemoryBankMixin, AnomalibModule):  # type: ignore[misc]
    """Sees the training images once, fits, and is done.

    Args:
        name: A key of :data:`MODELS`.
        backbone: A timm name or ``local-dir:FOLDER``.
        image_size: Height and width of the images.
        **components: anomalib's ``pre_processor``, ``post_processor``, ``evaluator`` and ``visualizer``.
    """

    model: KNNModel | GaussianMapModel

    def __init__(
        self,
        name: str,
        backbone: str,
        image_size: tuple[int, int],
        **components: Any,
    ) -> None:
        super().__init__(**components)
        self.model = MODELS[name](backbone, image_size=image_size)
        self._seen: list[tuple[Tensor, ...]] = []

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Keep a batch's features, in main memory."""
        del args, kwargs
        with torch.no_grad():
            self._seen.append(tuple(part.cpu() for part in self.model.observe(batch.image)))
        return torch.zeros((), requires_grad=True, device=self.device)

    @torch.no_grad()
    def fit(self) -> None:
        """Fit what the batches brought."""
        self.model.fit(tuple(torch.cat(parts) for parts in zip(*self._seen, strict=True)))
        self._seen.clear()

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self) -> None:
        """Nothing is trained."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One epoch."""
        return {"max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        """One-class: fitted to normal images alone."""
        return LearningType.ONE_CLASS


MODELS: dict[str, type[KNNModel] | type[GaussianMapModel]] = {
    "KNN": KNNModel,
    "Mahalanobis": MahalanobisModel,
    "PPCA": PPCAModel,
    "GaussianMixture": GaussianMixtureModel,
    "GaussianMap": GaussianMapModel,
}
