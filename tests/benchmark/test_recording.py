# SPDX-License-Identifier: Apache-2.0
"""What is kept of a test."""

from types import SimpleNamespace

import pytest
import torch

from anomalib_flowood.benchmark import ScoreRecorder


def test_a_map_alone_is_scored_by_its_maximum() -> None:
    recorder = ScoreRecorder()
    recorder.on_test_start(None, None)  # type: ignore[arg-type]
    batch = SimpleNamespace(gt_label=torch.tensor([False, True]), image_path=["x/a.png", "b.png"])
    maps = torch.zeros(2, 1, 3, 3)
    maps[1, 0, 1, 2] = 5
    outputs = SimpleNamespace(pred_score=None, anomaly_map=maps)
    recorder.on_test_batch_end(None, None, outputs, batch, 0)  # type: ignore[arg-type]
    assert not recorder.sourced
    assert recorder.scores["score"].tolist() == [0, 5]
    assert recorder.scores["source"].tolist() == ["x", "test"]
    batch.source = ["mnist", "kmnist"]
    recorder.on_test_batch_end(None, None, outputs, batch, 1)  # type: ignore[arg-type]
    assert recorder.sourced
    assert recorder.scores["source"].tolist() == ["x", "test", "mnist", "kmnist"]
    batch.gt_label = None
    with pytest.raises(ValueError, match="no labels"):
        recorder.on_test_batch_end(None, None, outputs, batch, 2)  # type: ignore[arg-type]
