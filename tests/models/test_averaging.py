# SPDX-License-Identifier: Apache-2.0
"""Averaged weights: scored, calibrated and kept as if they had been trained, or refused."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from model_helpers import data, embedding_flow, engine, feature_map_flow, pixel_flow

from anomalib_flowood import open_checkpoint

KINDS = {
    "pixels": partial(pixel_flow, score="typicality"),
    "embeddings": partial(embedding_flow, coupling_layers=2, backbone="test_convnext"),
    "embeddings, batch norms": partial(embedding_flow, coupling_layers=2),
    "maps": partial(feature_map_flow, coupling_layers=2, backbone="test_convnext"),
    "maps, batch norms": partial(feature_map_flow, coupling_layers=2),
}

AT_ONCE = {"eval_batch_size": 24}
"""All validation images in one batch, stored or not: in others sums end in other digits."""


def fit(folder, kind, *, start=1, seed=0, ckpt_path=None, **limits):
    """A detector with averaged weights, the callback that has averaged them, and the engine."""
    torch.manual_seed(seed)
    average = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=start)
    run = engine(folder, callbacks=[average, *limits.pop("callbacks", ())], **limits)
    detector = KINDS[kind](max_epochs=4)
    run.fit(detector, datamodule=data(folder, **AT_ONCE), ckpt_path=ckpt_path)
    return detector, average, run


def flow_of(detector):
    return list(detector.model.flow.parameters())


def assert_averaged(detector, average):
    for weight, mean in zip(flow_of(detector), flow_of(average._average_model), strict=True):
        assert torch.equal(weight, mean)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_calibration_and_checkpoint_are_of_averaged_weights(kind, tmp_path):
    detector, average, run = fit(tmp_path, kind)
    assert average.n_averaged == 4
    assert_averaged(detector, average)
    calibration = detector.post_processor.calibration.clone()
    assert len(calibration) == 24
    kept = open_checkpoint(run.trainer.checkpoint_callback.best_model_path)
    assert_averaged(kept, average)
    assert torch.equal(kept.post_processor.calibration, calibration)
    auroc = run.test(detector, datamodule=data(tmp_path), verbose=False)[0]["image_AUROC"]
    run.validate(detector, datamodule=data(tmp_path, **AT_ONCE), verbose=False)
    torch.testing.assert_close(detector.post_processor.calibration, calibration)
    plain = engine(tmp_path)
    torch.manual_seed(0)
    detector = KINDS[kind](max_epochs=4)
    plain.fit(detector, datamodule=data(tmp_path))
    assert auroc == pytest.approx(
        plain.test(detector, datamodule=data(tmp_path), verbose=False)[0]["image_AUROC"], abs=0.02
    )


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("embeddings", {"check_val_every_n_epoch": 3}),
        ("embeddings, batch norms", {"check_val_every_n_epoch": 3}),
        ("pixels", {"limit_val_batches": 0}),
    ],
)
def test_without_a_validation_at_its_end_weights_are_averaged_and_nothing_else(kind, limits, tmp_path, caplog):
    detector, average, run = fit(tmp_path, kind, **limits)
    assert_averaged(detector, average)
    if "limit_val_batches" in limits:  # else the checkpoint is of the last validation
        assert_averaged(open_checkpoint(run.trainer.checkpoint_callback.best_model_path), average)
    assert not detector.post_processor.calibrated
    assert "without a calibration" in caplog.text or "it is dropped" in caplog.text


@pytest.mark.parametrize("kind", ["pixels", "embeddings, batch norms"])
@pytest.mark.parametrize(("start", "epochs"), [(5, 4), (2, -1)])
def test_an_average_of_nothing_is_refused_at_the_start(kind, start, epochs, tmp_path):
    with pytest.raises(ValueError, match=f"begin in epoch {start}, .* raise max_epochs"):
        fit(tmp_path, kind, start=start, max_epochs=epochs, max_steps=50)


@pytest.mark.parametrize(
    "limits", [{"max_steps": 8}, {"callbacks": [EarlyStopping("val_loss", min_delta=1e6, patience=1)]}]
)
def test_a_training_that_ends_before_says_that_nothing_is_averaged(limits, tmp_path, caplog):
    detector, average, _ = fit(tmp_path, "embeddings, batch norms", max_epochs=4, **limits)
    assert "StochasticWeightAveraging has averaged nothing" in caplog.text
    assert not all(
        torch.equal(weight, mean)
        for weight, mean in zip(flow_of(detector), flow_of(average._average_model), strict=True)
    )


@pytest.mark.parametrize("build", [embedding_flow, feature_map_flow])
def test_where_nothing_trains_averaging_changes_nothing(build, tmp_path):
    detectors = []
    for callbacks in ([], [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)]):
        torch.manual_seed(0)
        detector = build(coupling_layers=0)
        engine(tmp_path, callbacks=callbacks).fit(detector, datamodule=data(tmp_path))
        detectors.append(detector)
    plain, averaged = (detector.state_dict() for detector in detectors)
    assert [name for name in plain if not torch.equal(plain[name].nan_to_num(), averaged[name].nan_to_num())] == []


class SaveWithin(Callback):
    """Writes what a kill in the midst of an epoch would leave."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, detector, batch, batch_idx):
        if batch_idx == 1:
            trainer.save_checkpoint(self.folder / f"within-{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize(("kind", "epochs"), [("pixels", (1, 3)), ("embeddings, batch norms", (1, 4))])
def test_a_training_with_averages_goes_on_exactly(kind, epochs, tmp_path, caplog):
    whole, *_ = fit(tmp_path, kind, start=2, callbacks=[SaveWithin(tmp_path)])
    for epoch in epochs:  # that in which averaging begins; the last, which is of the average alone with batch norms
        again, *_ = fit(tmp_path, kind, start=2, seed=99, ckpt_path=tmp_path / f"within-{epoch}.ckpt")
        one, other = whole.state_dict(), again.state_dict()
        assert [name for name in one if not torch.equal(one[name].nan_to_num(), other[name].nan_to_num())] == []
    assert "as if uninterrupted" not in caplog.text
