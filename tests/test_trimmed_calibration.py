# SPDX-License-Identifier: Apache-2.0
"""What is promised where some of the calibration images are anomalies, and warnings that name them."""

import logging
from fractions import Fraction

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import data, engine, pixel_flow

from anomalib_flowood import conformal, exported, load
from anomalib_flowood.conformal import trimmed, trimmed_bound, trimmed_number
from anomalib_flowood.models.components import ConformalPostProcessor

SCORES = st.integers(-30, 30).map(float)  # few, so that many tie


@settings(deadline=None, max_examples=300)
@given(
    exchangeable=st.lists(SCORES, min_size=2, max_size=40),
    contaminated=st.lists(st.one_of(SCORES, st.sampled_from([-1e9, 1e9])), max_size=12),
    spare=st.integers(0, 3),
    alpha=st.sampled_from([0.05, 0.1, 0.25, 0.4]),
)
def test_the_bounds_hold_whatever_the_contaminated_scores_are(exchangeable, contaminated, spare, alpha):
    """Over all places of the fresh image among the exchangeable ones, which is what probability means here."""
    images = len(exchangeable) - 1 + len(contaminated)
    dropped = len(contaminated) + spare
    contamination = dropped / images
    if contamination >= 0.5 or trimmed_number(images, contamination) != dropped:
        return  # no share that can be asked for, or a float below it
    rank = conformal.nearest_rank(images - dropped, alpha)
    flagged, p_values = 0, []
    for place, fresh in enumerate(exchangeable):
        clean = torch.tensor(exchangeable[:place] + exchangeable[place + 1 :], dtype=torch.float64).sort().values
        calibration = torch.cat([clean, torch.tensor(contaminated, dtype=torch.float64)]).sort().values
        kept = trimmed(calibration, contamination)
        assert len(kept) == images - dropped
        threshold = kept[len(kept) - rank]
        flagged += int(fresh > threshold)
        p_values.append(float(conformal.p_values(kept, torch.tensor([fresh], dtype=torch.float64))))
        if rank <= len(clean):  # nobody makes it blind
            assert threshold <= clean[len(clean) - rank]
    share = Fraction(flagged, len(exchangeable))
    assert share <= Fraction(rank + dropped, len(exchangeable))
    assert share <= trimmed_bound(images, contamination, rank) + 1e-12
    for j in range(1, images - dropped + 2):
        level = j / (images - dropped + 1)
        assert sum(p <= level + 1e-12 for p in p_values) <= j + dropped


def test_the_bound_is_reached_and_far_anomalies_cost_nothing():
    clean, images, share = torch.arange(381).double(), 400, 0.05
    rank = conformal.threshold_rank(380, 0.05)
    rates = {}
    for where, contaminated in {"low": -1e9, "far": 1e9}.items():
        flagged = 0
        for place in range(381):
            others = torch.cat([clean[:place], clean[place + 1 :], torch.full((20,), contaminated).double()])
            kept = trimmed(others.sort().values, share)
            flagged += int(clean[place] > kept[len(kept) - rank])
        rates[where] = flagged
    assert rates == {"low": rank + 20, "far": rank}
    assert trimmed_bound(images, share, rank) == pytest.approx((rank + 20) / 381)
    assert rank / 381 < 0.05


@pytest.mark.parametrize("contamination", [-0.1, 0.5, float("nan")])
def test_shares_that_leave_nothing_are_refused(contamination):
    with pytest.raises(ValueError, match="contamination must be at least 0 and below 0.5, got"):
        ConformalPostProcessor(contamination=contamination)


