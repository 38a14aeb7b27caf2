# SPDX-License-Identifier: Apache-2.0
"""The detectors of the contest, by name, all on one backbone and with the same pre-processing.

Every rival keeps anomalib's defaults, but for the backbone: where a default names layers of a ResNet, the layers of the
same strides take their place. What differs from that is said in this folder's README.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from inspect import signature
from itertools import product, starmap
from typing import Any
from unittest.mock import patch

import timm
import torch
from anomalib.models import AnomalibModule, Cflow, Dfkde, Dfm, Fastflow, Padim, Patchcore, Patchflow
from anomalib.models.components.sampling import KCenterGreedy
from anomalib.models.image.cflow.utils import get_logp, positional_encoding_2d
from torch import Tensor, nn

from anomalib_flowood import EmbeddingFlow, FeatureMapFlow
from anomalib_flowood.features import feature_layers
from anomalib_flowood.models.components import backbone_pre_processor

from .baselines import MODELS, Baseline
from .coreset import select_coreset_idxs

CORESET = {"industrial": 0.01, "unified": 0.002, "one_class": 0.002, "cross": 0.001}
"""PatchCore's share of patches to keep: its default is 0.1, and the time to find them grows with its square."""

PADIM_FEATURES = 100
"""PaDiM's default for ResNet-18, the smaller of the two networks for which it has one."""


@dataclass(frozen=True)
class Detector:
    """A detector of the contest.

    Attributes:
        name: What tables call it.
        build: Builds it from the backbone, the image size and the kind of task.
        ours: Whether it is one of this package's.
        random: Whether the seed changes it.
        held_out_loss: For detectors that are trained until the loss on held-out normal images levels off: that loss,
            from the detector and a batch of pre-processed images.
        maps: Whether it gives anomaly maps.
        variant_of: The detector of which it is a variant, with other arguments than the defaults.
    """

    name: str
    build: Callable[[str, int, str], AnomalibModule]
    ours: bool = False
    random: bool = False
    held_out_loss: Callable[[AnomalibModule, Tensor], Tensor] | None = None
    maps: bool = True
    variant_of: str = ""


def components(backbone: str, image_size: int) -> dict[str, Any]:
    """Return what surrounds every detector alike: the backbone's pre-processing, and nothing that alters raw scores."""
    pre_processor = backbone_pre_processor(backbone, (image_size, image_size))
    return {"pre_processor": pre_processor, "post_processor": False, "evaluator": False, "visualizer": False}


