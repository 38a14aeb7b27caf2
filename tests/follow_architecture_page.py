# SPDX-License-Identifier: Apache-2.0
"""What test_architecture_page.py runs in another process, where the package of docs/architecture.md is imported."""

import numpy as np
import pytest
import torch
from anomalib.models import get_model, list_models
from model_helpers import BACKBONE, data, engine, feature_map_flow
from more.bases import Laplace
from more.colour_flow import ColourFlow
from more.small_flow import SmallFlow
from scipy import stats

from anomalib_flowood import CrossDataset, OneClass, PixelFlow, flows, open_checkpoint
from anomalib_flowood.benchmark import find_class

SMALL = {"image_size": (6, 6), "channels": 1, "coupling_layers": 2, "hidden_channels": 4, "bottleneck_dim": 2}


@pytest.mark.parametrize("added", [{"mask": "vertical"}, {"subnet": "separable"}])
def test_a_mask_and_a_network_in_flows_on_pixels_and_on_maps(added):
    detector = PixelFlow(**SMALL, **added)
    images = torch.rand(3, 3, 6, 6)
    assert detector.model.log_prob(images).shape == (3,)
    detector.model.log_prob(images).sum().backward()
    assert feature_map_flow(**{"mask": "cycle", **added}).model.log_prob(torch.rand(2, 3, 48, 48)).shape == (2,)


def test_a_base_of_a_density():
    flow = flows.vector_flow(3, coupling_layers=2, hidden_channels=4)
    x = torch.randn(5, 3)
    density = flows.density(flow, Laplace(), x)  # a fresh flow is the identity
    expected = torch.from_numpy(stats.laplace.logpdf(x.numpy()).sum(1)).float()
    torch.testing.assert_close(density.log_prob, expected)
    torch.testing.assert_close(density.radius, x.abs().sum(1))


def test_a_detector_with_a_score_through_anomalibs_engine_and_a_checkpoint(tmp_path):
    assert "colour_flow" in list_models()
    assert find_class("model", "colour_flow") is ColourFlow
    detector = get_model("colour_flow", coupling_layers=2, score="surprise", max_epochs=10, learning_rate=0.05)
    assert type(detector) is ColourFlow
    runner = engine(tmp_path)
    runner.fit(detector, datamodule=data(tmp_path))
    (tested,) = runner.test(detector, datamodule=data(tmp_path), verbose=False)
    assert tested["image_AUROC"] > 0.8  # the outside images are brighter

    opened = open_checkpoint(runner.trainer.checkpoint_callback.best_model_path)
    assert type(opened) is ColourFlow
    assert opened.model.scorer.name == "surprise"
    assert opened.model.scorer.std > 0
    images = torch.rand(4, 3, 12, 12)
    with torch.no_grad():
        expected, got = (model.eval()(images).pred_score for model in (detector.cpu().model, opened.model))
    assert torch.equal(got, expected)
    assert got.isfinite().all()


def test_a_variant_of_a_detector(tmp_path, caplog):
    detector = SmallFlow(backbone=BACKBONE, pre_trained=False, subspace_dim=8, rotations=False)
    runner = engine(tmp_path)
    runner.fit(detector, datamodule=data(tmp_path))
    opened = open_checkpoint(runner.trainer.checkpoint_callback.best_model_path)
    assert type(opened) is SmallFlow
    assert opened.input_size == (128, 128)
    assert opened.post_processor.alpha == 0.1
    assert opened.post_processor.calibrated
    assert opened.hparams == detector.hparams
    assert "left out" not in caplog.text


def test_a_data_set_by_its_name(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        pixels = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"rings-{split}.npz", pixels=pixels, labels=np.arange(count) % 2)
    data = OneClass("rings", normal_class=1, root=tmp_path, val_split_ratio=0.2)
    data.prepare_data()
    data.setup()
    assert [len(part) for part in (data.train_data, data.val_data, data.test_data)] == [8, 2, 6]
    CrossDataset("rings", ["mnist"], root=tmp_path)
    with pytest.raises(ValueError, match="'rings'"):
        OneClass("ring", normal_class=1, root=tmp_path)
