# SPDX-License-Identifier: Apache-2.0
"""The density of an image's mean features: what it shows, regardless of where."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anomalib_flowood import flows

from .training_rows import TrainingRows


class MeanFeatures(nn.Module):
    """−log p of an image's mean features under a shrunk Gaussian, one for each kind of image.

    Maps compare positions with positions, but an image may be anomalous although none of its positions is. This shows
    in each layer's mean feature vector (:func:`~anomalib_flowood.models.components.kinds.pooled`), whose density is a
    Gaussian with a full, shrunk covariance (:class:`~anomalib_flowood.flows.ShrunkGaussian`).

    Args:
        dims: P, the length of the mean features.
    """

    name = "all layers: their mean features"

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.gaussian = flows.ShrunkGaussian(dims, 1)  # with 0 directions an unfitted graph would have an empty matrix

    def fit(self, means: Tensor, training: TrainingRows | None = None) -> Tensor:
        """Fit the Gaussian.

        Args:
            means: Mean features of training images, ``(N, P)``.
            training: What the rows are; by default an image each.

        Returns:
            What :meth:`forward` returns for the :attr:`~TrainingRows.scored` rows, ``(m,)``, from fits to other images.
        """
        training = training or TrainingRows(len(means))
        unseen = []
        for seen, _, scored in training.folds():
            self._fit(means[seen])
            unseen.append(self(means[scored].to(self.gaussian.mean)))
        self._fit(means[: training.fitted])
        return torch.cat(unseen)

    def _fit(self, means: Tensor) -> None:
        self.gaussian.fit(means, what="images' mean features")

    def forget(self) -> None:
        """Forget the fit."""
        self.gaussian.forget()

    def forward(self, means: Tensor, kind: Tensor | None = None) -> Tensor:
        """Return −log p per dimension of mean features, ``(N, P)``, given their kinds, ``(N,)``; nats, ``(N,)``."""
        return -self.gaussian.log_prob(means, kind) / means.shape[1]
