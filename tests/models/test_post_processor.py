# SPDX-License-Identifier: Apache-2.0
"""The conformal post-processor by itself and in anomalib's engine."""

import copy
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from model_helpers import data, embedding_flow, engine, feature_map_flow, pixel_flow
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, Dataset

from anomalib_flowood import conformal, load, open_checkpoint
from anomalib_flowood.cli import main
from anomalib_flowood.models.components import ConformalPostProcessor

NAN, INF = float("nan"), float("inf")
finite = st.floats(-(2.0**100), 2.0**100, width=32)


def calibrated(
    images: int = 200, alpha: float | None = None, mean: float = 3.0, std: float = 0.3
) -> ConformalPostProcessor:
    post_processor = ConformalPostProcessor(alpha)
    post_processor.calibrate(mean + std * torch.randn(images, generator=torch.Generator().manual_seed(0)))
    return post_processor


def decide(post_processor, scores):
    out = post_processor(InferenceBatch(pred_score=scores))
    return out.pred_score, out.pred_label


# -- decisions ---------------------------------------------------------------------------------------------------------


@given(st.lists(finite, min_size=20, max_size=60), st.lists(finite, max_size=9), st.sampled_from([0.05, 0.37, 0.9]))
def test_label_p_value_and_score_say_the_same_of_every_image(calibration, others, alpha):
    post_processor = ConformalPostProcessor(alpha)
    post_processor.calibrate(torch.tensor(calibration))
    known = torch.tensor(calibration)
    neighbours = [known.nextafter(torch.tensor(INF)), known.nextafter(torch.tensor(-INF))]
    scores = torch.cat([known, *neighbours, torch.tensor([*others, INF, -INF])])
    pred_score, pred_label = decide(post_processor, scores)
    assert torch.equal(pred_label, post_processor.p_values(scores) < alpha)
    assert torch.equal(pred_label, pred_score > 0.5)
    assert ((pred_score >= 0) & (pred_score <= 1)).all()
    assert (pred_score[scores.argsort()].diff() >= 0).all()
    assert decide(post_processor, post_processor.image_threshold[None])[0] == 0.5


@pytest.mark.parametrize("start", [-1e20, -1e4, -30.0, -1e-3, 1.0, 2.9, 3.4, 3.6, 20.0, 1e3, 1e6, 1e20])
@pytest.mark.parametrize("std", [0.3, 1e-4, 100.0])
def test_no_order_is_reversed_from_one_float_to_the_next(start, std):
    post_processor = calibrated(std=std)
    bits = torch.tensor(start).view(torch.int32) + torch.arange(100_000, dtype=torch.int32) * (1 if start > 0 else -1)
    pred_score, _ = decide(post_processor, bits.view(torch.float32))
    assert (pred_score.diff() >= 0).all()


def test_around_the_threshold_and_below_it_floats_stay_apart():
    post_processor = calibrated()
    threshold = float(post_processor.image_threshold)
    for start in (0.8 * threshold, 0.9 * threshold, 0.9999 * threshold):
        bits = torch.tensor(start).view(torch.int32) + torch.arange(2000, dtype=torch.int32)
        pred_score, _ = decide(post_processor, bits.view(torch.float32))
        assert (pred_score.diff() > 0).all()


@pytest.mark.parametrize("std", [0.3, 1e-3, 100.0])
@pytest.mark.parametrize("units", [0.0, 0.1, 1.0, 10.0, 1e3, 1e4, 1e7])
def test_scores_far_above_the_threshold_stay_apart(units, std):
    # Float32 has 2^23 numbers between 0.5 and 1, which the mapping shares out to scores of all magnitudes.
    post_processor = calibrated(std=std, mean=0.0)
    unit, threshold = float(post_processor._image_unit), float(post_processor.image_threshold)
    step = 3e-6 * (1 + 4 * units) ** 0.25
    scores = threshold + unit * ((units + 0.25) * (1 + step) ** np.arange(2000) - 0.25)
    pred_score, _ = decide(post_processor, torch.from_numpy(scores).float())
    assert (pred_score.diff() > 0).all()


