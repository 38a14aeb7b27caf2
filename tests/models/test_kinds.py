# SPDX-License-Identifier: Apache-2.0
"""Kinds of normal images: found without labels, whitened each on its own, and kept in checkpoints and exports."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import BACKBONE, Case, check_exports, engine, feature_map_flow, products, products_folder

from anomalib_flowood import FeatureMapFlow, OneClass
from anomalib_flowood.models.components import kinds
from anomalib_flowood.models.components.kinds import Kinds, kinds_of, pooled
from anomalib_flowood.models.feature_map_flow import FeatureMapFlowModel

LEAST = 6


def groups(*sizes, seed=0):
    """Points around some that are far apart, and in different directions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [torch.randn(size, 4, generator=generator) + 100 * torch.eye(4)[i] for i, size in enumerate(sizes)]
    )


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(LEAST, 20), min_size=1, max_size=4), least=st.integers(2, LEAST), seed=st.integers(0, 9)
)
def test_groups_far_apart_are_never_one_kind_and_each_kind_is_large_enough(sizes, least, seed):
    found = kinds_of(groups(*sizes, seed=seed), least)
    assert np.bincount(found).min() >= least
    start = 0
    for size in sizes:
        own = found[start : start + size]
        assert not np.isin(np.delete(found, np.s_[start : start + size]), own).any()
        start += size


def test_a_group_that_is_too_small_is_no_kind():
    assert np.bincount(kinds_of(groups(20, LEAST - 1), LEAST)).tolist() == [20 + LEAST - 1]
    assert np.bincount(kinds_of(groups(20, LEAST), LEAST)).tolist() == [20, LEAST]


def test_copies_of_one_point_are_no_kind():
    """As black images are, or what was photographed over and over: nothing can be fitted to them alone."""
    points = groups(20, 20)
    copied = torch.cat([points, points[:1].expand(30, -1) + 1e-6 * groups(30, seed=1), points[20:24].repeat(3, 1)])
    assert kinds_of(copied, LEAST).tolist() == [0] * 20 + [1] * 20 + [0] * 30 + [1] * 12
    far = torch.cat([points, 100 * torch.eye(4)[2:3].expand(30, -1)])  # to no other point nearer than others to theirs
    assert np.bincount(kinds_of(far, LEAST)).tolist() in ([50, 20], [20, 50], [70])
    assert kinds_of(points[:3].repeat(20, 1), LEAST).max() == 0


def test_one_cloud_is_one_kind():
    assert kinds_of(groups(200), 20).max() == 0


def test_images_are_of_the_kind_of_the_most_similar_training_image():
    points = torch.nn.functional.normalize(groups(20, 20), dim=1)
    found = Kinds(LEAST)
    of_kinds = found.fit(40, points)
    assert [of_kind.tolist() for of_kind in of_kinds] == [list(range(20)), list(range(20, 40))]
    new = torch.nn.functional.normalize(groups(5, 5, seed=3), dim=1)
    assert found(new).tolist() == [0] * 5 + [1] * 5
    other = Kinds(LEAST)
    other.load_state_dict(found.state_dict())
    assert other(new).tolist() == found(new).tolist()
    assert other.fit(20, points[:20])[0].tolist() == list(range(20))
    assert other(new) is None
    found.load_state_dict(other.state_dict())
    assert found(new) is None


def test_what_is_kept_is_of_the_devices_and_precision_of_the_module():
    """Not of the features, which lie in main memory."""
    found = Kinds(LEAST).to("meta")
    found.fit(40, groups(20, 20))
    assert found.points.is_meta
    assert found.of_points.is_meta
    double = Kinds(LEAST).double()
    double.fit(40, groups(20, 20))
    assert double.points.dtype == torch.float64
    single = Kinds(LEAST)
    single.load_state_dict(double.state_dict())
    assert (single.points.dtype, single.of_points.dtype) == (torch.float32, torch.int64)
    meta = Kinds(LEAST).to("meta")
    meta.load_state_dict(double.state_dict())
    assert meta.points.is_meta


def test_of_many_images_some_are_looked_at_and_fewer_fitted_to(monkeypatch):
    monkeypatch.setattr(kinds, "_LOOKED_AT", 60)
    monkeypatch.setattr(kinds, "_FITTED", 20)
    found = Kinds(LEAST)
    of_kinds = found.fit(200, groups(100, 100))
    assert [len(of_kind) for of_kind in of_kinds] == [20, 20]
    assert of_kinds[0].max() < 100 <= of_kinds[1].min()
    assert len(found.points) == 40


@pytest.mark.parametrize("least", [-1, 1, 2])
def test_a_kind_of_so_few_images_that_none_is_fitted_to_without_one_is_refused(least):
    with pytest.raises(ValueError, match="kind_images must be at least 3, or 0 for one kind"):
        Kinds(least)


def model(**kwargs):
    torch.manual_seed(0)
    small = {"map_layers": (1, 2), "score_layers": (2,), "image_size": (48, 48), "pre_trained": False}
    small |= {"subspace_dim": 4, "layout_dims": 6, "kind_images": 10}
    return FeatureMapFlowModel(BACKBONE, **{**small, **kwargs}).double().eval()


