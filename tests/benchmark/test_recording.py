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


def test_maps_and_masks_are_kept_of_the_images_that_a_report_shows() -> None:
    recorder = ScoreRecorder()
    recorder.on_test_start(None, None)  # type: ignore[arg-type]
    paths = [f"{number}.png" for number in range(20)]
    masks = torch.zeros(20, 8, 8)
    masks[10:, 2:4, 2:4] = 1
    labels = torch.arange(20) >= 10
    batch = SimpleNamespace(gt_label=labels, image_path=paths, source=["part"] * 20, gt_mask=masks)
    maps = torch.arange(20.0)[:, None, None, None].expand(-1, 1, 8, 8)
    outputs = SimpleNamespace(pred_score=torch.arange(20.0), anomaly_map=maps)
    recorder.on_test_batch_end(None, None, outputs, batch, 0)  # type: ignore[arg-type]
    detector = SimpleNamespace(post_processor=SimpleNamespace(image_threshold=torch.tensor(9.0), alpha=0.05))
    recorder.on_test_epoch_end(None, detector)  # type: ignore[arg-type]
    assert recorder.decision == {"threshold": 9.0, "alpha": 0.05}
    shown = {9, 8, 7, 6, 5, 4, 3, 2} | set(range(10, 18))
    assert set(recorder.shown_maps) == {f"{number}.png" for number in shown}
    for path, (values, mask, _) in recorder.shown_maps.items():
        number = int(path.partition(".")[0])
        assert (values == number).all()
        assert (mask is None) == (number < 10)