def test_auroc_is_that_of_the_raw_scores():
    rng = np.random.default_rng(0)
    post_processor = calibrated()
    normal = rng.normal(3, 0.3, 20_000).astype(np.float32)
    for others in (rng.normal(3.2, 0.5, 20_000), 3 + rng.lognormal(1, 3, 20_000), rng.normal(1e5, 10, 20_000)):
        raw = np.concatenate([normal, others.astype(np.float32)])
        labels = np.repeat([0, 1], 20_000)
        pred_score, _ = decide(post_processor, torch.from_numpy(raw))
        assert roc_auc_score(labels, pred_score) == pytest.approx(roc_auc_score(labels, raw), abs=1e-7)
    pred_score, _ = decide(post_processor, torch.from_numpy(normal))
    assert len(pred_score.unique()) == len(np.unique(normal))


def test_infinite_scores_are_the_most_and_the_least_anomalous():
    pred_score, pred_label = decide(calibrated(), torch.tensor([-INF, -1e20, 3.0, 1e20, 1e38, INF]))
    assert pred_score[0] == 0
    assert pred_score[-1] == 1
    assert (pred_score.diff()[:4] > 0).all()
    assert pred_label.tolist() == [False, False, False, True, True, True]


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        decide(calibrated(), torch.tensor([1.0, NAN, 3.0]))


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-20, 1e20])
def test_calibration_images_that_are_all_alike(value):
    post_processor = ConformalPostProcessor()
    post_processor.calibrate(torch.full((30,), value))
    known = torch.tensor(value)
    scores = torch.stack([known - known.abs() - 1, known, known.nextafter(torch.tensor(INF)), known + known.abs() + 1])
    pred_score, pred_label = decide(post_processor, scores)
    assert pred_label.tolist() == [False, False, True, True]
    assert pred_score[1] == 0.5
    assert (pred_score.diff() > 0).all()


def test_the_threshold_follows_from_alpha():
    post_processor = calibrated(images=99)
    ordered = post_processor.calibration.tolist()
    assert ordered == sorted(ordered)
    assert post_processor.image_threshold == ordered[-4]  # of 100 places, four are below p = 5 / 100
    post_processor.alpha = 0.2
    assert post_processor.image_threshold == ordered[-19]
    post_processor.alpha = 0.001
    with pytest.raises(ValueError, match="takes at least 1000 in-distribution validation images"):
        decide(post_processor, torch.ones(2))


def test_pixels_are_marked_beyond_the_maxima_of_normal_maps():
    post_processor = calibrated()
    maxima = 12 + torch.randn(200, generator=torch.Generator().manual_seed(1))
    post_processor.calibrate(post_processor.calibration, maxima)
    threshold = post_processor.pixel_threshold
    assert threshold == maxima.sort().values[-10]  # 10 of 201 places are below p = 0.05
    maps = torch.linspace(-5, 40, 96).reshape(2, 1, 6, 8)
    maps[1, 0, 0, 0] = NAN  # the flow overflowed there
    for _ in range(2):
        out = post_processor(InferenceBatch(pred_score=torch.tensor([3.0, 9.0]), anomaly_map=maps))
        above = ~(maps <= threshold)
        assert torch.equal(out.pred_mask, above)
        assert torch.equal(out.anomaly_map > 0.5, above)
        assert out.anomaly_map[1, 0, 0, 0] == 1
        assert ((out.anomaly_map >= 0) & (out.anomaly_map <= 1)).all()
        post_processor.pixel_min.fill_(-10)  # then in units of the range of normal maps
        post_processor.pixel_max.fill_(20)
    assert out.anomaly_map[0, 0, 0, 0] == pytest.approx(0.5 / (1 + float(threshold + 5) / 30))
    order = maps.flatten()[maps.flatten() > -INF].argsort()
    assert (out.anomaly_map.flatten()[maps.flatten() > -INF][order].diff() > 0).all()  # none reversed, none tied
    post_processor.alpha = 0.5  # for pixels too
    assert post_processor.pixel_threshold == maxima.sort().values[-100]


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_at_most_alpha_of_normal_images_have_any_marked_pixel(alpha):
    """Maps of one distribution, whose images differ in level and in contrast; over many calibrations."""
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(100):
        level, contrast = torch.rand(2, 260, 1, 1, 1, generator=generator)
        maps = level + contrast * torch.rand(260, 1, 6, 6, generator=generator)
        post_processor = ConformalPostProcessor(alpha)
        post_processor.calibrate(maps[:60].mean((1, 2, 3)), maps[:60].amax((1, 2, 3)))
        out = post_processor(InferenceBatch(pred_score=maps[60:].mean((1, 2, 3)), anomaly_map=maps[60:]))
        rates.append(out.pred_mask.flatten(1).any(1).float().mean())
    expected = conformal.threshold_rank(60, alpha) / 61
    assert expected <= alpha
    assert torch.stack(rates).mean() == pytest.approx(expected, abs=0.01)


