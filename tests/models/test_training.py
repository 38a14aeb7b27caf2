# SPDX-License-Identifier: Apache-2.0
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from model_helpers import DETECTORS, TRAINER, data, embedding_flow, engine, feature_map_flow, pixel_flow


class Clock(Timer):
    """A limit in time, by another name."""


@pytest.mark.parametrize(
    ("limits", "epochs"),
    [
        ({}, 2),
        ({"max_epochs": 3}, 3),
        ({"max_epochs": -1}, -1),
        ({"max_steps": 5}, None),
        ({"max_time": "00:00:01:00"}, None),
        ({"callbacks": [Timer(timedelta(minutes=1))]}, None),
        ({"callbacks": [Clock(timedelta(minutes=1))]}, None),
        ({"callbacks": [Timer(None)]}, 2),  # which measures only
    ],
)
def test_only_a_trainer_without_any_limit_gets_the_detectors(limits, epochs, tmp_path):
    detector = pixel_flow(max_epochs=2)
    detector.trainer = Trainer(**{**TRAINER, **limits}, default_root_dir=tmp_path, logger=False)
    assert detector.trainer.fit_loop.max_epochs == epochs


def test_where_nothing_trains_no_time_is_spent(tmp_path):
    detector = embedding_flow(coupling_layers=0)
    run = engine(tmp_path, max_time="00:01:00:00")
    run.fit(detector, datamodule=data(tmp_path))
    assert run.trainer.current_epoch == 1
    assert detector.post_processor.calibrated


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(
    ("limits", "settings", "message"),
    [
        ({"max_epochs": 0}, {}, "max_epochs of the trainer has to be above 0"),
        ({"max_steps": 0}, {}, "max_steps has to be above 0"),
        ({"limit_train_batches": 0}, {}, "limit_train_batches has to be above 0"),
        ({}, {"max_epochs": 0}, r"max_epochs of \w+Flow has to be above 0"),
        ({}, {"max_epochs": -1}, r"max_epochs of \w+Flow has to be above 0"),
        ({"callbacks": [EMAWeightAveraging()]}, {}, "EMAWeightAveraging averages and exchanges .* calibration"),
        ({"callbacks": [WeightAveraging(use_buffers=False)]}, {}, "Use StochasticWeightAveraging"),
        ({"callbacks": [LearningRateFinder()]}, {}, "LearningRateFinder trains before .* set learning_rate"),
        (
            {"callbacks": [BatchSizeFinder(batch_arg_name="train_batch_size")]},
            {},
            "BatchSizeFinder trains before .* set train_batch_size",
        ),
        ({"callbacks": [BackboneFinetuning(1)]}, {}, "BackboneFinetuning trains a backbone, .* Leave it out"),
        ({"callbacks": [ModelPruning("l1_unstructured")]}, {}, "ModelPruning takes weights off .* hidden_channels"),
    ],
)
def test_what_would_train_nothing_or_spoil_what_is_fitted_is_refused_at_the_start(
    detector, limits, settings, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        engine(tmp_path, **limits).fit(DETECTORS[detector](**settings), datamodule=data(tmp_path))


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("built", [True, False])
def test_inference_mode_in_which_nothing_learns_is_refused_at_the_start(built, detector, tmp_path):
    with torch.inference_mode(built):
        made = DETECTORS[detector]()
    with (
        torch.inference_mode(not built),
        pytest.raises(ValueError, match=r"Flow was built, or is to be fitted, within torch\.inference_mode\(\)"),
    ):
        engine(tmp_path).fit(made, datamodule=data(tmp_path))


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(("asked", "batches"), [({}, 0), ({"num_sanity_val_steps": 1}, 1)])
def test_no_validation_images_are_tried_before_a_training_unless_somebody_asks(detector, asked, batches, tmp_path):
    class Tried(Callback):
        batches = 0

        def on_validation_batch_end(self, trainer, *_):
            self.batches += trainer.sanity_checking

    tried = Tried()
    engine(tmp_path, callbacks=[tried], **asked).fit(DETECTORS[detector](), datamodule=data(tmp_path))
    assert tried.batches == batches


def scrambled(detector):
    """The backbone's batch norms, with statistics as training leaves them; fresh ones are what a reset gives."""
    norms = [part for part in detector.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.copy_(torch.randn_like(norm.running_mean))
        norm.running_var.copy_(torch.rand_like(norm.running_var) + 0.5)
        norm.num_batches_tracked.fill_(7)
    return norms


@pytest.mark.parametrize("new", [embedding_flow, feature_map_flow])
def test_averaged_weights_leave_the_backbone_as_it_is(new, tmp_path):
    detector = new(max_epochs=3, coupling_layers=2)
    norms = scrambled(detector)
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    engine(tmp_path, callbacks=[averaging]).fit(detector, datamodule=data(tmp_path))
    assert norms
    for norm, kept in zip(norms, before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in norm.named_buffers())
        assert norm.momentum is not None
    assert len(detector.post_processor.calibration) == 24


def test_a_score_is_fitted_to_averaged_weights(tmp_path):
    detector = pixel_flow(max_epochs=3, score="typicality")
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    engine(tmp_path, callbacks=[averaging]).fit(detector, datamodule=data(tmp_path))
    fitted = {name: value.clone() for name, value in detector.model.scorer.named_buffers()}
    module = data(tmp_path)
    module.setup()
    detector.fit_score(module.train_dataloader())
    for name, value in detector.model.scorer.named_buffers():
        torch.testing.assert_close(fitted[name], value)


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("limits", [{"overfit_batches": 2}, {"overfit_batches": 0.5}, {"fast_dev_run": True}])
def test_trial_trainings_work(detector, limits, tmp_path):
    trained = DETECTORS[detector]()
    engine(tmp_path, **limits).fit(trained, datamodule=data(tmp_path))
    assert trained.post_processor.calibrated == ("fast_dev_run" not in limits)


@pytest.mark.parametrize("limits", [{"max_steps": 2}, {"limit_val_batches": 0}, {"check_val_every_n_epoch": 5}])
def test_a_fit_that_calibrates_nothing_says_so(limits, tmp_path, caplog):
    trained = pixel_flow()
    engine(tmp_path, **limits).fit(trained, datamodule=data(tmp_path))
    assert not trained.post_processor.calibrated
    assert "The fit ended without a calibration" in caplog.text


@pytest.mark.parametrize("build", [embedding_flow, feature_map_flow])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_where_nothing_trains_clipping_changes_nothing(build, algorithm, tmp_path):
    detector = build(coupling_layers=0)
    clipped = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": algorithm}
    engine(tmp_path, **clipped).fit(detector, datamodule=data(tmp_path))
    assert detector.post_processor.calibrated
