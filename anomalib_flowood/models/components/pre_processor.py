# SPDX-License-Identifier: Apache-2.0
"""Pre-processing that an exported model repeats exactly."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import Compose, Normalize, Resize, Transform

from anomalib_flowood.checks import check_batch, check_range
from anomalib_flowood.data.resizing import is_antialiased
from anomalib_flowood.features import backbone_config

logger = logging.getLogger(__name__)

_DEFAULT_BACKBONE = "tf_efficientnet_lite0"


def check_given(pre_processor: Any, batch: Any) -> None:
    """Refuse what a pre-processor cannot take, before it makes something else of it.

    Args:
        pre_processor: Any; one of ours takes images in [0, 1].
        batch: What a loader gives.

    Raises:
        TypeError: If it is no batch of anomalib's.
        ValueError: If its images are not divided by what white is.
    """
    check_batch(batch)
    if isinstance(pre_processor, ExactPreProcessor):
        check_range(batch.image)


class ExactPreProcessor(PreProcessor):
    """anomalib's pre-processor, without its loss of antialiasing in exported models.

    anomalib exports ``Resize`` without antialiasing, because OpenVINO ignores it: an exported model then scores images
    larger than its input differently from the model that was tested. Here the exported graph resizes by two matrix
    products, which every runtime computes alike.

    Args:
        transform: Transform of the images.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self.export_transform = _exportable(transform)

    def forward(self, batch: Tensor) -> Tensor:
        """Pre-process images in [0, 1], ``(N, C, H, W)``; ``ValueError`` of others."""
        if not torch.compiler.is_compiling():
            check_range(batch)
        return super().forward(batch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Pre-process a training batch."""
        check_given(self, batch)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Pre-process a validation batch, of several loaders, too, of which anomalib's hook knows nothing."""
        del dataloader_idx
        check_given(self, batch)
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Pre-process a test batch."""
        check_given(self, batch)
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Pre-process a batch to predict."""
        check_given(self, batch)
        super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the transform from a checkpoint."""
        super().load_checkpoint_config(config)
        self.export_transform = _exportable(self.transform)


def backbone_pre_processor(backbone: str, image_size: tuple[int, int] | None = None) -> ExactPreProcessor:
    """Return the pre-processing that a backbone was trained with.

    Args:
        backbone: A timm name or ``local-dir:FOLDER``.
        image_size: Height and width; ``None`` for the size that the backbone was trained at.

    Returns:
        Resize, then normalise with the mean and standard deviation of the backbone's configuration.

    Raises:
        ValueError: If the name is unknown.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
    """
    config = backbone_config(backbone)
    size = tuple(image_size or config["input_size"][-2:])
    return ExactPreProcessor(Compose([Resize(size, antialias=True), Normalize(config["mean"], config["std"])]))


def default_pre_processor(image_size: tuple[int, int] | None = None) -> ExactPreProcessor:
    """:func:`backbone_pre_processor` for the detectors' default backbone, as ``configure_pre_processor`` of a class."""
    return backbone_pre_processor(_DEFAULT_BACKBONE, image_size)


def tell_of_other_normalisation(transform: Transform | None, backbone: Any) -> None:
    """Warn where a transform normalises images otherwise than a backbone was trained with.

    Args:
        transform: That of a pre-processor.
        backbone: A network, of which nothing is known unless it has timm's ``pretrained_cfg``.
    """
    if isinstance(transform, Compose):
        for part in transform.transforms:
            tell_of_other_normalisation(part, backbone)
    config = getattr(backbone, "pretrained_cfg", None)
    if not isinstance(transform, Normalize) or config is None:
        return
    given, trained = [*transform.mean, *transform.std], [*config["mean"], *config["std"]]
    if not np.allclose(given, trained):
        logger.warning(
            "The pre-processor normalises images with mean %s and standard deviation %s, the backbone was trained with "
            "%s and %s. Without the argument pre_processor they are normalised so; image_size resizes them.",
            *map(list, (transform.mean, transform.std, config["mean"], config["std"])),
        )


class AntialiasedResize(nn.Module):
    """Bilinear resize with antialiasing, in matrix products; equals torchvision's ``Resize(antialias=True)``.

    Args:
        size: Height and width of the result.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Resize ``(N, C, H, W)``.

        Raises:
            ValueError: If the images are no floats.
        """
        if not torch.compiler.is_compiling():
            if tuple(images.shape[-2:]) == self.size:
                return images  # a large one would be multiplied by two identities, and copied
            if not images.is_floating_point():
                msg = (
                    f"Images have to be floats in [0, 1], got {images.dtype}: divide 8 bits by 255, or let "
                    "anomalib_flowood.load(…).score read images of any kind."
                )
                raise ValueError(msg)
        rows, columns = (
            _weights(length, out, images) for length, out in zip(images.shape[-2:], self.size, strict=True)
        )
        # Ends in a transposition: OpenVINO fuses what is done per channel into a product, along the wrong axis.
        return (columns @ (rows @ images).mT).mT


class ChannelNormalize(nn.Module):
    """Equals torchvision's ``Normalize``; in an exported graph a 1 × 1 convolution.

    Sums and products with a number per channel take OpenVINO seven times as long, where three channels are innermost.

    Args:
        normalize: torchvision's.
    """

    def __init__(self, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``(N, C, H, W)``."""
        if not torch.compiler.is_compiling():
            return self.normalize(images)
        mean, std = images.new_tensor(self.normalize.mean), images.new_tensor(self.normalize.std)
        return functional.conv2d(images, torch.diag(1 / std)[:, :, None, None], -mean / std)


def _weights(length: int, out: int, like: Tensor) -> Tensor:
    """Weights ``(out, length)`` of a triangle filter as wide as one step of the coarser grid, rows summing to 1."""
    pixels = torch.arange(length, dtype=like.dtype, device=like.device) + 0.5
    centres = (torch.arange(out, dtype=like.dtype, device=like.device) + 0.5) * (length / out)
    slope: Any = torch.sym_min(out / length, 1.0)  # a number, or a symbol in an exported graph
    weights = (1 - (pixels[None] - centres[:, None]).abs() * slope).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _exportable(transform: Transform | None) -> nn.Module | None:
    if isinstance(transform, Compose):
        return nn.Sequential(*filter(None, map(_exportable, transform.transforms)))
    if isinstance(transform, Normalize):
        return ChannelNormalize(transform)
    if isinstance(transform, Resize) and is_antialiased(transform):
        return AntialiasedResize(tuple(transform.size))
    return transform
