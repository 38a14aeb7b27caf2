# SPDX-License-Identifier: Apache-2.0
"""PyTorch model of EmbeddingFlow."""

from __future__ import annotations

import math

import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional

from anomalib_flowood import flows
from anomalib_flowood.backbones import create_backbone, run_backbone
from anomalib_flowood.models.components import FlowModel, check_images


class EmbeddingFlowModel(FlowModel):
    """Density of a frozen network's embeddings: a flow in their principal subspace, a Gaussian in the rest.

    An embedding e is the network's pooled feature vector at length 1, of D numbers. With the principal subspace of the
    training embeddings (mean m, directions U, variances v, k of them) and the mean variance q of what is left over::

        w = U^T (e - m) / sqrt(v),   r = (e - m) - U U^T (e - m)
        log p(e) = log p_flow(w) - 1/2 sum log v  -  |r|^2 / (2 q) - (D - k)/2 log(2 pi q)

    which is the density of probabilistic PCA (Tipping and Bishop 1999, section 3) with its Gaussian in the subspace
    replaced by a RealNVP flow.

    Args:
        backbone: A timm name or ``local-dir:FOLDER``, see :mod:`anomalib_flowood.backbones`.
        pre_trained: Load the backbone's weights.
        subspace_dim: k, the number of principal directions.
        subnet: s,t-network on vectors: ``mlp`` or ``bottleneck``.
        coupling_layers: Number of couplings.
        hidden_channels: Width of the s,t-networks.
        bottleneck_dim: Numbers that pass the squeeze of the ``bottleneck`` network.

    Raises:
        ValueError: If the backbone is unknown, or the configuration makes no sense.
        BackboneUnavailableError: If the backbone's weights cannot be had.
    """

    mean: Tensor
    components: Tensor
    variances: Tensor
    tail_variance: Tensor

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        *,
        pre_trained: bool = True,
        subspace_dim: int = 128,
        subnet: str = "mlp",
        coupling_layers: int = 6,
        hidden_channels: int = 128,
        bottleneck_dim: int = 16,
    ) -> None:
        flow = flows.vector_flow(
            subspace_dim,
            subnet=subnet,
            coupling_layers=coupling_layers,
            hidden_channels=hidden_channels,
            bottleneck_dim=bottleneck_dim,
        )
        network = create_backbone(backbone, pre_trained=pre_trained, num_classes=0)
        # The head of some networks widens the pooled features.
        dims = int(getattr(network, "head_hidden_size", None) or network.num_features)  # type: ignore[arg-type]
        if subspace_dim >= dims:
            msg = f"subspace_dim={subspace_dim} must be below the {dims} numbers of an embedding of {backbone!r}."
            raise ValueError(msg)
        super().__init__(flow, dims, levels=1)
        self.backbone = network
        self.register_buffer("mean", torch.zeros(self.dims))
        self.register_buffer("components", torch.zeros(subspace_dim, self.dims))
        self.register_buffer("variances", torch.ones(subspace_dim))
        self.register_buffer("tail_variance", torch.ones(()))

    def train(self, mode: bool = True) -> EmbeddingFlowModel:
        """Set the flow's mode; the backbone is frozen, its batch norms included."""
        super().train(mode)
        self.backbone.eval()
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Embed images at length 1.

        Args:
            images: Images as the backbone wants them, ``(N, 3, H, W)``.

        Returns:
            Embeddings, ``(N, D)``.

        Raises:
            ValueError: If a pixel is NaN or infinite.
        """
        check_images(images)
        (pooled,) = run_backbone(self.backbone, images)
        return functional.normalize(pooled, dim=1)

    def fit_subspace(self, embeddings: Tensor) -> None:
        """Fit the principal subspace and the variance of the rest.

        Args:
            embeddings: All training embeddings, ``(N, D)``.

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
        # NumPy: torch's eigensolvers are slower on the CPU, and this runs once per fit. Where images outnumber
        # dimensions, the covariance is exact and the fastest.
        solver = "covariance_eigh" if n > self.dims else "auto"
        pca = PCA(n_components=k, svd_solver=solver, random_state=0).fit(embeddings.double().cpu().numpy())
        variances = torch.from_numpy(pca.explained_variance_)
        total = embeddings.double().var(0).sum()
        tail = (total - variances.sum()).clamp(min=0) / (self.dims - k)
        if float(variances[-1]) <= 1e-10 * float(variances[0]) or float(variances[0]) <= 1e-12:
            rank = int((variances > 1e-10 * variances[0]).sum()) if float(variances[0]) > 1e-12 else 0
            msg = (
                f"The {n} training embeddings vary in {rank} directions only, fewer than subspace_dim={k}: "
                "are many training images the same, or constant? Set subspace_dim lower or give more varied images."
            )
            raise ValueError(msg)
        self.mean.copy_(torch.from_numpy(pca.mean_))
        self.components.copy_(torch.from_numpy(pca.components_))
        self.variances.copy_(variances)
        # A floor for embeddings that lie in the subspace: far below any variance inside of it.
        self.tail_variance.copy_(torch.maximum(tail.cpu(), 1e-3 * variances[-1]))

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

    def flow_log_prob(self, whitened: Tensor, rest: Tensor) -> Tensor:
        """Log-density of embeddings from the two parts of :meth:`project`; nats, ``(N,)``."""
        z, log_det = self.flow(whitened)
        return flows.standard_normal_log_prob(z) + log_det + rest

    def log_prob(self, images: Tensor) -> Tensor:
        """Log-density of the images' embeddings.

        Args:
            images: Pre-processed images, ``(N, 3, H, W)``.

        Returns:
            Nats, ``(N,)``.

        Raises:
            ValueError: If a pixel is NaN or infinite.
        """
        return self.flow_log_prob(*self.project(self.embed(images)))
