# SPDX-License-Identifier: Apache-2.0
"""Checks on what reaches a torch model, and on what leaves it."""

from __future__ import annotations

import torch
from torch import Tensor


def check_images(images: Tensor, *, unit_range: bool = False) -> None:
    """Refuse images that cannot be scored. Skipped in exported graphs, which cannot raise.

    Args:
        images: Pre-processed images, ``(N, C, H, W)``.
        unit_range: Whether values must lie in [0, 1].

    Raises:
        ValueError: If a value is NaN or infinite, or outside of the range.
    """
    if torch.compiler.is_compiling():
        return
    if not bool(torch.isfinite(images).all()):
        broken = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
        msg = f"Images {broken[:10]} of this batch have NaN or infinite pixels. Repair or remove them."
        raise ValueError(msg)
    if unit_range and images.numel() and bool((images.min() < -1e-3) | (images.max() > 1 + 1e-3)):
        msg = (
            f"Images must lie in [0, 1], got values from {images.min():.3g} to {images.max():.3g}. A flow on pixels "
            "takes no normalisation: pass a pre-processor that only resizes, or none."
        )
        raise ValueError(msg)


def finite_scores(scores: Tensor) -> Tensor:
    """Make an image that has no score the most anomalous one.

    Args:
        scores: Scores, ``(N,)``; NaN where the flow overflowed.

    Returns:
        The same, with infinity in place of NaN.
    """
    return torch.where(torch.isnan(scores), torch.full_like(scores, float("inf")), scores)
