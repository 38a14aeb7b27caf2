# SPDX-License-Identifier: Apache-2.0
"""Three processes and few images: what one of them lacks stops none, and changes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from model_helpers import data
from run_in_three_processes import FITTED, PROCESSES, TRAINED, run

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where three processes have worked."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def three(place):
    """What they found, and what they said."""
    data(place)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, str(HERE / "run_in_three_processes.py"), str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(place / "found.pt", weights_only=False), " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("mixed", [False, True], ids=["normal", "normal in one process only"])
@pytest.mark.parametrize("name", FITTED)
def test_processes_without_a_normal_or_a_test_image_give_what_one_gives(three, place, name, mixed):
    found = three[0][name, mixed]
    torch.manual_seed(0)
    one = run(place, FITTED[name](), 1, mixed=mixed)
    tolerance, absolute = (1e-5, 1e-8) if name == "feature_map_flow" else (1e-3, 1e-5)
    for key, value in one["state"].items():
        if value.is_floating_point():
            assert torch.allclose(found["state"][key], value, rtol=tolerance, atol=absolute, equal_nan=True), key
    assert len(one["state"]["post_processor.calibration"]) == (2 if mixed else 4)
    for metric, value in one["metrics"].items():
        assert found["metrics"][metric] == pytest.approx(value, rel=tolerance, nan_ok=True), metric
    pd.testing.assert_frame_equal(found["scores"], one["scores"], rtol=tolerance)
    assert len(one["scores"]) == 2
    pd.testing.assert_frame_equal(found["rows"], one["rows"], rtol=tolerance)
    assert len(one["rows"]) == 7
    assert "3 processes cannot share 2 images" in found["refused"]


@pytest.mark.parametrize("name", TRAINED)
def test_processes_train_in_step_and_go_on_so(three, name):
    found, said = three
    trained, resumed = found[name]["trained"], found[name]["resumed"]
    images, batch = 96, 16
    steps = images // batch // PROCESSES
    if name == "feature_map_flow":
        steps = -(-TRAINED[name]().epoch_steps(images) // PROCESSES)
    for one, epochs in ((trained, [0, steps, steps]), (resumed, [steps - 1, steps])):
        assert one["differ"] == []
        assert one["steps"] == PROCESSES * [(epochs, 2 * steps)]
        assert one["calibration"] == 24
    for key, value in trained["state"].items():  # not to the last bit: DDP brings its buckets into order anew
        if value.is_floating_point():
            torch.testing.assert_close(resumed["state"][key], value, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert "goes on in 3 processes" not in said
