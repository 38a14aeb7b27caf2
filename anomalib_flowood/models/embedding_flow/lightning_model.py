# SPDX-License-Identifier: Apache-2.0
"""Lightning model of EmbeddingFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor

from anomalib_flowood.checks import check_sizes
from anomalib_flowood.flows import SCALES, SUBNETS
from anomalib_flowood.models.components import FlowModule, FrozenFeatures, backbone_pre_processor, kinds
from anomalib_flowood.names import lists_names
from anomalib_flowood.scores import SCORES

from .torch_model import EmbeddingFlowModel


@lists_names(
    subnets=[name for name, subnet in SUBNETS.items() if subnet.fully_connected],
    scores=[name for name, score in SCORES.items() if not score.pixels_only],
    scales=SCALES,
)
class EmbeddingFlow(FrozenFeatures, FlowModule, AnomalibModule):
    """Density of the embeddings of a frozen, pretrained network.

    For whole images that do not belong: another class, another data set, a part that is broken or missing. One density
    over the whole embedding, which consists of the pooled features and the layout of feature maps: a mixture of
    Gaussians with a full, shrunk covariance, which takes seconds to fit, to two images or more. A normalizing flow
    before the mixture is off by default.

    Args:
        backbone: A timm name, or ``local-dir:FOLDER`` for a folder with weights.
        layers: Layers whose layout is part of the embedding, by timm's module names or indices; ``None`` for
            the last one of stride 16 or less (or of the finest stride there is) and the network's last, an empty list
            for none.
        pre_trained: Whether to load the backbone's weights.
        image_size: Height and width to which images are resized, unless a ``pre_processor`` says otherwise; ``None`` is
            the size of the backbone's training.
        map_dims: Principal directions of each layer's feature vectors.
        subspace_dim: Leading directions, along which the mixture has several means and couplings work; pooled features
            and layouts have an equal share each.
        modes: Clusters of each run of k-means; at most one for ten training images.
        kind_images: The fewest training images of a *kind* of normal image, such as one of several products: kinds are
            groups of images that have nothing in common for the backbone, and each has its own density. They are found
            without labels, and a fit says how many there are. 0 for one kind.
        feature_noise: Variance of the noise along every direction of a part of embeddings, in units of the part's
            total variance over the mean number of dimensions of a part.
        subnet: s,t-network: {subnets}.
        bottleneck_dim: Width of the squeeze in the ``bottleneck`` network.
        coupling_layers: Number of couplings. Without any the density is a mixture of Gaussians, and nothing is trained;
            with some it is no better on any data that the project measured.
        hidden_channels: Width of the s,t-networks.
        scale: Log-scales of the couplings: {scales}; ``none`` for additive couplings, which only shift values.
        rotations: Whether to fit to few images (500 at most) also rotated by 180°, and by 90° and 270° if they are
            square, provided that rotated images are as near to the others as the images are.
        score: {scores}; ``nll`` is −log p, with several kinds in standard deviations above its mean over held-out
            images of the kind. ``ensemble`` trains four more flows, of couplings. See docs/scores.md.
        max_epochs: Epochs to train if the trainer sets no limit.
        learning_rate: Adam's learning rate at the start; it follows a cosine down to zero.
        pre_processor: anomalib's; by default images are resized and normalised as in the backbone's training.
        post_processor: anomalib's; by default labels are conformal at alpha = 0.05, from normal validation images.
        evaluator: anomalib's; by default AUROC and FPR95, also of each outside set, F1, bits per dimension.
        visualizer: anomalib's; none by default, since there is no anomaly map.

    Raises:
        ValueError: If the backbone is unknown, or the configuration makes no sense.
        BackboneUnavailableError: If the backbone's weights cannot be had.
    """

    model: EmbeddingFlowModel

    readable_since = "0.2.0"

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str | int] | None = None,
        pre_trained: bool = True,
        image_size: tuple[int, int] | None = None,
        map_dims: int = 32,
        subspace_dim: int = 384,
        modes: int = 256,
        kind_images: int = 20,
        feature_noise: float = 1.0,
        subnet: str = "mlp",
        bottleneck_dim: int = 16,
        coupling_layers: int = 0,
        hidden_channels: int = 128,
        scale: str = "tanh",
        rotations: bool = True,
        score: str = "nll",
        max_epochs: int = 6,
        learning_rate: float = 2e-3,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            pre_processor=(
                backbone_pre_processor(backbone, image_size) if self.takes_default(pre_processor) else pre_processor
            ),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        image_size = self.resized_to(image_size, pre_processor)
        check_sizes(self.hparams)
        self.max_epochs = max_epochs
        self.learning_rate = learning_rate
        self.rotations = rotations
        self.model = EmbeddingFlowModel(
            backbone,
            layers,
            image_size,
            pre_trained=pre_trained,
            map_dims=map_dims,
            subspace_dim=subspace_dim,
            modes=modes,
            kind_images=kind_images,
            feature_noise=feature_noise,
            subnet=subnet,
            coupling_layers=coupling_layers,
            hidden_channels=hidden_channels,
            scale=scale,
            bottleneck_dim=bottleneck_dim,
            score=score,
        )

    def fit_features(self, features: tuple[Tensor, ...], copies: int = 1) -> None:
        """Fit embedding, kinds and their densities."""
        kinds.report(self.model.fit_features(features, copies), "the density")

    def training_inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """Return what :meth:`EmbeddingFlowModel.prepare` returns, with noise on the coordinates."""
        coordinates, rest, *kind = self.inputs_of(batch)
        return self.model.blur(coordinates, *kind), rest, *kind