@lru_cache
def stages(backbone: str) -> dict[int, str]:
    """Return timm's names of a backbone's layers by their stride."""
    return {stride: layer for layer, stride in feature_layers(backbone).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


class FullPrecision(FeatureMapFlow):
    """`FeatureMapFlow` that keeps its training features in single precision, to see what half precision costs."""

    def extract_training(self, images: Tensor, batch: int, total: int) -> tuple[Tensor, ...]:
        """Return the feature maps as they are."""
        del batch, total
        return self.extract(images)

    def prepare_training(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the reduced maps as they are."""
        return self.prepare_features(features)


def _feature_map_flow(
    backbone: str, size: int, kind: str, model: type[FeatureMapFlow] = FeatureMapFlow, **changes: Any
) -> AnomalibModule:
    del kind
    return model(backbone=backbone, image_size=(size, size), **changes, **components(backbone, size))


def _embedding_flow(backbone: str, size: int, kind: str, **changes: Any) -> AnomalibModule:
    del kind
    return EmbeddingFlow(backbone=backbone, image_size=(size, size), **changes, **components(backbone, size))


def _padim(backbone: str, size: int, kind: str) -> AnomalibModule:
    del kind
    layers = [stages(backbone)[stride] for stride in (4, 8, 16)]
    return Padim(backbone=backbone, layers=layers, n_features=PADIM_FEATURES, **components(backbone, size))


class QuickPatchcore(Patchcore):
    """PatchCore with the same coreset, found by fewer passes over the patches."""

    def fit(self) -> None:
        """Sample the coreset."""
        with patch.object(KCenterGreedy, "select_coreset_idxs", select_coreset_idxs):
            super().fit()


def _patchcore(backbone: str, size: int, kind: str) -> AnomalibModule:
    layers = [stages(backbone)[stride] for stride in (8, 16)]
    return QuickPatchcore(
        backbone=backbone, layers=layers, coreset_sampling_ratio=CORESET[kind], **components(backbone, size)
    )


def _dfm(backbone: str, size: int, kind: str) -> AnomalibModule:
    del kind
    return Dfm(backbone=backbone, layer=stages(backbone)[16], **components(backbone, size))


def _dfkde(backbone: str, size: int, kind: str) -> AnomalibModule:
    del kind
    return Dfkde(backbone=backbone, layers=[stages(backbone)[32]], **components(backbone, size))


def _fastflow(backbone: str, size: int, kind: str) -> AnomalibModule:
    """FastFlow has a list of backbones: it is told ResNet-18, and timm, while it is being built, to make ours."""
    del kind
    create = timm.create_model

    def ours(name: str, *args: Any, **kwargs: Any) -> nn.Module:
        del name
        return create(backbone, *args, **kwargs)

    with patch.object(timm, "create_model", ours):
        return Fastflow(backbone="resnet18", **components(backbone, size))


def _patchflow(backbone: str, size: int, kind: str) -> AnomalibModule:
    del kind
    return Patchflow(backbone=backbone, **components(backbone, size))


def _cflow(backbone: str, size: int, kind: str) -> AnomalibModule:
    del kind
    layers = [stages(backbone)[stride] for stride in (8, 16, 32)]
    return Cflow(backbone=backbone, layers=layers, **components(backbone, size))


def _baseline(name: str) -> Callable[[str, int, str], AnomalibModule]:
    def build(backbone: str, size: int, kind: str) -> AnomalibModule:
        del kind
        return Baseline(name, backbone, (size, size), **components(backbone, size))

    return build


# ---------------------------------------------------------------------------------------------------------------------
# Held-out losses
# ---------------------------------------------------------------------------------------------------------------------


def flow_loss(detector: AnomalibModule, images: Tensor) -> Tensor:
    """FastFlow's and PatchFlow's own training loss, with batch norms as they are at inference and nothing logged."""
    model = detector.model.eval()
    model.training = True  # of the outer module alone: it returns latents then, not maps
    try:
        return detector.loss(*model(images))
    finally:
        model.train()


def cflow_loss(detector: AnomalibModule, images: Tensor) -> Tensor:
    """CFlow's training loss, without its optimizer: the mean of −log σ(log p per dimension) over all positions."""
    model: Any = detector.model
    model.decoders.eval()
    losses = []
    for layer, features in model.encoder(images).items():
        n, channels, height, width = features.shape
        where = positional_encoding_2d(model.condition_vector, height, width).flatten(1).T.repeat(n, 1)
        fibers = features.flatten(2).mT.reshape(-1, channels)
        z, log_det = model.decoders[list(model.pool_layers).index(layer)](fibers, [where])
        losses.append(-nn.functional.logsigmoid(get_logp(channels, z, log_det) / channels))
    model.decoders.train()
    return torch.cat(losses).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

_OURS = {
    "FeatureMapFlow": Detector("FeatureMapFlow", _feature_map_flow, ours=True, random=True),
    "EmbeddingFlow": Detector("EmbeddingFlow", _embedding_flow, ours=True, random=True, maps=False),
}

UNTURNED = {f"{name} (no rotations)": name for name in _OURS}
"""Variants without rotated images, and the detectors that they are variants of."""

ONE_KIND = {f"{name} (one kind)": f"{name} (no rotations)" for name in _OURS}
"""Variants that treat all normal images as one kind, and the detectors that they are variants of; without rotations."""

NO_BANK = {"FeatureMapFlow (no bank)": "FeatureMapFlow (no rotations)"}
"""Variants without a memory bank, and the detectors that they are variants of; without rotations."""

_FLOWS: dict[str, dict[str, Any]] = {
    "FeatureMapFlow": {"coupling_layers": 10, "bank_size": 0},
    "EmbeddingFlow": {"coupling_layers": 6},
}
"""Arguments that give our detectors a flow, which they do not have by default; without a memory bank, whose distances
do not depend on it."""

TRAINED = {
    "FeatureMapFlow (flow)": "FeatureMapFlow (no bank)",
    "EmbeddingFlow (flow)": "EmbeddingFlow (no rotations)",
}
"""Variants with a flow, and the detectors that they are variants of; without rotations."""


def _variant(name: str, of: str, **changes: Any) -> Detector:
    usual = _OURS[of]
    return replace(usual, name=name, build=partial(usual.build, **changes), ours=False, variant_of=of)


_ALL = [
    *_OURS.values(),
    *(_variant(name, of, rotations=False) for name, of in UNTURNED.items()),
    *(_variant(name, UNTURNED[of], rotations=False, kind_images=0) for name, of in ONE_KIND.items()),
    *(_variant(name, UNTURNED[of], rotations=False, bank_size=0) for name, of in NO_BANK.items()),
    *(_variant(f"{of} (flow)", of, rotations=False, **changes) for of, changes in _FLOWS.items()),
    Detector("Fastflow", _fastflow, random=True, held_out_loss=flow_loss),
    Detector("Patchflow", _patchflow, random=True, held_out_loss=flow_loss),
    Detector("Cflow", _cflow, random=True, held_out_loss=cflow_loss),
    Detector("Patchcore", _patchcore),
    Detector("Padim", _padim, random=True),
    Detector("Dfm", _dfm),
    Detector("Dfkde", _dfkde, maps=False),
    *(Detector(name, _baseline(name), maps=False) for name in MODELS),
]

DETECTORS = {detector.name: detector for detector in _ALL}
"""The contest's detectors, ours first."""

OURS = {name for name, detector in DETECTORS.items() if detector.ours}

VARIANTS = {name: detector.variant_of for name, detector in DETECTORS.items() if detector.variant_of}
"""Variants of our detectors, and of which."""

BASELINES = (*MODELS, *VARIANTS)
"""What is no rival: plain baselines, and variants of our detectors."""

ON_EMBEDDINGS = ("EmbeddingFlow", "EmbeddingFlow (flow)", *MODELS)
"""Detectors on the embeddings of `EmbeddingFlow`; of thousands of images, which it does not turn."""

_CHANGES: list[dict[str, Any]] = [
    *({"context": context} for context in ("none", "quadrant")),
    {"subnet": "bottleneck"},
    {"scale": "tanh"},
    {"hidden_channels": 64},
    *({"coupling_layers": layers} for layers in (0, 4)),
    {"subspace_dim": 32},
    {"layout_dims": 0},
    {"feature_noise": 0.0},
    *({"score_fraction": fraction} for fraction in (0.001, 0.1)),
    {"bank_size": 0},
    *({"map_layers": layers} for layers in (("blocks.2",), ("blocks.4",), ("blocks.4", "blocks.6"))),
    *({"score_layers": layers} for layers in ((), ("blocks.4",), ("blocks.6",))),
]


PRODUCT_MASKS = ("position", "cycle", "checkerboard", "horizontal", "channel")
PRODUCT_NETWORKS: dict[str, dict[str, Any]] = {
    **{f"K = {dim}": {"subnet": "bottleneck", "bottleneck_dim": dim} for dim in (8, 32)},
    "mlp": {"subnet": "mlp"},
}
PRODUCT_LAYERS: dict[str, dict[str, Any]] = {
    layer: {"map_layers": (layer,), "score_layers": (layer,)} for layer in ("blocks.4", "blocks.6")
}


def variant(changes: dict[str, Any]) -> Detector:
    """Return `FeatureMapFlow` with some arguments changed, named after those that are not its defaults."""
    usual = {name: parameter.default for name, parameter in signature(FeatureMapFlow).parameters.items()}
    changes = {key: value for key, value in changes.items() if usual[key] != value}
    name = ", ".join(
        f"{key}={('+'.join(value) or 'none') if isinstance(value, tuple) else value}" for key, value in changes.items()
    )
    return Detector(name or "defaults", partial(_feature_map_flow, **changes), ours=True, random=True)


def product_variant(mask: str, network: str, layer: str) -> Detector:
    """Return the variant with one of each of the ``PRODUCT_…``."""
    return variant({"mask": mask, **PRODUCT_NETWORKS[network], **PRODUCT_LAYERS[layer]})


def one_change() -> dict[str, Detector]:
    """Return `FeatureMapFlow` with its defaults and with one change at a time.

    ``float32 features`` keeps the training features in single precision.
    """
    full = Detector("float32 features", partial(_feature_map_flow, model=FullPrecision), ours=True, random=True)
    return {detector.name: detector for detector in (variant({}), *map(variant, _CHANGES), full)}


def ablation() -> dict[str, Detector]:
    """Return what :func:`one_change` does, and every mask with every network on every one of the product's layers."""
    cells = product(PRODUCT_MASKS, PRODUCT_NETWORKS, PRODUCT_LAYERS)
    return one_change() | {detector.name: detector for detector in starmap(product_variant, cells)}
