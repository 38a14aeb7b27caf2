# SPDX-License-Identifier: Apache-2.0
"""What holding out more of few images costs, on images of noise."""

import numpy as np
import pytest
import torch
from model_helpers import BACKBONE
from PIL import Image

from anomalib_flowood import EmbeddingFlow
from benchmarks.held_out import SHARES, decide, rows_of


def test_rows_of_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for place, count, mean in (("train/good", 20, 90), ("test/good", 6, 90), ("test/bad", 6, 160)):
        (tmp_path / "parts" / place).mkdir(parents=True)
        for number in range(count):
            pixels = rng.normal(mean, 30, (32, 32, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(tmp_path / "parts" / place / f"{number:02}.png")
    detector = EmbeddingFlow(BACKBONE, pre_trained=False, image_size=(32, 32), coupling_layers=0).eval()
    rows = rows_of(detector, tmp_path / "parts", [60], draws=1)
    assert len(rows) == len(SHARES)
    assert {row["share"] for row in rows} == {*SHARES}
    held = {row["share"]: row["held out"] for row in rows}
    assert (held["a half"], held["a quarter"]) == (10, 5)  # there are but 20
    assert all(0 <= row[name] <= 1 for row in rows for name in ("AUROC", "false alarms", "found"))


class Mean(torch.nn.Module):
    """Scores by the distance of a number from the mean of what it was fitted to."""

    def fit_features(self, features):
        self.mean = features[0].mean()

    def prepare(self, features):
        return features

    def predict(self, features):
        return type("Batch", (), {"pred_score": (features[0] - self.mean).abs()})


def test_labels_are_those_of_what_was_held_out():
    normal = (torch.cat([torch.tensor([3.0, -1.0]), torch.tensor([-1.0, 1.0])]),)
    test = (torch.tensor([0.5, 2.0, 3.5, 9.0]),)
    row = decide(Mean(), normal, test, torch.tensor([False, False, False, True]), held=2)
    assert row == pytest.approx({"held out": 2, "level": 1 / 3, "AUROC": 1.0, "false alarms": 1 / 3, "found": 1.0})