def test_without_a_calibration_of_maps_no_pixel_is_marked():
    post_processor, maps = calibrated(), torch.rand(2, 1, 3, 3)
    out = post_processor(InferenceBatch(pred_score=torch.tensor([3.0, 9.0]), anomaly_map=maps))
    assert torch.isnan(post_processor.pixel_threshold)
    assert out.pred_label.tolist() == [False, True]
    assert torch.equal(out.anomaly_map, maps)
    assert out.pred_mask is None


def test_batches_keep_raw_scores_and_p_values():
    post_processor = calibrated()
    raw = torch.tensor([2.0, 3.1, 9.0, INF])
    batch = ImageBatch(image=torch.zeros(4, 3, 2, 2), pred_score=raw)
    post_processor.post_process_batch(batch)
    assert torch.equal(batch.raw_score, raw)
    assert torch.equal(batch.p_value, post_processor.p_values(raw))
    assert batch.p_value[2:].tolist() == [1 / 201] * 2
    assert torch.equal(batch.pred_label, batch.p_value < 0.05)


def test_without_a_calibration_scores_stay_raw():
    post_processor = ConformalPostProcessor()
    raw = torch.tensor([1.0, 2.0])
    predictions = InferenceBatch(pred_score=raw)
    assert post_processor(predictions) is predictions
    batch = ImageBatch(image=torch.zeros(2, 3, 2, 2), pred_score=raw)
    post_processor.post_process_batch(batch)
    assert torch.equal(batch.pred_score, raw)
    assert batch.pred_label is None
    assert torch.isnan(post_processor.image_threshold)
    with pytest.raises(ValueError, match="There are no calibration scores"):
        post_processor.p_values(raw)


# -- calibration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 1, -0.1, NAN])
def test_impossible_levels_are_refused(alpha):
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        ConformalPostProcessor(alpha)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(24), "alpha=0.04 takes at least 25 .* and there are 24"),
        (torch.zeros(0), "and there are none"),
        (torch.tensor([0.0] * 30 + [NAN]), "1 of 31 normal validation images have a NaN or infinite score or map"),
        (
            torch.tensor([INF, -INF] + [0.0] * 30),
            "2 of 32 normal validation images have a NaN or infinite score or map",
        ),
    ],
)
def test_a_refused_calibration_leaves_the_last_one(scores, message):
    post_processor = calibrated(alpha=0.04)
    before = post_processor.calibration.clone()
    with pytest.raises(ValueError, match=message):
        post_processor.calibrate(scores)
    assert torch.equal(post_processor.calibration, before)
    with pytest.raises(ValueError, match="1 of 40 normal validation images have a NaN or infinite score or map"):
        post_processor.calibrate(torch.zeros(40), torch.tensor([0.0] * 39 + [NAN]))
    assert torch.equal(post_processor.calibration, before)


def validate(post_processor, *batches, **trainer):
    trainer = SimpleNamespace(**{"sanity_checking": False, "fast_dev_run": False, "global_step": 7, **trainer})
    post_processor.on_validation_start(trainer, None)
    for batch in batches:
        post_processor.on_validation_batch_end(trainer, None, batch, None, 0)
    post_processor.on_validation_epoch_end(trainer, None)