def test_a_trimmed_calibration_finds_what_far_anomalies_hide(caplog):
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(np.concatenate([rng.normal(size=380), 12 + rng.normal(size=20)])).float()
    fresh = torch.tensor([0.0, 6.0])
    for contamination, found in ((None, [False, False]), (0.05, [False, True])):
        caplog.clear()
        caplog.set_level(logging.INFO)
        post_processor = ConformalPostProcessor(contamination=contamination)
        for _ in range(2):
            post_processor.calibrate(scores, scores)
        predictions = post_processor(InferenceBatch(pred_score=fresh, anomaly_map=fresh[:, None, None, None]))
        assert predictions.pred_label.tolist() == found
        assert predictions.pred_mask.flatten().tolist() == found
        assert (post_processor.p_values(fresh) <= post_processor.level).tolist() == found
        (said,) = [record.getMessage() for record in caplog.records]
        if contamination is None:
            assert "--model.post_processor.contamination 0.05 (ConformalPostProcessor)" in said
        else:
            assert said.startswith("The highest 20 of 400 calibration scores are left out of account")
            assert "at most 10.2 % of normal images" in said
            assert said.endswith("4.99 % if these are.")
    assert len(post_processor.calibration) == 400  # another share needs no other validation
    assert len(post_processor.kept) == 380


def test_a_checkpoint_keeps_the_share_unless_another_is_chosen():
    stored = {"alpha": 0.05, "contamination": 0.1}
    for given_share, share in ((None, 0.1), (0.0, 0.0), (0.2, 0.2)):
        post_processor = ConformalPostProcessor(contamination=given_share)
        post_processor.load_checkpoint_config(stored)
        assert post_processor.contamination == share
    post_processor = ConformalPostProcessor()
    post_processor.load_checkpoint_config({"alpha": 0.05})  # of an earlier version
    assert post_processor.contamination == 0


def test_the_warning_names_the_files(caplog):
    post_processor = ConformalPostProcessor()
    scores = torch.from_numpy(np.concatenate([np.random.default_rng(0).normal(size=190), 20 + np.arange(12)])).float()
    names = [f"parts/{number}.png" for number in range(202)]
    post_processor.on_validation_start(None, None)
    for rows in torch.arange(202).split(50):
        batch = ImageBatch(
            image=torch.zeros(len(rows), 3, 2, 2),
            pred_score=scores[rows],
            gt_label=torch.zeros(len(rows), dtype=torch.bool),
            image_path=[names[row] for row in rows],
        )
        post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(type("Trainer", (), {"sanity_checking": False, "fast_dev_run": 0}), None)
    (said,) = [record.getMessage() for record in caplog.records]
    named = ", ".join(f"parts/{number}.png" for number in range(201, 191, -1))
    assert "12 of 202 normal validation images score far above the others (p = " in said
    assert f": {named} and 2 more. Are there anomalies among them?" in said
    assert "Look at them and take out" in said


def test_an_export_and_a_checkpoint_decide_as_the_detector_does(tmp_path, monkeypatch):
    detector = pixel_flow(max_epochs=1, post_processor=ConformalPostProcessor(contamination=0.1))
    run = engine(tmp_path)
    run.fit(detector, datamodule=data(tmp_path))
    post_processor = detector.post_processor
    images = len(post_processor.calibration)
    assert len(post_processor.kept) == images - images // 10 < images
    again = type(detector).load_from_checkpoint(run.trainer.checkpoint_callback.best_model_path)
    assert again.post_processor.contamination == 0.1
    assert again.post_processor.image_threshold == post_processor.image_threshold
    path = again.to_torch(tmp_path / "export")
    scores = torch.linspace(float(post_processor.calibration[0]) - 1, float(post_processor.calibration[-1]) + 1, 50)
    assert np.array_equal(exported.p_values(path, scores), post_processor.p_values(scores))
    drift = post_processor.drift_p_value(scores)  # with all of them: without the highest ones normal images drift
    assert drift != conformal.drift_p_value(post_processor.kept, scores)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    loaded = [load(run.trainer.checkpoint_callback.best_model_path), load(path)]
    assert {exported.drift_p_value(path, scores), *(one.drift_p_value(scores.numpy()) for one in loaded)} == {drift}
