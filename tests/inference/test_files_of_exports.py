# SPDX-License-Identifier: Apache-2.0
"""Exports whose files were mixed, changed, or written over: nothing but the export that was checked decides."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

import anomalib_flowood
from anomalib_flowood import exported

WEIGHTS = {"onnx": "model.onnx.data", "openvino": "model.bin"}


@pytest.fixture(scope="module")
def case(cases):
    return cases("feature_map_flow")


def copied(case, export_type, folder):
    shutil.copytree(case.export(export_type).parent, folder, dirs_exist_ok=True)
    return folder


def change(folder, **values):
    description = folder / "model.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | values))


@pytest.mark.parametrize(
    "file", ["model.xml", "model.bin", "model.onnx", "model_raw.onnx", "model.onnx.data", "model.pt"]
)
def test_a_file_of_another_export_is_refused(file, case, tmp_path, monkeypatch):
    """Runtimes take weights of the right size for theirs: scores were others, without a word."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    kind = {"xml": "openvino", "bin": "openvino", "pt": "torch"}.get(file.rpartition(".")[2], "onnx")
    path = copied(case, kind, tmp_path) / file
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is not the file .*model\.json was written with: it was not copied"):
        anomalib_flowood.load(tmp_path)


@pytest.mark.parametrize("export_type", WEIGHTS)
def test_weights_that_are_missing_are_named(export_type, case, tmp_path):
    (copied(case, export_type, tmp_path) / WEIGHTS[export_type]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no .*{WEIGHTS[export_type]}, which belongs to .*model\.json"):
        anomalib_flowood.load(tmp_path)


_WRITTEN_OVER = """
import os, sys
import numpy as np
import anomalib_flowood
image = np.full((3, 60, 41), 100, np.uint8)
for weights in sys.argv[1:]:
    detector = anomalib_flowood.load(os.path.dirname(weights))
    before = detector.score([image, image]).raw_score
    with open(weights, "r+b") as file:
        file.write(bytes(os.path.getsize(weights)))
    assert np.array_equal(detector.score([image, image]).raw_score, before), weights
    os.truncate(weights, 0)
    assert np.array_equal(detector.score([image, image]).raw_score, before), weights
"""


def test_a_detector_that_is_loaded_stays_what_it_is(case, tmp_path):
    """Its weights were those of whatever was copied over them; in the midst of a copy that was the end, by SIGBUS."""
    held = dict(WEIGHTS)
    if not hasattr(onnxruntime.SessionOptions, "add_external_initializers_from_files_in_memory"):
        del held["onnx"]  # before 1.24, as on Python 3.10, the file is mapped
    weights = [str(copied(case, kind, tmp_path / kind) / name) for kind, name in held.items()]
    done = subprocess.run([sys.executable, "-c", _WRITTEN_OVER, *weights], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_an_export_of_a_later_version_is_told(case, tmp_path):
    folder = copied(case, "onnx", tmp_path)
    change(folder, format=2, versions={"anomalib-flowood": "9.0"})
    with pytest.raises(ValueError, match=r"model\.json is of another format than 1, by anomalib-flowood 9\.0"):
        anomalib_flowood.load(folder)
    with pytest.raises(ValueError, match="another format"):
        exported.p_values(folder / "model.onnx", [1.0])


@pytest.mark.parametrize(
    "changed",
    [
        {"calibration_scores": "many"},
        {"calibration_scores": [1.0, float("nan")]},
        {"calibration_scores": [[1.0]]},
        {"left_out_scores": None},
        {"level": None},
        {"level": 5},
        {"level": "0.05"},
        {"image_size": "48"},
        {"image_size": [-1, 48]},
        {"max_value": "4095"},
        {"export_type": "trt"},
        {"file": 5},
    ],
)
def test_a_description_with_values_that_none_has_is_refused(changed, case, tmp_path):
    folder = copied(case, "onnx", tmp_path)
    change(folder, **changed)
    with pytest.raises(ValueError, match=rf"model\.json has been changed: no export has {next(iter(changed))}: "):
        anomalib_flowood.load(folder)


def test_a_calibration_may_have_infinite_scores(case, tmp_path):
    """JSON has none, and they are texts there."""
    folder = copied(case, "onnx", tmp_path)
    known = json.loads((folder / "model.json").read_text())
    change(folder, calibration_scores=[*known["calibration_scores"][:-1], "inf"])
    loaded = anomalib_flowood.load(folder)
    got = loaded.score(np.full((3, 60, 41), 100, np.uint8))
    assert got.p_value > 0
    assert exported.p_values(folder / "model.onnx", [np.inf]) == 2 / (len(known["calibration_scores"]) + 1)