def batch(scores, labels, anomaly_map=None):
    labels = None if labels is None else torch.as_tensor(labels)
    return SimpleNamespace(pred_score=scores, gt_label=labels, anomaly_map=anomaly_map)


def test_only_images_that_are_known_to_be_normal_calibrate():
    post_processor, normal = ConformalPostProcessor(), torch.randn(30)
    maps = torch.rand(30, 4, 4)
    validate(
        post_processor,
        batch(torch.full((10,), 50.0), [1] * 10, torch.full((10, 4, 4), 99.0)),
        batch(torch.cat([normal[:20], torch.tensor([60.0])]), [0] * 20 + [1], torch.cat([maps[:20], maps[:1] + 70])),
        batch(torch.full((5,), -50.0), None),
        batch(normal[20:], [False] * 10, maps[20:]),
    )
    assert torch.equal(post_processor.calibration, normal.sort().values)
    assert torch.equal(post_processor.pixel_calibration, maps.amax((1, 2)).sort().values)
    assert (post_processor.pixel_min, post_processor.pixel_max) == (maps.min(), maps.max())
    for without in (batch(torch.zeros(40), None), batch(torch.zeros(40), [1] * 40)):
        with pytest.raises(ValueError, match="and there are none"):
            validate(post_processor, without)


def test_the_last_validation_counts_and_trials_do_not():
    post_processor = ConformalPostProcessor()
    validate(post_processor, batch(torch.zeros(3), [0] * 3), sanity_checking=True)
    validate(post_processor, batch(torch.zeros(3), [0] * 3), fast_dev_run=True)
    assert not post_processor.calibrated
    for size in (40, 25, 60):
        scores = torch.randn(size)
        validate(post_processor, batch(scores, [0] * size))
        assert torch.equal(post_processor.calibration, scores.sort().values)


class Untrained(Callback):
    """Fails as soon as anything is extracted or trained."""

    def on_extract(self, *args):
        pytest.fail("features were extracted")

    def on_train_start(self, trainer, pl_module):
        pytest.fail("training has begun")


STRICT = 0.04
"""A level that is not the default."""


def strict():
    return ConformalPostProcessor(STRICT)


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "held-out normal image" in record.getMessage()]


@pytest.mark.parametrize("detector", [pixel_flow, embedding_flow])
def test_a_chosen_level_that_cannot_be_reached_is_refused_before_anything_is_trained(detector, tmp_path):
    message = "alpha=0.04 takes at least 25 in-distribution validation images (label 0), and there are 12."
    module = data(tmp_path, val_split_ratio=0.1)
    with pytest.raises(ValueError, match=re.escape(message)):
        engine(tmp_path, callbacks=[Untrained()]).fit(detector(post_processor=strict()), datamodule=module)
    module.setup()
    loaders = {"train_dataloaders": module.train_dataloader(), "val_dataloaders": module.val_dataloader()}
    with pytest.raises(ValueError, match=re.escape(message)):
        engine(tmp_path, callbacks=[Untrained()]).fit(detector(post_processor=strict()), **loaders)


class Warned(Callback):
    """Keeps what had been said when the training began."""

    def __init__(self, caplog):
        self.caplog = caplog
        self.said = []

    def on_train_start(self, trainer, pl_module):
        self.said = warnings_of(self.caplog)


@pytest.mark.parametrize("detector", [pixel_flow, embedding_flow])
def test_at_the_default_level_few_validation_images_do_what_they_can(detector, tmp_path, caplog):
    module, start = data(tmp_path, val_split_ratio=0.1), Warned(caplog)
    fitted = detector()
    with caplog.at_level(logging.WARNING):
        engine(tmp_path, callbacks=[start]).fit(fitted, datamodule=module)  # two epochs
    assert start.said == warnings_of(caplog) == [
        "With 12 held-out normal images the smallest p-value is 1/13 = 0.077, so that no image can be called anomalous "
        "at alpha = 0.05. Instead those are labelled that score above all 12, as do 7.7 % of normal images in "
        "expectation (0.43 to 22 % in 90 of 100 such calibrations). alpha = 0.05 takes 20 of them: give 75 more normal "
        "images to the 120 that there are (fitted to: 108), or set val_split_ratio to 0.17, which leaves 100 to fit "
        "to."
    ]  # fmt: skip
    post_processor = fitted.post_processor
    assert len(post_processor.calibration) == 12
    assert post_processor.level == 1 / 13
    assert post_processor.image_threshold == post_processor.calibration[-1]
    raw = torch.stack([post_processor.calibration[-1], post_processor.calibration[-1].nextafter(torch.tensor(INF))])
    pred_score, pred_label = decide(post_processor, raw)
    assert pred_label.tolist() == [False, True]
    assert pred_score[0] == 0.5
    assert pred_score[1] > 0.5


