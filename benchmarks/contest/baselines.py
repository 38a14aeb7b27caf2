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
from torch import Tensor, nn

from anomalib_flowood import flows
from anomalib_flowood.features import Embedding
from anomalib_flowood.models.components import check_images

NEIGHBOURS = 5

DIRECTIONS = 128
"""The most principal directions of probabilistic PCA; at most half as many as there are training images."""


class EmbeddingModel(nn.Module):
    """Scores embeddings by what a subclass keeps of those of training images.

    Args:
        backbone: A timm name or ``local-dir:FOLDER``.
        layers: As for :class:`Embedding`.
        image_size: Height and width of the images.
        **kwargs: More arguments of :class:`Embedding`.
    """

    def __init__(
        self, backbone: str, layers: Any = None, image_size: tuple[int, int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.embedding = Embedding(backbone, layers, image_size, **kwargs)

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what the embeddings of pre-processed images are made of."""
        check_images(images, size=self.embedding.image_size)
        return self.embedding.extract(images)

    def fit_features(self, features: tuple[Tensor, ...]) -> None:
        """Fit the embedding, then the baseline on training embeddings of length 1."""
        self.embedding.fit(features)
        self.fit(torch.cat([*flows.in_turn(self.embedding.of_stored(features))]))

    def fit(self, embeddings: Tensor) -> None:
        """Fit the baseline to training embeddings, ``(N, D)``."""
        raise NotImplementedError

    def distance(self, embeddings: Tensor) -> Tensor:
        """Score embeddings ``(N, D)``."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score pre-processed images."""
        return InferenceBatch(pred_score=self.distance(self.embedding(self.extract(images))))


class KNNModel(EmbeddingModel):
    """Mean cosine distance of an embedding to its five nearest training embeddings."""

    bank: Tensor

    def __init__(self, *args: Any, neighbours: int = NEIGHBOURS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.neighbours = neighbours
        self.register_buffer("bank", torch.zeros(0), persistent=False)  # sized by what is fitted

    def fit(self, embeddings: Tensor) -> None:
        """Keep the training embeddings, ``(N, D)``."""
        self.bank = embeddings

    def distance(self, embeddings: Tensor) -> Tensor:
        """Score embeddings ``(N, D)``."""
        nearest = (embeddings @ self.bank.T).topk(min(self.neighbours, len(self.bank)), dim=1).values
        return 1 - nearest.mean(1)


class MahalanobisModel(EmbeddingModel):
    """Squared Mahalanobis distance from the mean of the training embeddings, covariance after Ledoit and Wolf."""

    location: Tensor
    precision: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("location", "precision"):  # sized by what is fitted
            self.register_buffer(name, torch.zeros(0), persistent=False)

    def fit(self, embeddings: Tensor) -> None:
        """Fit mean and shrunk covariance to ``(N, D)``."""
        fitted = LedoitWolf().fit(embeddings.double().cpu().numpy())
        self.location = torch.from_numpy(fitted.location_).to(embeddings.device)
        self.precision = torch.from_numpy(fitted.precision_).to(embeddings.device)

    def distance(self, embeddings: Tensor) -> Tensor:
        """Score embeddings ``(N, D)``."""
        centred = embeddings.double() - self.location
        return ((centred @ self.precision) * centred).sum(1)


class PPCAModel(EmbeddingModel):
    """−log p per dimension of probabilistic PCA (Tipping and Bishop 1999): one Gaussian, isotropic in all but a few
    directions."""

    def __init__(self, *args: Any, subspace_dim: int = DIRECTIONS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.most = subspace_dim
        self.subspace = flows.PrincipalSubspace(self.embedding.dims, subspace_dim)

    def fit(self, embeddings: Tensor) -> None:
        """Fit mean, leading directions, and the mean variance of the rest, to ``(N, D)``."""
        directions = min(self.most, max(1, len(embeddings) // 2))
        self.subspace = flows.PrincipalSubspace(self.embedding.dims, directions).to(embeddings)
        self.subspace.fit(embeddings)

    def distance(self, embeddings: Tensor) -> Tensor:
        """Score embeddings ``(N, D)``."""
        coordinates, rest = self.subspace(embeddings)
        return -(flows.StandardNormal().log_prob(coordinates) + rest) / self.embedding.dims


class Baseline(MemoryBankMixin, AnomalibModule):  # type: ignore[misc]
    """Sees the training images once, fits, and is done.

    Args:
        name: A key of :data:`MODELS`.
        backbone: A timm name or ``local-dir:FOLDER``.
        image_size: Height and width of the images.
        **components: anomalib's ``pre_processor``, ``post_processor``, ``evaluator`` and ``visualizer``.
    """

    model: EmbeddingModel

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
            self._seen.append(tuple(part.cpu() for part in self.model.extract(batch.image)))
        return torch.zeros((), requires_grad=True, device=self.device)

    @torch.no_grad()
    def fit(self) -> None:
        """Fit what the batches brought."""
        self.model.fit_features(tuple(torch.cat(parts) for parts in zip(*self._seen, strict=True)))
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


MODELS: dict[str, type[EmbeddingModel]] = {"KNN": KNNModel, "Mahalanobis": MahalanobisModel, "PPCA": PPCAModel}
