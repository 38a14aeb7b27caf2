# SPDX-License-Identifier: Apache-2.0
"""PyTorch model of EmbeddingFlow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from anomalib.data import InferenceBatch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from anomalib_flowood import flows
from anomalib_flowood.features import Embedding
from anomalib_flowood.models.components import FlowModel
from anomalib_flowood.models.components.capabilities import Contributions
from anomalib_flowood.models.components.folds import folds
from anomalib_flowood.models.components.kinds import Kinds, fit_to_each, pooled
from anomalib_flowood.models.components.rotations import rows_of
from anomalib_flowood.scores import Evidence, NegativeLogLikelihood, Score
from anomalib_flowood.scores.score import Inputs


class EmbeddingFlowModel(FlowModel):
    """Density of a frozen network's embeddings: a mixture of Gaussians with a full, shrunk covariance.

    :class:`~anomalib_flowood.features.Embedding` describes what an embedding is. Each of its parts, the pooled features
    and the layouts of maps, has its own covariance (:class:`~anomalib_flowood.flows.ShrunkGaussian`), so that a part in
    which normal images vary much does not hide deviations in the others. Along the leading directions of all parts the
    density is a mixture of Gaussians, one for each cluster (:class:`~anomalib_flowood.flows.GaussianMixture`), with the
    covariance within clusters in common. It is the density of embeddings with added noise (``feature_noise``), which
    prevents overfitting to few images, and keeps distances sensitive to the directions in which clusters differ.

    Kinds of images that have nothing in common, such as the products of a line, share no covariance: each has a density
    of its own (:class:`~anomalib_flowood.models.components.kinds.Kinds`), by which its images are judged, as a
    component of one mixture whose weights make unseen images of all kinds equally likely. The score ``nll`` is then
    −log p minus its mean over held-out images of the kind, in their standard deviations, since kinds with few images
    scatter more than those with many; it is no likelihood.

    With couplings, a RealNVP between the leading directions and the mixture refines the density. It trains on
    embeddings with the variance that noise and shrinkage add.

    The arguments are those of :class:`~anomalib_flowood.EmbeddingFlow`, except those of the training.

    Raises:
        ValueError: If the backbone or a layer is unknown, or the configuration makes no sense.
        BackboneUnavailableError: If the backbone's weights cannot be had.
    """

    parts = 3

    base: flows.GaussianMixture

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str | int] | None = None,
        image_size: tuple[int, int] | None = None,
        *,
        pre_trained: bool = True,
        map_dims: int = 32,
        subspace_dim: int = 384,
        modes: int = 256,
        kind_images: int = 20,
        feature_noise: float = 1.0,
        subnet: str = "mlp",
        coupling_layers: int = 0,
        hidden_channels: int = 128,
        bottleneck_dim: int = 16,
        scale: str = "tanh",
        score: str = "nll",
    ) -> None:
        for argument, value, least in (("subspace_dim", subspace_dim, 1), ("feature_noise", feature_noise, 0)):
            if not value >= least:
                msg = f"{argument} must be at least {least}, got {value}."
                raise ValueError(msg)
        embedding = Embedding(backbone, layers, image_size, pre_trained=pre_trained, map_dims=map_dims)
        directions = max(1, subspace_dim // len(embedding.part_dims))
        gaussians = [flows.ShrunkGaussian(dims, min(directions, dims)) for dims in embedding.part_dims]
        leading = sum(gaussian.directions for gaussian in gaussians)
        new_flow = partial(
            flows.vector_flow,
            leading,
            subnet=subnet,
            coupling_layers=coupling_layers,
            hidden_channels=hidden_channels,
            bottleneck_dim=bottleneck_dim,
            scale=scale,
        )
        super().__init__(new_flow, flows.GaussianMixture(leading, modes), embedding.dims, levels=1, score=score)
        if self.scorer.flows and not coupling_layers:
            msg = (
                f"Score {score!r} compares several trained flows, and there are no couplings: set coupling_layers to 6."
            )
            raise ValueError(msg)
        self.embedding = embedding
        self.feature_noise = feature_noise
        self.gaussians = nn.ModuleList(gaussians)
        self.kinds = Kinds(kind_images)
        self.unseen = Evidence(1)
        """Scale of −log p per dimension over held-out images, for each kind if there are several."""

    @property
    def scores_are_likelihoods(self) -> bool:
        """Whether ``pred_score`` is −log p per dimension, nats; it is not if there are several kinds."""
        return super().scores_are_likelihoods and self.kinds.points is None

    @property
    def backbone(self) -> nn.Module:
        """The frozen network."""
        return self.embedding.network

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the features from which embeddings are computed.

        Args:
            images: Pre-processed images, ``(N, 3, H, W)``.

        Returns:
            The pooled features, ``(N, P)``, and for each layer its map, ``(N, C, h, w)``.

        Raises:
            ValueError: If a pixel is NaN or infinite, or the images have another size than the model's.
        """
        return self.embedding.extract(self.checked(images, size=self.embedding.image_size))

    def embed(self, images: Tensor) -> Tensor:
        """Embed pre-processed images, ``(N, 3, H, W)``: ``(N, D)``, length 1; errors as for :meth:`extract`."""
        return self.embedding(self.extract(images))

    def fit_features(self, features: tuple[Tensor, ...], copies: int = 1) -> list[int]:
        """Fit everything except the flow.

        Args:
            features: What :meth:`extract` returns for all training images; on the CPU if they are many.
            copies: Consecutive rows of each image: the image and rotated copies, which are not independent of it. In
                the moments of a density each row counts; kinds and held-out parts are made of whole images.

        Returns:
            The number of images of each kind.

        Raises:
            ValueError: If there are too few images, or they are all alike.
        """
        self.unseen.forget()
        self.embedding.fit(features)
        embeddings = self.embedding.of_stored(features)
        images = self._fit_kinds(tuple(part[::copies] for part in features))
        if len(images) == 1:
            self.fit_embeddings(embeddings)
        else:
            self._fit_each(embeddings, [rows_of(own, copies) for own in images], copies)
        return [len(own) for own in images]

    def _fit_each(self, embeddings: flows.Rows, of_kinds: Sequence[Tensor], copies: int) -> None:
        """Fit a density to the rows of each kind.

        They form one mixture, whose weights make unseen images of all kinds equally likely, so that one threshold is
        equally strict for all kinds. The density of an image is the component of its kind.
        """

        def fit(rows: Tensor) -> None:
            unseen = []
            for seen, held_out in folds(len(rows), copies):
                self.fit_embeddings(_rows_at(embeddings, rows[seen]))
                for some in flows.in_turn(_rows_at(embeddings, rows[held_out])):
                    leading, rest = self.split(some)
                    unseen.append(self.base.log_prob(leading) + rest)
            self.unseen.fit(-torch.cat(unseen)[:, None] / self.dims, [1.0])
            self.fit_embeddings(_rows_at(embeddings, rows))

        fit_to_each(of_kinds, fit, [*self.gaussians, self.base, self.unseen])
        log_weights = (self.dims * self.unseen.location[:, 0].cpu().double()).log_softmax(0)
        self.base.weigh(log_weights)
        self.unseen.location = self.unseen.location - (log_weights / self.dims).to(self.unseen.location)[:, None]

    def _fit_kinds(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """Find the kinds of images, given one row for each image; return the indices of the images of each kind."""
        images, like = len(features[0]), torch.empty(0, dtype=self.dtype)  # on the CPU, like the features
        points = flows.Computed(partial(pooled, like=like), features)
        if len(self.kinds.fit(images, points)) == 1:
            return [torch.arange(images)]
        kind = torch.cat([self.kinds(some).cpu() for some in flows.in_turn(points)])
        return [(kind == number).nonzero().flatten() for number in range(int(kind.max()) + 1)]

    def fit_embeddings(self, embeddings: flows.Rows) -> None:
        """Fit the Gaussians of the parts, and the mixture, to embeddings of one kind.

        Args:
            embeddings: Training embeddings, ``(N, D)``, read a part at a time.

        Raises:
            ValueError: If there are fewer than two of them, or they are all alike.
        """
        moments = [flows.Moments() for _ in self.gaussians]
        for some in flows.in_turn(embeddings):
            for of_part, (_, part) in zip(moments, self._pairs(some), strict=True):
                of_part.add(part)
        # In proportion to a part's total variance, not to the mean per dimension: the resolution of maps is arbitrary.
        dims = self.dims / len(moments)
        noises = [self.feature_noise * float(of_part.variances.sum()) / dims for of_part in moments]
        gaussians: list[flows.ShrunkGaussian] = list(self.gaussians)  # type: ignore[arg-type]
        for gaussian, of_part, noise in zip(gaussians, moments, noises, strict=True):
            gaussian.fit(of_part, noise=noise, what="training images")
        within_clusters = self.base.fit(flows.Computed(lambda parts: self._coordinates(parts[0]), [embeddings]))
        within_clusters *= 1 - 1 / len(embeddings)  # with the divisor n, like the Gaussians' covariances
        blocks, start = [], 0
        for gaussian, noise in zip(gaussians, noises, strict=True):
            own = slice(start, start + gaussian.directions)
            blocks.append(gaussian.turn(within_clusters[own, own], noise=noise))
            start = own.stop
        self.base.transform(torch.block_diag(*blocks))

    def split(self, embeddings: Tensor, kind: Tensor | None = None) -> tuple[Tensor, ...]:
        """Split the density of embeddings, ``(N, D)``, into leading directions and the rest.

        Returns:
            Standardised coordinates along the leading directions of all parts, ``(N, k)``, and the log-density without
            theirs, ``(N,)``, nats. If there are several kinds, ``kind`` follows as it is given, ``(N,)``.
        """
        leading, rests = zip(*(gaussian(part, kind) for gaussian, part in self._pairs(embeddings)), strict=True)
        inputs = torch.cat(leading, dim=1), sum(rests[1:], rests[0])
        return inputs if kind is None else (*inputs, kind)

    def prepare(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Embed features, as :meth:`extract` returns them, and split their density as :meth:`split` does."""
        return self.split(self.embedding(features), self.kinds.of_features(features))

    def density(self, inputs: Inputs, flow: InvertibleModule | None = None) -> flows.Density:
        """Evaluate the density of prepared images; with several kinds, each by that of its kind."""
        coordinates, rest, *kind = inputs
        base = self.base.of(kind[0]) if kind else self.base
        return flows.density(self.flow if flow is None else flow, base, coordinates, rest)

    def predict(self, inputs: Inputs, scorer: Score | None = None) -> InferenceBatch:
        """Score prepared images as :meth:`FlowModel.predict` does; standardise −log p if there are several kinds."""
        batch = super().predict(inputs, scorer)
        if len(inputs) == 2 or not isinstance(scorer or self.scorer, NegativeLogLikelihood):
            return batch
        assert batch.pred_score is not None
        return InferenceBatch(pred_score=self.unseen.standardised(batch.pred_score[:, None], inputs[2])[:, 0])

    def contributions(self, images: Tensor) -> Contributions:
        """Decompose −log p of pre-processed images, ``(N, 3, H, W)``, by direction; errors as for :meth:`extract`.

        The leading directions of each part of an embedding contribute by their latents' distance from the nearest mean
        of the mixture; without couplings the latents are the coordinates along them.
        """
        features = self.extract(images)
        embeddings, kind = self.embedding(features), self.kinds.of_features(features)
        latents, _ = self.flow(self.split(embeddings, kind)[0])
        from_mean = latents - self.base.nearest(latents, kind)
        names, parts, coordinates, squares, start = [], [], [], [], 0
        for name, (gaussian, part) in zip(self.embedding.part_names, self._pairs(embeddings), strict=True):
            standard, outside = gaussian.standardised(part, kind)
            own = slice(start, start + gaussian.directions)
            start = own.stop
            beyond = outside[:, None]
            coordinates += [latents[:, own], standard[:, gaussian.directions :], torch.full_like(beyond, torch.nan)]
            squares += [from_mean[:, own].square(), standard[:, gaussian.directions :].square().nan_to_num(0), beyond]
            names += [*(f"direction {number + 1}" for number in range(standard.shape[1])), "beyond all directions"]
            parts += [name] * (standard.shape[1] + 1)
        return Contributions(names, parts, torch.cat(coordinates, dim=1), 0.5 * torch.cat(squares, dim=1), kind)

    def blur(self, coordinates: Tensor, kind: Tensor | None = None) -> Tensor:
        """Add to standardised coordinates, ``(N, k)``, the variance of noise and shrinkage, as training does."""
        gaussians: list[flows.ShrunkGaussian] = list(self.gaussians)  # type: ignore[arg-type]
        ratios = [part.tail_variance[..., None] / part.variances[..., : part.directions] for part in gaussians]
        std = torch.cat(ratios, dim=-1).sqrt()
        return coordinates + (std if kind is None else std[kind]) * torch.randn_like(coordinates)

    def _pairs(self, embeddings: Tensor) -> list[tuple[flows.ShrunkGaussian, Tensor]]:
        """Return the Gaussian of each part of embeddings, ``(N, D)``, with that part."""
        return list(zip(self.gaussians, embeddings.split(self.embedding.part_dims, dim=1), strict=True))  # type: ignore[arg-type]

    def _coordinates(self, embeddings: Tensor) -> Tensor:
        """Return unstandardised coordinates along the leading directions of all parts of embeddings, ``(N, D)``."""
        return torch.cat([gaussian.coordinates(part) for gaussian, part in self._pairs(embeddings)], dim=1)

    def inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Embed pre-processed images, ``(N, 3, H, W)``, as :meth:`prepare` does; errors as for :meth:`extract`."""
        return self.prepare(self.extract(images))


def _rows_at(embeddings: flows.Rows, rows: Tensor) -> flows.Computed:
    """Return the rows of embeddings at the given indices, computed when they are read."""
    return flows.Computed(lambda parts: embeddings[parts[0]], [rows])