def test_loaders_of_another_data_module_are_not_spoken_of_in_its_words(tmp_path, caplog):
    run, module = engine(tmp_path), data(tmp_path, val_split_ratio=0.1)
    detector = pixel_flow(max_epochs=1)
    run.fit(detector, datamodule=module)
    caplog.clear()
    loader = DataLoader(module.val_data.subsample(range(7)), batch_size=7, collate_fn=module.val_data.collate_fn)
    run.trainer.fit_loop.max_epochs = 2
    run.fit(detector, train_dataloaders=module.train_dataloader(), val_dataloaders=loader)
    (said,) = warnings_of(caplog)
    assert said.endswith(
        "alpha = 0.05 takes 20 of them: hold out 13 more (val_split_ratio of the data module, of "
        "anomalib's also val_split_mode: from_train)."
    )


@given(st.lists(finite, min_size=1, max_size=40), st.lists(finite, max_size=9), st.sampled_from([0.05, 0.4, 0.7]))
def test_what_is_labelled_at_any_number_of_images(calibration, others, alpha):
    post_processor, n = ConformalPostProcessor(alpha), len(calibration)
    if alpha != 0.05 and n < conformal.images_needed(alpha):
        return
    post_processor.calibrate(torch.tensor(calibration))
    scores = torch.tensor([*calibration, *others, INF, -INF])
    pred_score, pred_label = decide(post_processor, scores)
    p_values = post_processor.p_values(scores)
    assert torch.equal(pred_label, p_values <= post_processor.level)
    assert torch.equal(pred_label, pred_score > 0.5)
    if n >= conformal.images_needed(alpha):
        assert torch.equal(pred_label, p_values < alpha)
        assert post_processor.level < alpha
    else:
        assert torch.equal(pred_label, scores > max(calibration))
    assert (pred_score[scores.argsort()].diff() >= 0).all()


def test_what_the_trainer_leaves_of_the_validation_images_counts(tmp_path):
    module = data(tmp_path, val_split_ratio=0.5)  # 60 images in batches of 16
    for limit, left in ((1, 16), (0.3, 16)):
        run = engine(tmp_path, callbacks=[Untrained()], limit_val_batches=limit)
        with pytest.raises(ValueError, match=f"and there are {left}"):
            run.fit(pixel_flow(post_processor=strict()), datamodule=module)
    detector = pixel_flow()
    engine(tmp_path, limit_val_batches=2).fit(detector, datamodule=module)
    assert len(detector.post_processor.calibration) == 32


def test_anomalous_validation_images_do_not_make_up_for_normal_ones(tmp_path):
    module = data(tmp_path, val_split_ratio=0.1)
    module.setup()
    squares = np.flatnonzero(module.test_data.samples["label_index"]).tolist()

    def loader(images):
        return DataLoader(images, batch_size=16, collate_fn=module.val_data.collate_fn)

    outside = module.test_data.subsample(squares)
    for images, detector, message in (
        (module.val_data + outside, pixel_flow(post_processor=strict()), "and there are 12"),
        (outside, pixel_flow(), r"takes at least 20 .* and there are none. Hold out 20 more"),
    ):
        with pytest.raises(ValueError, match=message):
            engine(tmp_path, callbacks=[Untrained()]).fit(
                detector, train_dataloaders=module.train_dataloader(), val_dataloaders=loader(images)
            )


