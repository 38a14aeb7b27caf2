# SPDX-License-Identifier: Apache-2.0
from itertools import product

import pytest
import torch
from model_helpers import BACKBONE

from anomalib_flowood import FeatureMapFlow
from benchmarks.contest import detectors


def test_ablation_changes_one_thing_at_a_time():
    variants = detectors.one_change()
    assert next(iter(variants)) == "defaults"
    assert {"mask=checkerboard", "subnet=mlp", "bottleneck_dim=8", "layers=blocks.4+blocks.6"} <= set(variants)
    assert "mask=checkerboard, subnet=resnet" not in detectors.one_change()


def test_ablation_has_every_mask_with_every_network_on_every_layer():
    cells = list(product(detectors.PRODUCT_MASKS, detectors.PRODUCT_NETWORKS, detectors.PRODUCT_LAYERS))
    names = [detectors.product_variant(*cell).name for cell in cells]
    assert len(set(names)) == len(cells) == 40
    assert set(names) <= set(detectors.ablation())
    assert "mask=checkerboard, subnet=resnet" in names
    assert "defaults" in names
    assert "mask=checkerboard, subnet=resnet, layers=blocks.6" in names
    changed = detectors.ablation()["mask=horizontal, bottleneck_dim=8, layers=blocks.6"].build.keywords
    assert changed == {"mask": "horizontal", "bottleneck_dim": 8, "layers": ("blocks.6",)}


def test_full_precision_changes_the_stored_features_alone():
    small = {"subspace_dim": 4, "layout_dims": 4, "bottleneck_dim": 3, "hidden_channels": 8}
    usual = FeatureMapFlow(BACKBONE, (1, 2), False, (32, 32), **small)
    full = detectors.FullPrecision(BACKBONE, (1, 2), False, (32, 32), **small)
    full.load_state_dict(usual.state_dict())
    images = torch.rand(9, 3, 32, 32)
    with torch.no_grad():
        for model, dtype in ((usual, torch.float16), (full, torch.float32)):
            features = model.extract(images)
            model.fit_features(features)
            kept = (*features, *model.prepare_features(features))
            assert {part.dtype for part in kept if part.ndim == 4} == {dtype}  # the rest of a density is one number
        assert full.model.log_prob(images) == pytest.approx(usual.model.log_prob(images), rel=0.02)


def test_held_out_losses_leave_no_trace(monkeypatch):
    create = detectors.timm.create_model
    monkeypatch.setattr(
        detectors.timm, "create_model", lambda *args, **kw: create(*args, **{**kw, "pretrained": False})
    )
    images = torch.randn(3, 3, 64, 64)
    for name in ("Fastflow", "Patchflow", "Cflow"):
        detector = detectors.DETECTORS[name]
        model = detector.build(BACKBONE, 64, "industrial").train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            loss = detector.held_out_loss(model, images)
            assert torch.equal(loss, detector.held_out_loss(model, images))
        assert torch.isfinite(loss)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert model.model.training


def test_quick_coreset_is_the_coreset():
    embedding = torch.randn(400, 30)
    chosen = []
    for update in (detectors.KCenterGreedy.update_distances, detectors._distances_by_product):
        torch.manual_seed(0)
        sampler = detectors.KCenterGreedy(embedding=embedding, sampling_ratio=0.1)
        sampler.model.random_state = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(detectors.KCenterGreedy, "update_distances", update)
            chosen.append(sampler.select_coreset_idxs())
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 40
