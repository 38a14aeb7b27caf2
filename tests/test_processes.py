# SPDX-License-Identifier: Apache-2.0
"""What two processes give is what one gives."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from model_helpers import data
from run_in_two_processes import DETECTORS, EXACT, LOADING, TRAINED, run
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from anomalib_flowood import processes

HERE = Path(__file__).parent


class OwnBatches(BatchSampler):
    """A user's way to make batches."""


@pytest.mark.parametrize("batches", [OwnBatches, BatchSampler])
def test_repeated_images_do_not_count_however_batches_are_made(batches, monkeypatch):
    images = TensorDataset(torch.arange(5.0))
    sampler = DistributedSampler(images, num_replicas=2, rank=1, shuffle=False)  # images 1 and 3, and 0 once more
    loader = DataLoader(images, batch_sampler=batches(sampler, 2, drop_last=False))
    monkeypatch.setattr(processes, "ranks", lambda: 2)
    trainer = SimpleNamespace(testing=True, test_dataloaders=loader)
    assert [processes.own_rows(trainer, *batch) for batch in ((0, 2), (1, 1))] == [2, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have worked, all detectors one after the other."""
    place = tmp_path_factory.mktemp("processes")
    data(place)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, str(HERE / "run_in_two_processes.py"), str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (place / "said.txt").write_text(done.stderr + done.stdout, encoding="utf-8")
    return place


def test_two_processes_hear_nothing_that_is_not_so_or_that_nobody_can_act_on(folder):
    said = (folder / "said.txt").read_text(encoding="utf-8")
    assert "replicates some samples" not in said  # as here none counts twice
    assert "setting compute_on_cpu" not in said


@pytest.mark.parametrize("name", DETECTORS)
def test_two_processes_give_what_one_gives(folder, name):
    two = torch.load(folder / f"{name}.pt", weights_only=False)
    assert not two["unlike"]  # ActNorm starts alike, too
    trained = name == "pixel_flow"  # by steps on twice as many images
    torch.manual_seed(0)
    detector = DETECTORS[name]()
    if trained:
        detector.load_state_dict(two["state"])
    one = run(folder, name, detector, 1, fit=not trained)
    if trained:  # its score is fitted to all images, wherever it is
        module = data(folder, **LOADING)
        module.setup()
        detector.fit_score(module.train_dataloader())
        for key, value in detector.model.scorer.named_buffers():
            torch.testing.assert_close(two["state"][f"model.scorer.{key}"], value, rtol=1e-4, atol=1e-5)
    tolerance, absolute = (1e-5, 1e-8) if name in EXACT else (1e-4, 1e-5)
    for key, value in one["state"].items():
        if value.is_floating_point():
            assert name not in EXACT or value.dtype == torch.float64
            close = torch.allclose(two["state"][key], value, rtol=tolerance, atol=absolute, equal_nan=True)
            assert close, key
    calibration = two["state"]["post_processor.calibration"]
    assert len(calibration) == len(one["state"]["post_processor.calibration"]) == 18
    assert one["metrics"].keys() == two["metrics"].keys()
    for metric, value in one["metrics"].items():
        assert two["metrics"][metric] == pytest.approx(value, rel=tolerance), metric
    pd.testing.assert_frame_equal(two["scores"], one["scores"], rtol=tolerance)
    assert len(one["scores"]) == 50
    assert two["maps"].keys() == one["maps"].keys()
    assert bool(one["maps"]) == (name == "feature_map_flow")
    tables = [pd.read_csv(folder / f"{name}-{devices}" / "predictions.csv") for devices in (1, 2)]
    pd.testing.assert_frame_equal(*tables, rtol=tolerance)
    assert len(tables[0]) == 50


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_in_two_processes_goes_on_exactly(folder, name):
    assert torch.load(folder / "resumed.pt", weights_only=False)[name] == []


@pytest.mark.parametrize("name", sorted(EXACT))
def test_in_float64_the_order_in_which_a_loader_shuffles_does_not_count(name, tmp_path):
    found = []
    for seed in (1, 2):
        torch.manual_seed(0)
        detector = DETECTORS[name]()
        torch.manual_seed(seed)
        found.append(run(tmp_path, name, detector, 1, fit=True))
    one, other = found
    for key, value in one["state"].items():
        torch.testing.assert_close(other["state"][key], value, rtol=1e-5, atol=1e-8, equal_nan=True)
    pd.testing.assert_frame_equal(other["scores"], one["scores"], rtol=1e-5)
