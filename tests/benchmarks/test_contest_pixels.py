# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.contest.pixels import pixel_metrics


def plates():
    maps = torch.randn(6, 20, 20).round(decimals=1)  # ties
    masks = torch.zeros(6, 20, 20, dtype=torch.uint8)
    masks[3:, 5:9, 5:9] = 1
    maps[3:, 5:9, 5:9] += 1
    return maps, masks


def test_pixel_metrics():
    maps, masks = plates()
    expected = roc_auc_score(masks.flatten().numpy(), maps.flatten().numpy())
    assert pixel_metrics(maps, masks)["pixel_auroc"] == pytest.approx(expected, abs=1e-12)
    perfect = pixel_metrics(masks.float(), masks)
    assert perfect["pixel_auroc"] == pytest.approx(1)
    assert perfect["aupro"] == pytest.approx(1)
    assert pixel_metrics(maps, torch.zeros_like(masks)) == {}


def test_a_map_with_nan_has_no_metrics():
    maps, masks = plates()
    maps[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="1 of 2400 scores are NaN"):
        pixel_metrics(maps, masks)
