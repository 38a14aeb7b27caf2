# SPDX-License-Identifier: Apache-2.0
from itertools import product

import pytest
import torch
from model_helpers import BACKBONE

from anomalib_flowood import FeatureMapFlow
from benchmarks.contest import coreset, detectors


def test_ablation_changes_one_thing_at_a_time():
    variants = detectors.one_change()
    assert next(iter(variants)) == "defaults"
    assert {"context=none", "subnet=bottleneck", "map_layers=blocks.4+blocks.6", "score_layers=none"} <= set(variants)
    assert not any("," in name for name in variants)


def test_ablation_has_every_mask_with_every_network_on_every_layer():
    cells = list(product(detectors.PRODUCT_MASKS, detectors.PRODUCT_NETWORKS, detectors.PRODUCT_LAYERS))
    names = [detectors.product_variant(*cell).name for cell in cells]
    assert len(set(names)) == len(cells) == 30
    assert set(names) <= set(detectors.ablation())
    assert "map_layers=blocks.4, score_layers=blocks.4" in names
    assert "mask=checkerboard, map_layers=blocks.6, score_layers=blocks.6" in names
    name = "mask=horizontal, subnet=bottleneck, bottleneck_dim=8, map_layers=blocks.6, score_layers=blocks.6"
    changed = detectors.ablation()[name].build.keywords
    layers = {"map_layers": ("blocks.6",), "score_layers": ("blocks.6",)}
    assert changed == {"mask": "horizontal", "subnet": "bottleneck", "bottleneck_dim": 8, **layers}


def test_every_variant_of_the_ablation_can_be_built():
    small = {"hidden_channels": 8, "subspace_dim": 20, "pre_trained": False}
    product_variants = [
        detectors.product_variant("position", "K = 32", "blocks.4"),
        detectors.product_variant("cycle", "K = 8", "blocks.6"),
    ]
    for variant in [*detectors.one_change().values(), *product_variants]:
        changes = variant.build.keywords
        layers = {name: ("blocks.3",) for name in ("map_layers", "score_layers") if changes.get(name)}
        variant.build(BACKBONE, 64, "industrial", **small, **layers)


def test_full_precision_changes_the_stored_features_alone():
    small = {"subspace_dim": 4, "layout_dims": 4, "bottleneck_dim": 3, "hidden_channels": 8}
    usual = FeatureMapFlow(BACKBONE, (1, 2), (2,), False, (32, 32), **small)
    full = detectors.FullPrecision(BACKBONE, (1, 2), (2,), False, (32, 32), **small)
    full.load_state_dict(usual.state_dict())
    images = torch.rand(9, 3, 32, 32)
    with torch.no_grad():
        for model, dtype in ((usual, torch.float16), (full, torch.float32)):
            features = model.extract_training(images, batch=0, total=9)
            model.fit_features(features)
            kept = (*features, *model.prepare_training(features))
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
    embedding = torch.randn(400, 30) * torch.linspace(0.1, 3, 400)[:, None]
    chosen = []
    for select in (detectors.KCenterGreedy.select_coreset_idxs, coreset.select_coreset_idxs):
        torch.manual_seed(0)
        sampler = detectors.KCenterGreedy(embedding=embedding, sampling_ratio=0.2)
        sampler.model.random_state = 0
        chosen.append(select(sampler))
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 80
