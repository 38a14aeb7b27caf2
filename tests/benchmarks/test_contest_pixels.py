# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from sklearn.metrics import roc_auc_score

from anomalib_flowood.metrics import auroc
from benchmarks.contest.pixels import pixel_auroc, pixel_metrics


def test_pixel_auroc_agrees_with_ranks():
    maps = torch.randn(6, 20, 20).round(decimals=1)  # ties
    masks = torch.zeros(6, 20, 20, dtype=torch.uint8)
    masks[3:, 5:9, 5:9] = 1
    maps[3:, 5:9, 5:9] += 1
    expected = roc_auc_score(masks.flatten().numpy(), maps.flatten().numpy())
    assert pixel_auroc(maps, masks) == pytest.approx(expected)
    assert auroc(maps, masks.int()) == pytest.approx(expected)
    perfect = pixel_metrics(masks.float(), masks)
    assert perfect["pixel_auroc"] == pytest.approx(1)
    assert perfect["aupro"] == pytest.approx(1)
    assert pixel_metrics(maps, torch.zeros_like(masks)) == {}
