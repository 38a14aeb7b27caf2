# SPDX-License-Identifier: Apache-2.0
"""The whitening behind FeatureMapFlow's flow is fitted with the weights that a training leaves, however it ends."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, Timer
from model_helpers import data, engine, feature_map_flow

from anomalib_flowood import open_checkpoint

PARTS = ("positions", "layout", "evidence", "location", "spread")


def whitening(detector) -> dict[str, torch.Tensor]:
    """What is fitted behind the flow."""
    named = detector.model.state_dict().items()
    return {name: value.clone() for name, value in named if any(part in name.split(".") for part in PARTS)}


def observed(**kwargs):
    """A detector, which lets go what it is fitted to, and what that was."""
    detector = feature_map_flow(**kwargs)
    fit, seen = detector.model.fit_whitening, []
    detector.model.fit_whitening = lambda *fitted_to: (seen.append(fitted_to), fit(*fitted_to))[1]
    return detector, seen


def assert_own(detector, seen) -> None:
    """The whitening is that of the present weights and of the images of the fit, which are let go."""
    assert detector._reference == ()
    assert detector._damaged is None
    *_, damaged = seen[-1]
    assert damaged is not None
    found = whitening(detector)
    assert float(detector.model.evidence.location.abs().min()) > 0
    detector.model.eval()
    detector.model.fit_whitening(*seen[-1])
    torch.testing.assert_close(found, whitening(detector))


ENDS = {
    "the last epoch": {},
    "early stopping": {"callbacks": lambda: [EarlyStopping("val_loss", patience=1, min_delta=1e6)]},
    "averaged weights": {"callbacks": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]},
    "a limit in steps": {"max_steps": 3},
    "a limit in time": {"callbacks": lambda: [Timer(timedelta(microseconds=1))]},
    "no validation": {"limit_val_batches": 0},
    "a validation in every second epoch": {"check_val_every_n_epoch": 2},
}
CALIBRATED = {"the last epoch", "early stopping", "averaged weights", "a limit in time"}


@pytest.mark.parametrize("end", ENDS)
def test_however_a_training_ends_the_whitening_is_that_of_its_weights(end, tmp_path):
    arguments = {name: value() if callable(value) else value for name, value in ENDS[end].items()}
    # Without batch norms, for whose sake Lightning would train on with averaged weights.
    (detector, seen), module = observed(backbone="test_convnext", max_epochs=3), data(tmp_path)
    run = engine(tmp_path, **arguments)
    run.fit(detector, datamodule=module)
    assert detector.post_processor.calibrated == (end in CALIBRATED)
    assert_own(detector, seen)
    if end in CALIBRATED:
        again = open_checkpoint(run.trainer.checkpoint_callback.best_model_path)
        assert again.post_processor.calibrated
        torch.testing.assert_close(whitening(again), whitening(detector))


def test_a_resumed_fit_whitens_anew(tmp_path):
    module, run = data(tmp_path), engine(tmp_path)
    run.fit(feature_map_flow(max_epochs=1), datamodule=module)
    path = run.trainer.checkpoint_callback.best_model_path
    resumed, seen = observed(max_epochs=2)
    engine(tmp_path).fit(resumed, datamodule=module, ckpt_path=path)
    before = whitening(open_checkpoint(path))
    assert not torch.equal(before["evidence.location"], resumed.model.evidence.location)
    assert resumed.post_processor.calibrated
    assert_own(resumed, seen)
