# SPDX-License-Identifier: Apache-2.0
"""Large images in tiles: cut and stitched, trained on and calibrated."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data.utils.tiler import Tiler
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import BACKBONE, engine
from PIL import Image

import anomalib_flowood
from anomalib_flowood import FeatureMapFlow, OneClass
from anomalib_flowood.features import run_backbone
from anomalib_flowood.models.components.squash import squash, squash_values
from anomalib_flowood.models.feature_map_flow import tiles as tiles_module
from anomalib_flowood.models.feature_map_flow.tiles import Tiles

SIZE, TILE, STRIDE = (96, 120), (48, 48), (24, 36)
SMALL = {"backbone": BACKBONE, "pre_trained": False, "map_layers": (1, 2), "score_layers": (2,), "subspace_dim": 4}
SMALL |= {"layout_dims": 8, "bank_size": 100, "visualizer": False, "evaluator": False}


@st.composite
def grids(draw):
    size = [draw(st.integers(1, 40)) for _ in range(2)]
    tile = [draw(st.integers(1, length)) for length in size]
    stride = [draw(st.integers(1, length)) for length in tile]
    return Tiles(*(tuple(pair) for pair in (size, tile, stride)))


@given(grids(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_what_is_cut_and_stitched_is_the_image(tiles, seed):
    image = torch.rand(3, *tiles.image_size, generator=torch.Generator().manual_seed(seed))
    parts = list(tiles.cut(image))
    assert sum(map(len, parts)) == len(tiles)
    assert all(len(part) <= tiles_module.AT_ONCE for part in parts)
    torch.testing.assert_close(tiles.stitch(parts), image)


@given(grids(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_where_tiles_overlap_their_values_are_averaged(tiles, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(tiles), 1, *tiles.size, generator=generator, dtype=torch.float64)
    total, times = (torch.zeros(1, *tiles.image_size, dtype=torch.float64) for _ in range(2))
    places = [(row, left) for row in tiles.rows for left in tiles.columns]
    for value, (row, left) in zip(values, places, strict=True):
        total[:, row : row + tiles.size[0], left : left + tiles.size[1]] += value
        times[:, row : row + tiles.size[0], left : left + tiles.size[1]] += 1
    assert times.min() >= 1
    assert all(
        b - a <= step
        for starts, step in ((tiles.rows, tiles.stride[0]), (tiles.columns, tiles.stride[1]))
        for a, b in pairwise(starts)
    )
    torch.testing.assert_close(tiles.stitch(iter(values.split(8))), total / times)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_where_they_fit_tiles_are_those_of_anomalib(down, right, step, more_down, more_right):
    stride = (4 * step, 3 * step)
    size = (stride[0] * more_down, stride[1] * more_right)
    whole = (size[0] + (down - 1) * stride[0], size[1] + (right - 1) * stride[1])
    image = torch.rand(1, 2, *whole)
    theirs = Tiler(tile_size=size, stride=stride)
    ours = Tiles(whole, size, stride)
    assert ours == theirs
    cut = torch.cat(list(ours.cut(image[0])))
    assert torch.equal(cut, theirs.tile(image))
    torch.testing.assert_close(ours.stitch([cut])[None], theirs.untile(cut))


def test_tiles_that_make_no_sense_are_refused():
    with pytest.raises(
        ValueError, match=r"tile_size \(50, 8\) must be positive and not larger than image_size \(40, 40\)"
    ):
        FeatureMapFlow(**SMALL, image_size=(40, 40), tile_size=(50, 8))
    with pytest.raises(ValueError, match="it would leave gaps"):
        FeatureMapFlow(**SMALL, image_size=SIZE, tile_size=TILE, tile_stride=(48, 49))
    with pytest.raises(ValueError, match="tile_stride .* needs a tile_size"):
        FeatureMapFlow(**SMALL, image_size=SIZE, tile_stride=(8, 8))


def test_anomalibs_callback_may_name_the_tiles_and_no_others():
    detector = FeatureMapFlow(**SMALL, image_size=SIZE, tile_size=TILE, tile_stride=STRIDE)
    TilerConfigurationCallback(enable=True, tile_size=TILE, stride=STRIDE).setup(None, detector)
    assert isinstance(detector.model.tiler, Tiles)
    for wrong in ({"tile_size": TILE, "stride": TILE}, {"tile_size": TILE, "stride": STRIDE, "remove_border_count": 1}):
        with pytest.raises(ValueError, match="tile_size and tile_stride"):
            TilerConfigurationCallback(enable=True, **wrong).setup(None, detector)
    with pytest.raises(ValueError, match="tile_size and tile_stride"):
        TilerConfigurationCallback(enable=True, tile_size=48, stride=48).setup(
            None, FeatureMapFlow(**SMALL, image_size=(48, 48))
        )


# -- a detector ---------------------------------------------------------------------------------------------------


def write(folder, count, seed, defect=False):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        ramp = np.linspace(60, 120, SIZE[1])[None, :, None] + rng.normal(0, 6, (*SIZE, 3))
        if defect:
            ramp[60:78, 20:38] = 250
        Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    write(folder / "train" / "good", 60, 0)
    write(folder / "test" / "good", 12, 1)
    write(folder / "test" / "scratch", 6, 2, defect=True)
    return folder


def fitted(parts, folder, **kwargs):
    torch.manual_seed(0)
    detector = FeatureMapFlow(
        **{**SMALL, "max_epochs": 1, **kwargs}, image_size=SIZE, tile_size=TILE, tile_stride=STRIDE
    )
    run = engine(folder)
    data = OneClass(parts, val_split_ratio=0.4, train_batch_size=4, eval_batch_size=4)
    run.fit(detector, datamodule=data)
    return detector.eval(), run


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    return fitted(parts, tmp_path_factory.mktemp("run"))


def test_images_are_scored_by_their_tiles(trained, parts):
    detector, _ = trained
    model = detector.model
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        found = model(images)
        for image, score, shown in zip(images, found.pred_score, found.anomaly_map, strict=True):
            tiles = torch.cat(list(model.tiles.cut(image)))
            judged = [model._judge_maps(run_backbone(model.backbone, model.normalise(tile[None]))) for tile in tiles]
            assert torch.allclose(score, torch.cat([tile.pred_score for tile in judged]).max())
            stitched = model.tiles.stitch(tile.anomaly_map for tile in judged)
            torch.testing.assert_close(shown, stitched, rtol=1e-4, atol=1e-4)
        again = model.predict(model.inputs(images))
        torch.testing.assert_close(again.pred_score, found.pred_score, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(again.anomaly_map, found.anomaly_map, rtol=1e-3, atol=1e-3)
        assert model.log_prob(images).shape == (2,)


def test_p_values_are_of_images(trained, parts):
    """The calibration holds one score for each validation image, and defects are found, and where they are."""
    detector, run = trained
    assert len(detector.post_processor.calibration) == 24
    found = {
        kind: anomalib_flowood.load(run.trainer.checkpoint_callback.best_model_path).score(parts / "test" / kind)
        for kind in ("good", "scratch")
    }
    assert found["scratch"].label.all()
    assert found["good"].label.mean() <= 0.35
    assert found["scratch"].anomaly_map.shape == (6, *SIZE)
    for shown in found["scratch"].anomaly_map:
        row, column = np.unravel_index(shown.argmax(), shown.shape)
        assert 52 <= row < 86
        assert 12 <= column < 46
    batches = run.predict(detector, data_path=parts / "test" / "good")
    assert len(batches[0].image) == 1  # whatever is read
    np.testing.assert_allclose(torch.cat([batch.pred_score for batch in batches]), found["good"].score, rtol=1e-4)


def test_a_fit_looks_at_so_many_tiles_and_repeats_itself(trained, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib_flowood.models.feature_map_flow.lightning_model._FITTED_TILES", 100)
    seen = []
    keep = FeatureMapFlow.fit_features
    monkeypatch.setattr(
        FeatureMapFlow,
        "fit_features",
        lambda self, maps, copies: (seen.append(maps[0].shape[:2]), keep(self, maps, copies)),
    )
    first, _ = fitted(parts, tmp_path / "first", coupling_layers=2, hidden_channels=8)
    second, _ = fitted(parts, tmp_path / "second", coupling_layers=2, hidden_channels=8)
    assert seen == [(36, 3)] * 2  # of the 12 tiles of 36 images
    images = torch.rand(1, 3, *SIZE)
    assert torch.equal(first.model(images).pred_score, second.model(images).pred_score)


def test_a_checkpoint_of_large_images_keeps_few_of_them_and_a_graph_is_refused(trained, tmp_path, monkeypatch):
    detector, _ = trained
    assert detector.check_images.shape[1:] == (3, *SIZE)
    with pytest.raises(ValueError, match="a graph would hold all tiles at once"):
        detector.to_onnx(tmp_path)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = detector.to_torch(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    want = detector.post_processor(detector.model(torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]))
    np.testing.assert_allclose(anomalib_flowood.load(path).score(image).score, want.pred_score.detach(), rtol=1e-4)


@pytest.mark.parametrize("axes", [(1, 1), (1,)])
def test_a_large_map_is_decided_on_row_by_row_in_its_own_memory(axes, monkeypatch):
    """Also without an axis of channels, as in anomalib's batches."""
    monkeypatch.setattr("anomalib_flowood.models.components.squash._LARGE", 2**14)
    monkeypatch.setattr("anomalib_flowood.models.components.squash._AT_ONCE", 2**10)
    raw, threshold, unit = torch.randn(*axes, 132, 130), torch.tensor(0.3), torch.tensor(2.0)
    want = squash_values(raw, threshold, unit)
    squashed, above = squash(raw, threshold, unit)
    assert squashed.data_ptr() == raw.data_ptr()
    assert torch.equal(squashed, want[0])
    assert torch.equal(above, want[1])
