# SPDX-License-Identifier: Apache-2.0
"""PyTorch model of EmbeddingFlow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from FrEIA.modules import InvertibleModule
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from anomalib_flowood import flows
from anomalib_flowood.features import PooledAndMaps, run_backbone
from anomalib_flowood.models.components import FlowModel
from anomalib_flowood.scores import Density
from anomalib_flowood.scores.score import Inputs

_GRID = 7
"""Positions to a side to which larger maps are pooled, or just above."""

_IMAGES_PER_MODE = 10
"""A Gaussian of the base is to stand for a kind of images, and not for one image."""

_FIT_POSITIONS = 60_000
"""Most positions from which the directions of feature vectors are fitted, for the time it takes."""

_FIT_IMAGES = 10_000
"""Most training images from which subspace and base are fitted, for the time and the memory it takes."""

_CHUNK = 512
"""Images that are embedded at once where features are at hand."""


class EmbeddingFlowModel(FlowModel):
    """Density of a frozen network's embeddings: a flow in their principal subspace, a Gaussian in the rest.

    An embedding e has D numbers: the network's pooled features, and for each of ``layers`` the layout of its map, which
    pooling loses. At every position of the map the feature vector is projected onto the leading principal directions
    (``map_dims`` of them, over all positions and training images) and divided by the fourth root of their variances, so
    that none of them drowns the others. Each part is brought to the same length, and the whole to length 1.

    With the principal subspace of the training embeddings (mean m, k directions U, variances v within the modes below,
    their mean s) and the mean variance q of what is left over, the density is that of embeddings with some noise, of
    variance a = ``feature_noise`` * s in every direction::

        w = U^T (e - m) / sqrt(v + a),   r = (e - m) - U U^T (e - m)
        log p(e) = log p_flow(w) - 1/2 sum log(v + a)  -  |r|^2 / (2 (q + a)) - (D - k)/2 log(2 pi (q + a))

    which is the density of probabilistic PCA (Tipping and Bishop 1999, section 3) with its Gaussian in the subspace
    replaced by a RealNVP flow. The flow's base distribution is a mixture of Gaussians of unit variance, whose means
    k-means finds among the training embeddings: what is inside comes in several kinds. It is the mean of the mixtures
    that several runs of k-means find, so that where one of them starts matters less. The noise keeps few images from
    being learned by heart.

    Args:
        backbone: A timm name or ``local-dir:FOLDER``, see :mod:`anomalib_flowood.features.catalogue`.
        layers: Layers whose layout counts, by timm's module names (``blocks.4``) or indices; by default the one of
            :func:`anomalib_flowood.features.default_layers`. An empty list for the pooled features alone.
        image_size: Height and width of the images; by default the size that the backbone was trained at.
        pre_trained: Load the backbone's weights.
        map_dims: Principal directions of a layer's feature vectors; all where a layer has fewer.
        subspace_dim: k, the number of principal directions.
        modes: Gaussians that a run of k-means finds; at most one for ten training images.
        clusterings: Runs of k-means, whose mixtures are averaged.
        feature_noise: Variance of the noise, in units of the mean variance over the principal directions.
        subnet: s,t-network on vectors: ``mlp`` or ``bottleneck``.
        coupling_layers: Number of couplings.
        hidden_channels: Width of the s,t-networks.
        bottleneck_dim: Numbers that pass the squeeze of the ``bottleneck`` network.
        score: One of :data:`anomalib_flowood.scores.SCORES` that is not for pixels alone.

    Raises:
        ValueError: If the backbone or a layer is unknown, or the configuration makes no sense.
        BackboneUnavailableError: If the backbone's weights cannot be had.
    """

    parts = 3

    mean: Tensor
    components: Tensor
    variances: Tensor
    tail_variance: Tensor
    noise_variance: Tensor
    centres: Tensor
    log_weights: Tensor

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
        clusterings: int = 8,
        feature_noise: float = 1.0,
        subnet: str = "mlp",
        coupling_layers: int = 6,
        hidden_channels: int = 128,
        bottleneck_dim: int = 16,
        score: str = "nll",
    ) -> None:
        for argument, value, least in (
            ("map_dims", map_dims, 1),
            ("modes", modes, 1),
            ("clusterings", clusterings, 1),
            ("feature_noise", feature_noise, 0),
        ):
            if value < least:
                msg = f"{argument} must be at least {least}, got {value}."
                raise ValueError(msg)
        new_flow = partial(
            flows.vector_flow,
            subspace_dim,
            subnet=subnet,
            coupling_layers=coupling_layers,
            hidden_channels=hidden_channels,
            bottleneck_dim=bottleneck_dim,
        )
        network = PooledAndMaps(backbone, layers, pre_trained=pre_trained, image_size=image_size)
        height, width = image_size or network.pretrained_cfg["input_size"][-2:]
        with torch.no_grad():
            pooled, *maps = network(torch.zeros(1, 3, height, width))
        maps = [_to_grid(layer) for layer in maps]
        directions = [min(map_dims, layer.shape[1]) for layer in maps]
        dims = pooled.shape[1] + sum(count * layer[0, 0].numel() for count, layer in zip(directions, maps, strict=True))
        if subspace_dim >= dims:
            msg = f"subspace_dim={subspace_dim} must be below the {dims} numbers of an embedding of {backbone!r}."
            raise ValueError(msg)
        super().__init__(new_flow, dims, levels=1, score=score)
        self.backbone = network
        self.image_size = (height, width)
        self.clusterings = clusterings
        self.feature_noise = feature_noise
        for number, (layer, count) in enumerate(zip(maps, directions, strict=True)):
            self.register_buffer(f"map_mean_{number}", torch.zeros(layer.shape[1]))
            self.register_buffer(f"map_directions_{number}", torch.zeros(count, layer.shape[1]))
        self.register_buffer("mean", torch.zeros(self.dims))
        self.register_buffer("components", torch.zeros(subspace_dim, self.dims))
        self.register_buffer("variances", torch.ones(subspace_dim))  # v + a
        self.register_buffer("tail_variance", torch.ones(()))  # q + a
        self.register_buffer("noise_variance", torch.zeros(()))  # a
        self.register_buffer("centres", torch.zeros(clusterings * modes, subspace_dim))
        self.register_buffer("log_weights", torch.full((clusterings * modes,), -math.log(clusterings * modes)))

    def train(self, mode: bool = True) -> EmbeddingFlowModel:
        """Set the flow's mode; the backbone is frozen, its batch norms included."""
        super().train(mode)
        self.backbone.eval()
        return self

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what embeddings are made of.

        Args:
            images: Images as the backbone wants them, ``(N, 3, H, W)``.

        Returns:
            The pooled features, ``(N, P)``, and for each layer its map, ``(N, C, h, w)``.

        Raises:
            ValueError: If a pixel is NaN or infinite, or the images have another size than the model's.
        """
        images = self.checked(images, size=self.image_size)
        pooled, *maps = run_backbone(self.backbone, images)
        return (pooled, *(_to_grid(layer) for layer in maps))

    @flows.full_precision
    def embed_features(self, features: tuple[Tensor, ...]) -> Tensor:
        """Make embeddings of what :meth:`extract` returned.

        Args:
            features: They may lie on another device than the model, and have another precision.

        Returns:
            Embeddings of length 1, ``(N, D)``.
        """
        pooled, *maps = (part.to(self.mean) for part in features)
        parts = [pooled]
        for number, layer in enumerate(maps):
            mean, directions = getattr(self, f"map_mean_{number}"), getattr(self, f"map_directions_{number}")
            centred = layer - mean[:, None, None]
            parts.append(functional.conv2d(centred, directions[:, :, None, None]).flatten(1))
        length = math.sqrt(len(parts))
        return torch.cat([functional.normalize(part, dim=1) / length for part in parts], dim=1)

    def embed_stored(self, features: tuple[Tensor, ...]) -> Tensor:
        """Embed the features of many images, some at a time: ``(N, D)``, on the model's device."""
        chunks = zip(*(part.split(_CHUNK) for part in features), strict=True)
        return torch.cat([self.embed_features(chunk) for chunk in chunks])

    def embed(self, images: Tensor) -> Tensor:
        """Embed pre-processed images, ``(N, 3, H, W)``: ``(N, D)``, length 1; errors as for :meth:`extract`."""
        return self.embed_features(self.extract(images))

    def fit_features(self, features: tuple[Tensor, ...]) -> None:
        """Fit everything but the flow.

        Args:
            features: What :meth:`extract` returns for all training images; in main memory, if they are many.

        Raises:
            ValueError: If there are too few of them, or they are all alike.
        """
        drawn = torch.randperm(len(features[0]), generator=torch.Generator().manual_seed(0))[:_FIT_IMAGES].sort().values
        features = tuple(part[drawn] for part in features)
        self.fit_maps(features[1:])
        self.fit_subspace(self.embed_stored(features))

    def fit_maps(self, maps: tuple[Tensor, ...]) -> None:
        """Fit the principal directions of each layer's feature vectors, over all positions and images."""
        for number, layer in enumerate(maps):
            vectors = layer.movedim(1, -1).flatten(0, -2)
            drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:_FIT_POSITIONS]
            directions = getattr(self, f"map_directions_{number}")
            pca = PCA(svd_solver="covariance_eigh").fit(vectors[drawn].double().cpu().numpy())
            variances = torch.from_numpy(pca.explained_variance_[: len(directions)])
            scale = variances.clamp(min=max(1e-6 * float(variances[0]), 1e-12)) ** -0.25
            getattr(self, f"map_mean_{number}").copy_(torch.from_numpy(pca.mean_))
            directions.zero_()
            directions[: len(variances)] = (torch.from_numpy(pca.components_[: len(directions)]) * scale[:, None]).to(
                directions
            )

    def fit_subspace(self, embeddings: Tensor) -> None:
        """Fit the principal subspace, the variance of the rest, and the base distribution.

        Args:
            embeddings: Training embeddings, ``(N, D)``.

        Raises:
            ValueError: If there are too few of them, or they are all alike.
        """
        n, k = len(embeddings), len(self.components)
        if k >= n:
            msg = (
                f"A principal subspace of {k} directions needs more than {k} training images, got {n}. "
                f"Set subspace_dim to at most {n // 2}."
                if n >= 4
                else f"{n} training image(s) have no principal subspace: give at least 4, more are better."
            )
            raise ValueError(msg)
        # In NumPy, where eigensolvers are faster on the CPU. Randomised where few of many directions are wanted, and in
        # single precision, unless the embeddings have more, for the time it takes.
        precise = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)).cpu()
        pca = PCA(n_components=k, random_state=0).fit(precise.numpy())
        mean, directions = torch.from_numpy(pca.mean_).double(), torch.from_numpy(pca.components_).double()
        explained = torch.from_numpy(pca.explained_variance_).double()
        if float(explained[-1]) <= 1e-10 * float(explained[0]) or float(explained[0]) <= 1e-12:
            rank = int((explained > 1e-10 * explained[0]).sum()) if float(explained[0]) > 1e-12 else 0
            msg = (
                f"The {n} training embeddings vary in {rank} directions only, fewer than subspace_dim={k}: "
                "are many training images the same, or constant? Set subspace_dim lower or give more varied images."
            )
            raise ValueError(msg)
        total = precise.double().var(0).sum()
        # A floor for embeddings that lie in the subspace: far below any variance inside of it.
        tail = torch.maximum((total - explained.sum()) / (self.dims - k), 1e-3 * explained[-1])

        coordinates = (precise.double() - mean) @ directions.T
        modes = max(1, min(len(self.centres) // self.clusterings, n // _IMAGES_PER_MODE))
        centres, share, covariance = _cluster(coordinates, modes, self.clusterings)
        variances, rotation = np.linalg.eigh(covariance.numpy())
        within = torch.maximum(torch.from_numpy(variances), tail)
        turn = torch.from_numpy(rotation)
        noise = self.feature_noise * within.mean()

        self.mean.copy_(mean)
        self.components.copy_(turn.T @ directions)
        self.variances.copy_(within + noise)
        self.tail_variance.copy_(tail + noise)
        self.noise_variance.copy_(noise)
        # More slots than Gaussians: some share one, which is the same density.
        slots = torch.arange(len(self.centres)) % len(centres)
        self.centres.copy_((centres @ turn / (within + noise).sqrt())[slots])
        self.log_weights.copy_((share[slots] / torch.bincount(slots)[slots]).log())

    @flows.full_precision
    def project(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Split the density of embeddings into what the flow models, and the rest.

        Args:
            embeddings: Embeddings, ``(N, D)``.

        Returns:
            Whitened coordinates w in the subspace, ``(N, k)``, and the rest of the log-density (all of it but
            ``log p_flow(w)``), ``(N,)``, nats.
        """
        centred = embeddings - self.mean
        coordinates = centred @ self.components.T
        residual = centred - coordinates @ self.components
        tail_dims = self.dims - len(self.components)
        rest = (
            -0.5 * self.variances.log().sum()
            - 0.5 * residual.square().sum(1) / self.tail_variance
            - 0.5 * tail_dims * torch.log(2 * math.pi * self.tail_variance)
        )
        return coordinates / self.variances.sqrt(), rest

    def blur(self, whitened: Tensor) -> Tensor:
        """Add the noise to whitened coordinates, ``(N, k)``, on which the flow trains."""
        return whitened + (self.noise_variance / self.variances).sqrt() * torch.randn_like(whitened)

    def inputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images and split the density of embeddings, as :meth:`project` does.

        Args:
            images: Pre-processed images, ``(N, 3, H, W)``.

        Returns:
            Whitened coordinates, ``(N, k)``, and the rest of the log-density, ``(N,)``, nats.

        Raises:
            ValueError: If a pixel is NaN or infinite, or the images have another size than the model's.
        """
        return self.project(self.embed(images))

    def density(self, inputs: Inputs, flow: InvertibleModule | None = None) -> Density:
        """Evaluate the density of embeddings from the two parts of :meth:`project`.

        The base distribution is the mixture of Gaussians. Parts: latents, log-determinant, and the rest.
        """
        whitened, rest = inputs
        z, log_det = (flow or self.flow)(whitened)
        base, radius = self._mixture(z)
        return Density(base + log_det + rest, radius, -torch.stack([base, log_det, rest], dim=1))

    @flows.full_precision
    def _mixture(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of latents, ``(N, k)``, under the base, and their distance from its nearest mean; ``(N,)``."""
        # By a matrix product: no tensor of N x modes x k numbers.
        squares = z.square().sum(1)
        kernels = torch.addmm(-0.5 * self.centres.square().sum(1), z, self.centres.T)
        base = torch.logsumexp(kernels + self.log_weights, dim=1) - 0.5 * (squares + z.shape[1] * math.log(2 * math.pi))
        return base, (squares - 2 * kernels.amax(1)).clamp(min=0).sqrt()


def _to_grid(layer: Tensor) -> Tensor:
    """Pool a map, ``(N, C, h, w)``, to about seven positions to a side; smaller ones stay as they are."""
    kernel = [max(1, round(length / _GRID)) for length in layer.shape[2:]]
    return functional.avg_pool2d(layer, kernel) if max(kernel) > 1 else layer


def _cluster(points: Tensor, modes: int, runs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find clusters by several runs of k-means.

    Args:
        points: ``(N, k)``.
        modes: Clusters of a run.
        runs: Runs, which start elsewhere.

    Returns:
        The means of the clusters of all runs, ``(M, k)``, the shares of the runs' points in them, ``(M,)``, and the
        covariance of the points within clusters, ``(k, k)``.
    """
    n, k = points.shape
    single = points.float().numpy()
    means, sizes = [], []
    scatter, freedom = points.new_zeros(k, k), 0
    for run in range(runs):
        # Random starts and few steps: the mean over runs makes up for what each of them lacks.
        # By one thread: from three on, scikit-learn adds up their sums in the order in which they are done.
        with threadpool_limits(1, user_api="openmp"):
            clusters = KMeans(modes, init="random", n_init=1, max_iter=10, random_state=run).fit(single)
        # Where points are the same, clusters may be without any: these are left out.
        kind = torch.from_numpy(clusters.labels_).long().unique(return_inverse=True)[1]
        size = kind.bincount().to(points)
        mean = points.new_zeros(len(size), k).index_add(0, kind, points) / size[:, None]
        deviation = points - mean[kind]
        scatter += deviation.T @ deviation
        freedom += n - len(size)
        means.append(mean)
        sizes.append(size)
    return torch.cat(means), torch.cat(sizes) / (n * runs), scatter / freedom
