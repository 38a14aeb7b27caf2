# SPDX-License-Identifier: Apache-2.0
"""Lightning model of FeatureMapFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from torch import Tensor

from anomalib_flowood.flows import MASKS, SCALES, SUBNETS
from anomalib_flowood.metrics import AUROC
from anomalib_flowood.models.components import FlowModule, FrozenFeatures, backbone_pre_processor
from anomalib_flowood.names import lists_names

from .torch_model import FeatureMapFlowModel


@lists_names(masks=MASKS, subnets=SUBNETS, scales=SCALES)
class FeatureMapFlow(FrozenFeatures, FlowModule, AnomalibModule):
    """Normalizing flow on the feature maps of a frozen, pretrained network: says what does not belong, and where.

    Args:
        backbone: A timm name, or ``local-dir:FOLDER`` with weights in it.
        layers: Layers whose maps are modelled, by timm's module names or indices, one flow for each; ``None`` for the
            last one of stride 16 or less.
        pre_trained: Load the backbone's weights.
        image_size: Height and width that the backbone gets.
        subspace_dim: Principal directions to which each layer's descriptors are reduced.
        layout_dims: Principal directions of whole maps that are whitened before the flow; at most one for five training
            images are used.
        mask: Coupling mask: {masks}.
        subnet: s,t-network: {subnets}.
        bottleneck_dim: Numbers that pass the squeeze of the ``bottleneck`` network.
        coupling_layers: Number of couplings. Without any it is a whitened Gaussian, and nothing trains.
        hidden_channels: Width of the s,t-networks.
        scale: Log-scales of the couplings: {scales}; ``none`` for additive couplings, which shift values only.
        score_dims: Leading principal directions of each layer that make the image score; the anomaly map takes all.
        score_fraction: The image score is a mean over positions: those where the leading directions are least likely,
            this share of them. All by default; small shares look for small defects.
        feature_noise: Standard deviation of the Gaussian noise on whitened features in training. It keeps the flow
            from learning few images by heart.
        cache_gib: Memory for stored features, in GiB; more go to a temporary file.
        max_epochs: Epochs to train when the trainer names no limit.
        learning_rate: Adam's learning rate at the start; it follows a cosine down to zero.
        pre_processor: anomalib's; by default images are resized and normalised as the backbone was trained.
        post_processor: anomalib's; by default labels are conformal at alpha = 0.05, from normal validation images.
        evaluator: anomalib's; by default AUROC, FPR95 and F1 of images, and AUROC of pixels.
        visualizer: anomalib's; by default it draws every test image's map.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense.
        BackboneUnavailableError: If the backbone's weights cannot be had.
    """

    model: FeatureMapFlowModel
    reference_images = 256
    least_images = 3

    readable_since = "0.2.0"

    may_change = FlowModule.may_change | {"feature_noise", "cache_gib"}

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str | int] | None = None,
        pre_trained: bool = True,
        image_size: tuple[int, int] = (224, 224),
        subspace_dim: int = 96,
        layout_dims: int = 128,
        mask: str = "cycle",
        subnet: str = "bottleneck",
        bottleneck_dim: int = 128,
        coupling_layers: int = 4,
        hidden_channels: int = 256,
        scale: str = "tanh",
        score_dims: int = 16,
        score_fraction: float = 1.0,
        feature_noise: float = 1.0,
        cache_gib: float = 2.0,
        max_epochs: int = 12,
        learning_rate: float = 1e-3,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            pre_processor=backbone_pre_processor(backbone, image_size) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.max_epochs = max_epochs
        self.learning_rate = learning_rate
        self.cache_gib = cache_gib
        self.feature_noise = feature_noise
        height, width = image_size
        self.model = FeatureMapFlowModel(
            backbone,
            layers,
            (height, width),
            pre_trained=pre_trained,
            subspace_dim=subspace_dim,
            layout_dims=layout_dims,
            mask=mask,
            subnet=subnet,
            bottleneck_dim=bottleneck_dim,
            coupling_layers=coupling_layers,
            hidden_channels=hidden_channels,
            scale=scale,
            score_dims=score_dims,
            score_fraction=score_fraction,
        )
        self._reference: tuple[Tensor, ...] = ()
        self._scaled_step = -1

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """The image metrics of all our detectors, and AUROC of pixels where there are masks."""
        evaluator = FlowModule.configure_evaluator()
        evaluator.test_metrics.append(AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False))
        return evaluator

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Draw the map of every test image, as anomalib's detectors do."""
        return ImageVisualizer()

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps, ``(N, C, h, w)`` for each layer, in half precision: they are many."""
        return tuple(layer.clamp(-6e4, 6e4).half() for layer in self.model.extract(images))

    def fit_features(self, features: tuple[Tensor, ...]) -> None:
        """Fit the principal subspaces, and the whitening of whole maps."""
        self.model.fit_features(features)

    def keep_reference(self, features: tuple[Tensor, ...]) -> None:
        """Keep reduced maps of some images, in the order of the loader that shuffled them, to measure scales on."""
        self._reference = features
        self._scaled_step = -1

    def prepare_features(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return each layer's reduced map, ``(N, D, h, w)``, in half precision, and the rest of its log-density."""
        return tuple(part.half() if part.ndim == 4 else part for part in self.model.reduce(features))

    def inputs_of(self, batch: Any) -> tuple[Tensor, ...]:
        """Each layer's reduced map, ``(N, D, h, w)``, and the rest of its log-density, ``(N, h, w)``."""
        return tuple(part.to(self.dtype) for part in super().inputs_of(batch))

    def training_inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """The same, with noise on the reduced maps."""
        noise = self.feature_noise
        return tuple(
            part + noise * torch.randn_like(part) if part.ndim == 4 else part for part in self.inputs_of(batch)
        )

    def on_validation_start(self) -> None:
        """Measure the layers' scales with the current weights, before validation images are scored by them."""
        super().on_validation_start()
        self._fit_map_scale()

    def on_train_epoch_end(self) -> None:
        """Measure the layers' scales where no validation did."""
        super().on_train_epoch_end()
        self._fit_map_scale()

    @torch.no_grad()
    def _fit_map_scale(self) -> None:
        # Once for the same weights: what a validation has calibrated stays to the last bit.
        if self._reference and self._scaled_step != self.trainer.global_step:
            self._scaled_step = self.trainer.global_step
            self.model.fit_map_scale(tuple(part.to(self.device, self.model.dtype) for part in self._reference))
