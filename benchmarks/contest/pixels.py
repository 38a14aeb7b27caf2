# SPDX-License-Identifier: Apache-2.0
"""Metrics of anomaly maps, and the maps that are kept for pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from anomalib.metrics.aupro import _AUPRO
from anomalib.metrics.pimo.functional import aupimo_scores
from torch import Tensor
from torch.nn import functional

from anomalib_flowood.metrics import auroc

from .callbacks import Recorder

AUPIMO_THRESHOLDS = 30_000
"""A tenth of anomalib's default, for the time it takes."""


def pixel_metrics(maps: Tensor, masks: Tensor, *, aupimo: bool = True) -> dict[str, Any]:
    """Pixel AUROC, AUPRO up to a false positive rate of 0.3, and AUPIMO of raw maps.

    Args:
        maps: Raw anomaly maps, ``(N, H, W)``.
        masks: 1 where an image is anomalous, ``(N, H, W)``.
        aupimo: Whether to compute AUPIMO, which takes longest.

    Returns:
        Those of the three that are defined.

    Raises:
        ValueError: If a value of a map is NaN.
    """
    if not bool(masks.any()) or bool(masks.all()):
        return {}
    result: dict[str, Any] = {"pixel_auroc": auroc(maps, masks)}
    aupro = _AUPRO()
    aupro.update(maps, masks)
    result["aupro"] = float(aupro.compute())
    del aupro
    if not aupimo:
        return result
    try:
        values = aupimo_scores(maps, masks.bool(), AUPIMO_THRESHOLDS, fpr_bounds=(1e-5, 1e-4))[4]
    except (RuntimeError, ValueError):  # no normal image, or a map too coarse for such rates
        return result
    return {**result, "aupimo": float(values[~values.isnan()].mean())}


def save_maps(path: Path, recorder: Recorder) -> None:
    """Save the maps for pictures: half as large, brought to [0, 1], in half precision."""
    if recorder.maps is None or recorder.masks is None:
        return
    scores = recorder.scores
    maps = functional.avg_pool2d(recorder.maps[:, None], 2)[:, 0]
    low, high = float(maps.min()), float(maps.max())
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        maps=((maps - low) / max(high - low, 1e-12)).half().numpy(),
        masks=functional.max_pool2d(recorder.masks[:, None].float(), 2)[:, 0].bool().numpy(),
        paths=scores["image_path"].to_numpy(dtype=str),
        labels=scores["label"].to_numpy(),
        scores=scores["score"].to_numpy(),
    )
