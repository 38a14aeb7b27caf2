# SPDX-License-Identifier: Apache-2.0
from functools import partial

import numpy as np
import pytest
from model_helpers import BACKBONE
from PIL import Image

from anomalib_flowood import FeatureMapFlow
from benchmarks.contest import baselines, detectors, tasks
from benchmarks.contest import plan as plans


@pytest.fixture
def folder(tmp_path):
    """Grey noise; the broken ones have a bright square."""
    rng = np.random.default_rng(0)
    root = tmp_path / "plates"
    for place, count in {"train/good": 24, "test/good": 5, "test/spot": 6}.items():
        (root / place).mkdir(parents=True)
        for number in range(count):
            pixels = rng.normal(100, 12, (40, 40, 3))
            mask = np.zeros((40, 40), np.uint8)
            if place == "test/spot":
                corner = 4 + 3 * number
                pixels[corner : corner + 12, corner : corner + 12] += 130
                mask[corner : corner + 12, corner : corner + 12] = 255
                (root / "ground_truth/spot").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / f"ground_truth/spot/{number:03}.png")
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / place / f"{number:03}.jpg")
    return root


@pytest.fixture
def small_contest(monkeypatch):
    """Two detectors on the network for tests, without weights."""
    calls = []

    def flow(backbone, size, kind):
        calls.append("flow")
        return FeatureMapFlow(
            BACKBONE, (1, 2), (2,), False, (size, size), subspace_dim=4, coupling_layers=2, hidden_channels=8,
            bottleneck_dim=3, max_epochs=1, **detectors.components(BACKBONE, size),
        )  # fmt: skip

    def knn(backbone, size, kind):
        calls.append("knn")
        return baselines.Baseline("KNN", BACKBONE, (size, size), **detectors.components(BACKBONE, size))

    monkeypatch.setitem(baselines.MODELS, "KNN", partial(baselines.KNNModel, pre_trained=False))
    monkeypatch.setattr(tasks, "MAP_SIZE", 48)
    chosen = {
        "FeatureMapFlow": detectors.Detector("FeatureMapFlow", flow, ours=True),
        "KNN": detectors.Detector("KNN", knn, maps=False),
    }
    monkeypatch.setattr(plans, "DETECTORS", chosen)
    return calls
