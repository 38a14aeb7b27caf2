# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of earlier versions: they load and decide as they did, or are refused at once, with the reason."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from model_helpers import DETECTORS, data, engine

from anomalib_flowood import open_checkpoint
from anomalib_flowood.cli import main
from anomalib_flowood.models.components import CheckpointError

OLD = Path(__file__).parent / "old_checkpoints" / "pixel_flow-0.1.0.ckpt"
"""A calibrated PixelFlow of 12 x 12 pixels with the score `typicality`, as version 0.1.0 saved it."""

REFUSED = ["embedding_flow", "feature_map_flow"]


def test_a_pixel_flow_of_0_1_0_decides_as_it_did():
    detector = open_checkpoint(OLD).eval()
    images = torch.linspace(0, 1, 3 * 3 * 12 * 12).reshape(3, 3, 12, 12)
    torch.testing.assert_close(detector.raw_scores(images), torch.tensor([0.117075562, 0.022206306, 0.091973454]))
    detector.check_weights()  # which drops a calibration of other weights, settings or scores
    assert len(detector.post_processor.calibration) == 24
    batch = detector(images)
    assert batch.pred_label.tolist() == [True, True, True]
    with torch.no_grad():
        log_prob = detector.double().model.log_prob(images.double())
    torch.testing.assert_close(
        log_prob, torch.tensor([-51.49760656595241, -31.441003525400816, -47.88290582030764]).double()
    )


@pytest.fixture(params=["0.1.0", None])
def old(request, tmp_path):
    """What version 0.1.0, or one that left no version, had beside the weights of a detector."""

    def write(detector):
        checkpoint = {
            "pytorch-lightning_version": version("lightning"),
            "anomalib_flowood_class": type(detector).__name__,
            "hyper_parameters": {**detector.hparams, "backbone": "no_such_backbone"},  # nothing is to be built
            "state_dict": {},
        }
        if request.param is not None:
            checkpoint["anomalib_flowood_version"] = request.param
        torch.save(checkpoint, tmp_path / "old.ckpt")
        return tmp_path / "old.ckpt"

    return write


def reason(path, detector, written="0.1.0"):
    return (
        f"The checkpoint {path} was written by version {written}.* of anomalib-flowood, and {type(detector).__name__} "
        "reads those from 0.2.0 on, for its fitted statistics have moved into modules of their own, and their names "
        "with them. Train again, .*, or read it with anomalib-flowood 0.1.0."
    )


@pytest.mark.parametrize("name", REFUSED)
def test_python_refuses_it(name, old, tmp_path, monkeypatch):
    detector = DETECTORS[name]()
    path = old(detector)
    with pytest.raises(CheckpointError, match=reason(path, detector)):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match=reason(path, detector)):
        type(detector).load_from_checkpoint(path)
    monkeypatch.setattr(detector, "extract", None)  # no image passes through the backbone before it is refused
    run, module = engine(tmp_path), data(tmp_path)
    for command in (run.fit, run.test):
        with pytest.raises(CheckpointError, match=reason(path, detector)):
            command(detector, datamodule=module, ckpt_path=path)


@pytest.mark.parametrize("command", ["fit", "train", "validate", "test", "predict", "export", "explain", "score"])
@pytest.mark.parametrize("name", REFUSED)
def test_commands_refuse_it(name, command, old, capsys, monkeypatch):
    detector = DETECTORS[name]()
    path = old(detector)
    monkeypatch.setattr(type(detector), "__init__", None)
    with pytest.raises(SystemExit) as caught:
        main([command, "--ckpt_path", str(path)])
    assert caught.value.code == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "was written by version 0.1.0" in error
    assert str(path) in error
    assert "Train again" in error
