# SPDX-License-Identifier: Apache-2.0
"""A PixelFlow keeps the weights of its best epoch, and says so; and it trains as long as its images ask for."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from anomalib.callbacks.checkpoint import ModelCheckpoint
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from model_helpers import data, engine, pixel_flow

from anomalib_flowood import PixelFlow, open_checkpoint


class Spoil(Callback):
    """Spoils the weights after some epochs, and keeps those of all."""

    def __init__(self, *epochs):
        self.epochs, self.weights = epochs, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.is_last_batch:
            return
        epoch = trainer.current_epoch + 1
        if epoch in self.epochs:
            generator = torch.Generator().manual_seed(epoch)
            with torch.no_grad():
                for parameter in pl_module.model.flow.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.weights[epoch] = copy.deepcopy(pl_module.model.flow.state_dict())


def fit(folder, *callbacks, ckpt_path=None, spoil=(), limits=None, **settings):
    """Fit and say what came of it."""
    spoiler, module = Spoil(*spoil), data(folder)
    run = engine(folder, callbacks=[spoiler, *callbacks], **(limits or {}))
    torch.manual_seed(0)
    detector = pixel_flow(**settings)
    run.fit(detector, datamodule=module, ckpt_path=ckpt_path)
    path = run.trainer.checkpoint_callback.best_model_path
    return SimpleNamespace(detector=detector, weights=spoiler.weights, run=run, path=path, module=module)


def has_weights_of(detector, case, epoch):
    mine = detector.model.flow.state_dict()
    return all(torch.equal(mine[name], value) for name, value in case.weights[epoch].items())


def held_out(case, detector):
    """−log2 p per dimension of the validation images."""
    val = case.module.val_data
    images = detector.pre_processor.transform(val.__getitems__(list(range(len(val)))).image)
    with torch.no_grad():
        return 8 - detector.model.log_prob(images) / detector.model.dims / torch.tensor(2.0).log()


@pytest.mark.parametrize("score", ["nll", "typicality"])
def test_the_best_epoch_comes_back_with_its_score_and_calibration(score, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    case = fit(tmp_path, spoil=(2, 3), max_epochs=3, score=score)
    assert (
        f"Kept the weights after epoch 1 of 3: 24 held-out normal images have {case.detector.kept_epoch.bits:.2f} bits"
        in caplog.text
    )
    for detector in (case.detector.eval(), open_checkpoint(case.path).eval()):
        assert has_weights_of(detector, case, 1)
        bits = held_out(case, detector)
        assert (detector.kept_epoch.epoch, detector.kept_epoch.images) == (1, 24)
        assert detector.kept_epoch.bits == pytest.approx(float(bits.mean()), rel=1e-5)
        detector.check_weights()  # which drops a calibration of other weights
        assert len(detector.post_processor.calibration) == 24
        if score == "nll":
            nll = (bits.sort().values - 8) * torch.tensor(2.0).log()
            torch.testing.assert_close(detector.post_processor.calibration, nll, rtol=1e-4, atol=1e-5)
    assert float(case.run.trainer.callback_metrics["val_loss"]) == pytest.approx(
        (case.detector.kept_epoch.bits - 8) * 0.6931472, rel=1e-4
    )


def test_a_validation_looks_at_its_images_once_unless_training_ends(tmp_path, monkeypatch):
    epochs, again = [], PixelFlow._held_out
    monkeypatch.setattr(PixelFlow, "_held_out", lambda self: epochs.append(self.current_epoch + 1) or again(self))
    case = fit(tmp_path, spoil=(3,), max_epochs=3)
    assert epochs == [3]
    assert (case.detector.kept_epoch.epoch, case.detector.kept_epoch.images) == (2, 24)
    assert case.detector.kept_epoch.bits == pytest.approx(float(held_out(case, case.detector).mean()), rel=1e-6)


def test_the_last_epoch_stays_where_it_is_the_best(tmp_path):
    case = fit(tmp_path)
    assert case.detector.kept_epoch.epoch == 2
    assert has_weights_of(case.detector, case, 2)


def test_one_image_that_explodes_costs_an_epoch_its_place(tmp_path, monkeypatch):
    bits = iter([torch.full((100,), 6.0), torch.cat([torch.full((99,), 5.5), torch.tensor([630.0])])])
    monkeypatch.setattr(PixelFlow, "_held_out_bits", lambda self: next(bits).double())
    case = fit(tmp_path)
    assert case.detector.kept_epoch.epoch == 1
    assert has_weights_of(case.detector, case, 1)


@pytest.mark.parametrize(("mean", "told"), [(1664.0, True), (9.0, False)])
def test_a_flow_that_has_learnt_nothing_is_said_to(mean, told, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(PixelFlow, "_held_out_bits", lambda self: torch.full((24,), mean).double())
    fit(tmp_path, max_epochs=1)
    assert ("have 1664 bits per dimension (mean), and noise would have 8: " in caplog.text) == told
    assert ("its scores mean little" in caplog.text) == told


def test_overflow_is_worse_than_anything(tmp_path, monkeypatch):
    bits = iter([torch.tensor([9.0]), torch.tensor([torch.inf])])
    monkeypatch.setattr(PixelFlow, "_held_out_bits", lambda self: next(bits).double())
    assert fit(tmp_path).detector.kept_epoch.epoch == 1


def test_a_resumed_training_knows_the_best_epoch_before(tmp_path):
    each = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    case = fit(tmp_path, each, spoil=(2, 3), max_epochs=3)
    middle = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert middle["anomalib_flowood_kept_epoch"]["best"]["epoch"] == 1
    again = fit(tmp_path, spoil=(2, 3), max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert list(again.weights) == [3]
    assert again.detector.kept_epoch == case.detector.kept_epoch
    assert has_weights_of(again.detector, case, 1)
    longer = fit(tmp_path, spoil=(4,), max_epochs=4, ckpt_path=tmp_path / "epoch=2.ckpt")  # of a finished one
    assert longer.detector.kept_epoch == case.detector.kept_epoch
    assert has_weights_of(longer.detector, case, 1)


def test_a_second_fit_begins_anew(tmp_path):
    case = fit(tmp_path)
    case.detector.max_epochs = 1
    engine(tmp_path).fit(case.detector, datamodule=case.module)
    assert case.detector.kept_epoch.epoch == 1


@pytest.mark.parametrize("limits", [{"check_val_every_n_epoch": 2}, {"check_val_every_n_epoch": 5}])
def test_the_last_weights_are_judged_where_no_validation_did(limits, tmp_path):
    case = fit(tmp_path, spoil=(3,), max_epochs=3, limits=limits)
    validated = limits["check_val_every_n_epoch"] == 2
    assert case.detector.kept_epoch.epoch == (2 if validated else 3)
    assert has_weights_of(case.detector, case, case.detector.kept_epoch.epoch)
    assert case.detector.post_processor.calibrated == validated


def test_without_validation_images_the_last_epoch_is_kept_and_that_is_said(tmp_path, caplog):
    case = fit(tmp_path, spoil=(2,), limits={"limit_val_batches": 0})
    assert case.detector.kept_epoch is None
    assert has_weights_of(case.detector, case, 2)
    assert "last epoch are kept, whichever was the best: there are no normal validation images" in caplog.text
    assert open_checkpoint(case.path).kept_epoch is None


def test_anomalous_validation_images_do_not_choose(tmp_path, monkeypatch):
    normal, anomalous = torch.full((3, 1, 12, 12), 0.5), torch.rand(2, 3, 12, 12)
    labels = torch.tensor([False, True, False, True, False])
    images = torch.stack([normal[0], anomalous[0][:1], normal[1], anomalous[1][:1], normal[2]])
    detector = pixel_flow()
    monkeypatch.setattr(detector, "_held_out", lambda: [SimpleNamespace(image=images, gt_label=labels)])
    bits = detector._held_out_bits()
    assert len(bits) == 3
    assert torch.equal(bits, bits[:1].expand(3))


@pytest.mark.parametrize(
    "monitor",
    [
        lambda folder: ModelCheckpoint(folder, monitor="val_loss"),
        lambda folder: EarlyStopping("val_loss"),
        lambda folder: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    ],
)
def test_a_callback_that_chooses_is_left_to_it(monitor, tmp_path, caplog):
    callback = monitor(tmp_path)
    case = fit(tmp_path, callback, spoil=(2,))
    assert case.detector.kept_epoch is None
    assert not has_weights_of(case.detector, case, 1)
    assert f"whichever was the best: {type(callback).__name__} of the trainer chooses weights" in caplog.text


def test_callbacks_that_choose_are_named_together(tmp_path, caplog):
    fit(tmp_path, ModelCheckpoint(tmp_path, monitor="val_loss"), EarlyStopping("val_loss"))
    assert "EarlyStopping and ModelCheckpoint of the trainer choose weights" in caplog.text


# -- how long --------------------------------------------------------------------------------------------------------


def test_the_more_images_the_fewer_epochs():
    detector = PixelFlow()
    epochs = [detector.epochs_for(images) for images in (1, 36, 100, 1000, 9000, 54_000, 10**9)]
    assert epochs == sorted(epochs, reverse=True)
    assert min(epochs) == 1
    assert detector.epochs_for(9000) <= 15  # half of what 0.1.0 took


@pytest.mark.parametrize(
    ("limits", "settings", "epochs"), [({}, {}, 3), ({"max_epochs": 2}, {}, 2), ({}, {"max_epochs": 1}, 1)]
)
def test_the_number_of_epochs_follows_the_images_unless_one_is_given(limits, settings, epochs, tmp_path, monkeypatch):
    monkeypatch.setattr(PixelFlow, "epochs_for", lambda self, images: images // 32)
    case = fit(tmp_path, limits=limits, **{"max_epochs": None, **settings})
    assert case.run.trainer.current_epoch == epochs
