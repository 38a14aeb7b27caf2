# SPDX-License-Identifier: Apache-2.0
"""How unlike anything normal an image is by what is in it, wherever that is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anomalib_flowood import flows
from anomalib_flowood.models.components.folds import folds


class MeanFeatures(nn.Module):
    """−log p of an image's mean features, by a shrunk Gaussian; of several kinds of image each has its own.

    Positions are compared with positions, and an image may be unlike any other where none of them is. That is in each
    layer's mean feature vector (:func:`~anomalib_flowood.models.components.kinds.pooled`), of which a Gaussian with a
    full, shrunk covariance says how likely it is (:class:`~anomalib_flowood.flows.ShrunkGaussian`).

    Args:
        dims: P, numbers of an image.
    """

    name = "all layers: their mean features"

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.gaussian = flows.ShrunkGaussian(dims, 1)  # a graph has no matrix without rows, as before a fit

    def fit(self, means: Tensor, copies: int = 1) -> Tensor:
        """Fit the Gaussian.

        Args:
            means: Those of training images, ``(N, P)``.
            copies: Rows of each image, one after the other.

        Returns:
            What :meth:`forward` returns for some of the images, ``(m,)``, each by a fit to others.
        """
        unseen = []
        for rest, part in folds(len(means), copies):
            self._fit(means[rest])
            unseen.append(self(means[part[::copies]].to(self.gaussian.mean)))
        self._fit(means)
        return torch.cat(unseen)

    def _fit(self, means: Tensor) -> None:
        self.gaussian.fit(means, what="images' mean features")

    def forget(self) -> None:
        """Know nothing that is normal."""
        self.gaussian.forget()

    def forward(self, means: Tensor, kind: Tensor | None = None) -> Tensor:
        """Return −log p per dimension of mean features, ``(N, P)``, each as of its kind; nats, ``(N,)``."""
        return -self.gaussian.log_prob(means, kind) / means.shape[1]