@torch.no_grad()
def test_each_kind_is_judged_as_by_a_fit_to_it_alone():
    detector, images, new = model(), products(20), products(4, seed=1)
    maps = detector.extract(images)
    detector.fit_features(maps)
    inputs, judged = detector.prepare(maps), detector.inputs(new)
    assert detector.fit_whitening(inputs) == [20, 20]
    mixed = torch.arange(8).view(2, 4).T.flatten()
    found = detector.predict(tuple(part[mixed] for part in judged))
    fast = detector(new[mixed])
    views = detector.layer_views(new[mixed])
    log_prob = detector.log_prob(new[mixed])
    torch.testing.assert_close(found.pred_score, fast.pred_score, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.anomaly_map, fast.anomaly_map, rtol=1e-8, atol=1e-8)
    shares = torch.stack([share for view in views for share in view.shares.values()])
    torch.testing.assert_close(shares.sum(0), found.pred_score, rtol=1e-8, atol=1e-8)
    for number in range(2):
        assert detector.fit_whitening(tuple(part[20 * number : 20 * number + 20] for part in inputs)) == [20]
        rows = torch.arange(4 * number, 4 * number + 4)
        alone = detector.predict(tuple(part[rows] for part in judged))
        here = torch.arange(number, 8, 2)
        torch.testing.assert_close(found.pred_score[here], alone.pred_score, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.anomaly_map[here], alone.anomaly_map, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(log_prob[here], detector.log_prob(new[rows]), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_a_fit_tells_how_many_layers_of_all_kinds_are_fitted():
    detector, told = model(), []
    maps = detector.extract(products(20))
    detector.fit_features(maps)
    detector.fit_whitening(detector.prepare(maps), progress=lambda **done: told.append(done))
    assert told == [{"completed": number, "total": 4} for number in (1, 2, 3, 4)]  # two kinds, two layers


@torch.no_grad()
def test_copies_of_an_image_are_of_its_kind():
    """Otherwise the nearest of each would be its own copies, and every image a kind."""
    detector, images = model(), products(12)
    maps = detector.extract(images.repeat_interleave(4, 0) + 0.01 * torch.rand(96, 3, 48, 48, dtype=torch.float64))
    detector.fit_features(maps)
    assert detector.fit_whitening(detector.prepare(maps), copies=4) == [12, 12]
    assert len(detector.kinds.points) == 24
    assert detector.layers[0].positions.mean.shape[0] == 2


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"kind_images": 0}, {"tile_size": (24, 24)}], ids=str)
def test_there_is_one_kind_where_none_are_wanted(settings):
    detector, images = model(**settings), products(20)
    if "tile_size" in settings:
        images = images.float().double()
    maps = detector.extract(images)
    detector.fit_features(maps)
    assert detector.fit_whitening(detector.prepare(maps)) == [40]
    assert detector.kinds.points is None
    assert detector.layers[0].positions.mean.ndim == 2
    assert torch.isfinite(detector(images[:2]).pred_score).all()


def test_points_do_not_depend_on_where_things_are():
    maps = torch.rand(3, 4, 5, 6)
    moved = maps.roll((2, 3), (2, 3))
    points = pooled([maps, 10 * maps[:, :2]], like=torch.zeros(1, dtype=torch.float64))
    assert points.dtype == torch.float64
    torch.testing.assert_close(points, pooled([moved, 10 * moved[:, :2]], like=points))
    torch.testing.assert_close(points.square().sum(1), torch.full((3,), 2.0, dtype=torch.float64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return products_folder(tmp_path_factory.mktemp("products"))


def detector(**kwargs) -> FeatureMapFlow:
    return feature_map_flow(**{"kind_images": 10, "coupling_layers": 0, **kwargs})


def parts(folder):
    return OneClass(folder, "good", val_split_ratio=0.3)


@pytest.fixture(scope="module")
def case(folder, tmp_path_factory):
    """A detector of both products, its checkpoint and its exports."""
    torch.manual_seed(0)
    return Case(tmp_path_factory.mktemp("case"), detector(), parts(folder))


def test_a_fit_says_how_many_kinds_it_found(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    engine(tmp_path).fit(detector(), datamodule=parts(folder))
    assert "The training images are of 2 kinds that have nothing to do with each other" in caplog.text
    caplog.clear()
    engine(tmp_path).fit(detector(kind_images=0), datamodule=parts(folder))
    assert "kinds" not in caplog.text


def test_a_checkpoint_keeps_them(case):
    assert len(case.detector.model.evidence.location) == 2
    images = products(3, seed=4).float()
    with torch.no_grad():
        expected = case.detector.model(images)
        found = FeatureMapFlow.load_from_checkpoint(case.checkpoint).eval().model(images)
    torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=0, atol=0)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=0, atol=0)


def test_exports_judge_a_batch_of_several_kinds(case):
    check_exports(case, products(3, seed=4).float()[[0, 3, 1, 4, 5]].numpy())


@pytest.mark.parametrize(("layers", "epochs"), [(0, 3), (2, 4)])
def test_a_resumed_fit_finds_the_same(folder, tmp_path, layers, epochs):
    """Also where epochs come in between whose whitening is none, and which are validated."""

    def trained(epochs, **kwargs):
        torch.manual_seed(0)
        run, fitted = engine(tmp_path, max_epochs=epochs), detector(coupling_layers=layers)
        run.fit(fitted, datamodule=parts(folder), **kwargs)
        return run, fitted

    run, whole = trained(2)
    _, again = trained(epochs, ckpt_path=run.trainer.checkpoint_callback.best_model_path)
    assert torch.equal(whole.model.kinds.points, again.model.kinds.points)
    assert len(again.model.evidence.location) == 2
