# SPDX-License-Identifier: Apache-2.0
"""Images as a detector sees them: after a crop or a padding its maps cover these, and not the files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Grayscale, Identity, Normalize, Resize, ToDtype, ToImage, Transform

from anomalib_flowood.data.items import in_unit_range

_WHOLE = (Resize, Normalize, Grayscale, ToDtype, ToImage, Identity)
"""Transforms after which an image shows all that it showed before, and nothing else, at the same places."""


def steps_of(transform: Transform | None) -> Iterator[Transform]:
    """The single steps of nested compositions."""
    if isinstance(transform, Compose):
        for step in transform.transforms:
            yield from steps_of(step)
    elif transform is not None:
        yield transform


def transform_of(detector: nn.Module | None) -> Transform | None:
    """What a detector's pre-processor does to images, if there is one."""
    return getattr(getattr(detector, "pre_processor", None), "transform", None)


def moves_places(detector: nn.Module | None, dataset: Any = None) -> bool:
    """Whether a place of a detector's map is another one in the file: after a crop, a padding, a flip, say.

    Args:
        detector: Any, of which the pre-processor counts.
        dataset: Where its images come from, of which the augmentations count; perhaps a part, or a wrapper.
    """
    transforms = [transform_of(detector)]
    while dataset is not None:
        transforms += [getattr(dataset, name, None) for name in ("augmentations", "transform")]
        dataset = getattr(dataset, "dataset", None)
    steps = [step for one in transforms if isinstance(one, Transform) for step in steps_of(one)]
    return not all(isinstance(step, _WHOLE) for step in steps)


def as_seen(images: Tensor, transform: Transform | None) -> Tensor:
    """Undo the normalisation of pre-processed images, so that they can be shown.

    Args:
        images: Behind the pre-processing, ``(..., C, H, W)``.
        transform: The pre-processing.

    Returns:
        The images in [0, 1].
    """
    shown = in_unit_range(images.as_subclass(Tensor))
    for step in reversed(list(steps_of(transform))):
        if isinstance(step, Normalize):
            mean, std = (torch.tensor(part).to(shown)[:, None, None] for part in (step.mean, step.std))
            shown = shown * std + mean
    return shown.clamp(0, 1)