class WithoutTable(Dataset):
    """Images whose labels show only when they are read."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = self.images[index]
        item.gt_label = torch.tensor(int(index >= 12))
        return item


def test_labels_that_show_late_are_found_by_the_first_validation(tmp_path, caplog):
    module = data(tmp_path, val_split_ratio=0.5)
    module.setup()
    loader = DataLoader(WithoutTable(module.val_data), batch_size=16, collate_fn=module.val_data.collate_fn)
    loaders = {"train_dataloaders": module.train_dataloader(), "val_dataloaders": loader}
    run = engine(tmp_path, max_epochs=5)
    with pytest.raises(ValueError, match="and there are 12"):
        run.fit(pixel_flow(post_processor=strict()), **loaders)
    assert run.trainer.current_epoch == 0
    detector = pixel_flow(max_epochs=3)
    with caplog.at_level(logging.WARNING):
        engine(tmp_path).fit(detector, **loaders)
    assert len(detector.post_processor.calibration) == 12
    assert len(warnings_of(caplog)) == 1


def test_a_trial_run_asks_for_nothing(tmp_path):
    detector = pixel_flow()
    engine(tmp_path, fast_dev_run=True).fit(detector, datamodule=data(tmp_path, val_split_ratio=0.1))
    assert not detector.post_processor.calibrated


@pytest.mark.parametrize(("trainer", "warned"), [({"max_steps": 5}, True), ({}, False)])
def test_training_on_after_the_last_validation_drops_the_calibration(trainer, warned, tmp_path, caplog):
    detector = pixel_flow()
    with caplog.at_level(logging.WARNING):
        engine(tmp_path, **trainer).fit(detector, datamodule=data(tmp_path))  # three steps in an epoch
    assert ("training went on after the last validation" in caplog.text) is warned
    assert detector.post_processor.calibrated is not warned


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_predictions_of_the_engine_carry_p_values(tmp_path):
    detector, module = feature_map_flow(), data(tmp_path)
    run = engine(tmp_path)
    run.fit(detector, datamodule=module)
    post_processor = detector.post_processor
    assert len(post_processor.calibration) == len(post_processor.pixel_calibration) == len(module.val_data)
    predictions = run.predict(detector, datamodule=module, return_predictions=True)
    for batch in predictions:
        with torch.no_grad():
            raw = detector.model(batch.image).pred_score
        torch.testing.assert_close(batch.raw_score, raw)
        assert torch.equal(batch.p_value, post_processor.p_values(batch.raw_score))
        assert torch.equal(batch.pred_label, batch.p_value < 0.05)
        assert torch.equal(batch.pred_score > 0.5, batch.pred_label)
        assert torch.equal(batch.pred_mask, batch.anomaly_map > 0.5)
    everything = torch.cat([batch.raw_score for batch in predictions])
    assert post_processor.drift_p_value(everything) < 1e-3  # half of them are squares


def test_checkpoints_hold_calibrations_of_maps(caplog):
    saved, fresh, maps = calibrated(), ConformalPostProcessor(), torch.rand(2, 1, 3, 3)
    validate(saved, batch(torch.randn(57), [0] * 57, torch.rand(57, 4, 4)))
    predictions = InferenceBatch(pred_score=torch.zeros(2), anomaly_map=maps)
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh.pixel_threshold, saved.pixel_threshold)
    assert torch.equal(fresh(predictions).anomaly_map, saved(predictions).anomaly_map)
    assert not caplog.text
    saved.forget()
    assert torch.isnan(saved.pixel_threshold)


def test_checkpoints_hold_calibrations_of_any_size(caplog):
    saved, fresh = calibrated(images=57, alpha=0.03), calibrated(images=400)
    scores = torch.linspace(2, 5, 50)
    fresh.load_checkpoint_config(saved.checkpoint_config())
    fresh.load_state_dict(saved.state_dict())
    assert fresh.alpha == 0.03
    assert all(torch.equal(*pair) for pair in zip(decide(fresh, scores), decide(saved, scores), strict=True))
    assert torch.equal(copy.deepcopy(fresh).p_values(scores), saved.p_values(scores))
    assert not caplog.text
    chosen = calibrated(images=400, alpha=0.1)
    chosen.load_checkpoint_config(saved.checkpoint_config())
    assert chosen.alpha == 0.1
    assert "Labels are at alpha = 0.1, as asked for, and not at the checkpoint's 0.03." in caplog.text
    fresh.load_state_dict(PostProcessor().state_dict())
    assert not fresh.calibrated
    assert "The checkpoint has no calibration scores" in caplog.text
    assert "post_processor=PostProcessor()) has what anomalib's has learnt" in caplog.text


def test_what_is_said_of_a_checkpoint_with_anomalibs_post_processor_helps(tmp_path):
    detector, module = embedding_flow(coupling_layers=0, post_processor=PostProcessor()), data(tmp_path)
    run = engine(tmp_path)
    run.fit(detector, datamodule=module)
    path = run.trainer.checkpoint_callback.best_model_path
    assert load(path).score(torch.rand(2, 3, 12, 12)).label is None
    kept = open_checkpoint(path, post_processor=PostProcessor())
    for ours, theirs in zip(
        *(engine(tmp_path).predict(one, datamodule=module) for one in (kept, detector)), strict=True
    ):
        assert torch.equal(ours.pred_label, theirs.pred_label)
        assert torch.equal(ours.pred_score, theirs.pred_score)
    sets = [f"--data.in_distribution={tmp_path / 'ramps'}", f"--data.out_of_distribution=[{tmp_path / 'squares'}]"]
    main(["validate", "--data", "CrossDataset", *sets, "--ckpt_path", path])
    (calibrated,) = set(tmp_path.rglob("*.ckpt")) - {Path(path)}
    assert load(calibrated).score(torch.rand(2, 3, 12, 12)).label is not None


class Graph(torch.nn.Module):
    def __init__(self, post_processor):
        super().__init__()
        self.post_processor = post_processor

    def forward(self, scores, maps):
        return tuple(self.post_processor(InferenceBatch(pred_score=scores, anomaly_map=maps)))


@pytest.mark.parametrize("pixels", [False, True])
def test_exported_graphs_decide_alike(pixels, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is the extra anomalib-flowood[export]")
    openvino = pytest.importorskip("openvino", reason="OpenVINO export is the extra anomalib-flowood[export]")
    post_processor = calibrated(images=1000)
    post_processor.calibrate(post_processor.calibration, 7 + 3 * torch.rand(1000))
    if pixels:
        post_processor.pixel_min.fill_(-3)
        post_processor.pixel_max.fill_(30)
    known = post_processor.calibration
    others = torch.tensor([INF, -INF, 1e30, -1e30])
    scores = torch.cat([known, known.nextafter(torch.tensor(INF)), torch.linspace(-50, 5e4, 500), others])
    maps = torch.linspace(-9, 60, len(scores) * 4).reshape(-1, 1, 2, 2)
    graph, path = Graph(post_processor).eval(), tmp_path / "decide.onnx"
    names = ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
    batch_size = torch.export.Dim("n", min=2)
    torch.onnx.export(
        graph, (scores[:5], maps[:5]), str(path), dynamo=True, opset_version=18, input_names=["scores", "maps"],
        output_names=names, dynamic_shapes={"scores": {0: batch_size}, "maps": {0: batch_size}},
    )  # fmt: skip
    given = {"scores": scores.numpy(), "maps": maps.numpy()}
    session = onnxruntime.InferenceSession(str(path))
    compiled = openvino.Core().compile_model(str(path), "CPU")
    result = compiled(given)
    expected = dict(zip(names, graph(scores, maps), strict=True))
    for outputs in (dict(zip(names, session.run(names, given), strict=True)), {name: result[name] for name in names}):
        for name in ("pred_score", "anomaly_map"):
            np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-4, atol=1e-30)
        for name in ("pred_label", "pred_mask"):
            np.testing.assert_array_equal(outputs[name].astype(bool), expected[name])
        np.testing.assert_array_equal(outputs["pred_score"] > 0.5, expected["pred_label"])
