# SPDX-License-Identifier: Apache-2.0
"""Loaded detectors: any kind of image, any runtime, the same decisions as the engine's predictions."""

import csv
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import engine
from PIL import Image
from pretend_device import pretend_device

import anomalib_flowood
from anomalib_flowood import exported
from anomalib_flowood.cli import main
from anomalib_flowood.data import read_image
from anomalib_flowood.inference import Detector, images
from anomalib_flowood.inference.images import each_image
from anomalib_flowood.inference.loading import of_module
from anomalib_flowood.models.components import open_checkpoint
from anomalib_flowood.models.components.export_check import Runtime

SIZE = (60, 41)


def near(got, want):
    for name in ("score", "raw_score", "p_value", "label", "anomaly_map"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def case(cases):
    return cases("feature_map_flow")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, *SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pixels) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def loaded(case):
    return anomalib_flowood.load(case.checkpoint)


@pytest.fixture(scope="module")
def expected(loaded, folder):
    return loaded.score(folder)


def same(got, want):
    for name in ("score", "raw_score", "p_value", "label", "anomaly_map"):
        assert np.array_equal(getattr(got, name), getattr(want, name)), name


def test_scores_are_those_of_the_engine(case, expected, folder):
    batches = engine(case.folder).predict(case.detector, data_path=folder, return_predictions=True)
    assert expected.paths == tuple(path for batch in batches for path in batch.image_path)
    assert expected.paths == tuple(str(folder / f"{number}.png") for number in range(5))
    for ours, name in (
        ("raw_score", "raw_score"),
        ("score", "pred_score"),
        ("p_value", "p_value"),
        ("label", "pred_label"),
    ):
        theirs = torch.cat([getattr(batch, name) for batch in batches])
        np.testing.assert_allclose(getattr(expected, ours), theirs, rtol=1e-5)
    assert expected.anomaly_map.shape == (5, 48, 48)


def test_images_may_be_given_in_any_way(loaded, expected, folder, pixels):
    files = sorted(folder.iterdir())
    same(loaded.score(pixels), expected)
    same(loaded.score(pixels.transpose(0, 3, 1, 2)), expected)
    same(loaded.score(pixels.astype(np.float32) / np.float32(255)), expected)
    same(loaded.score(torch.from_numpy(pixels)), expected)
    same(loaded.score(list(pixels)), expected)
    same(loaded.score(image.transpose(2, 0, 1) for image in pixels), expected)
    same(loaded.score([Image.fromarray(image) for image in pixels]), expected)
    same(loaded.score(files), expected)
    same(loaded.score(file.read_bytes() for file in files), expected)
    same(loaded.score([bytearray(files[0].read_bytes()), memoryview(files[1].read_bytes()), *files[2:]]), expected)
    same(loaded.score([str(files[0]), pixels[1], Image.open(files[2]), pixels[3:]]), expected)
    assert loaded.score(files[3]).raw_score == pytest.approx(expected.raw_score[3:4], rel=1e-5)
    assert loaded.score(files, maps=False).anomaly_map is None
    assert len(loaded.score([])) == 0


@pytest.mark.parametrize("kind", ["checkpoint", "onnx", "openvino"])
def test_what_was_loaded_is_loaded_again_where_it_is_unpickled(kind, case, pixels, monkeypatch, tmp_path):
    path = case.checkpoint if kind == "checkpoint" else case.export(kind)
    monkeypatch.chdir(path.parent)
    detector = anomalib_flowood.load(path.name)
    monkeypatch.chdir(tmp_path)  # as in a process that was begun elsewhere
    same(pickle.loads(pickle.dumps(detector)).score(pixels), detector.score(pixels))


def test_a_detector_in_memory_is_pickled_whole_and_one_of_a_runtime_is_refused(case, pixels):
    detector = of_module(case.detector)
    same(pickle.loads(pickle.dumps(detector)).score(pixels), detector.score(pixels))
    with pytest.raises(TypeError, match="of a runtime of your own cannot be pickled: make it in each process"):
        pickle.dumps(Detector(Runtime(lambda batch: {"pred_score": batch.mean((1, 2, 3))}), SIZE))


def test_grey_images_and_16_bits_are_read_as_files_are(tmp_path):
    grey = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
    deep = (grey.astype(np.uint16) * 16) + 7
    for given in (grey, grey[None], grey[..., None], Image.fromarray(grey), np.stack([grey] * 5)[:1]):
        ((_, image),) = each_image(given)
        assert np.array_equal(image, grey[None] / np.float32(255))
    assert len(list(each_image(np.stack([grey] * 5)))) == 5
    for suffix in ("png", "tif"):
        file = tmp_path / f"deep.{suffix}"
        Image.fromarray(deep).save(file)
        with Image.open(file) as opened:
            ways = [next(each_image(given, 4103))[1] for given in (file, file.read_bytes(), deep, opened)]
        assert all(np.array_equal(way, ways[0]) for way in ways)


@pytest.mark.parametrize(("bits", "photometric"), [(16, 0), (16, 1), (12, 1)])
def test_an_opened_tiff_says_what_white_is_as_its_file_does(bits, photometric, tmp_path):
    packed = bytes([0x00, 0x0F, 0xFF]) if bits == 12 else np.array([0, 2**15], np.uint16).tobytes()
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 134), (277, 1), (278, 1), (279, 4)]
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    content += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    file = tmp_path / "deep.tif"
    file.write_bytes(content.ljust(134, b"\0") + packed)
    with Image.open(file) as opened:
        ((_, image),) = each_image(opened)
    assert np.array_equal(image, next(each_image(file))[1])
    assert len(np.unique(image)) == 2


def test_the_masks_of_a_folder_are_no_images(tmp_path):
    for name in ("test/bad/0.png", "ground_truth/bad/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / name)
    assert [name for name, _ in each_image(tmp_path)] == [str(tmp_path / "test/bad/0.png")]
    assert len(list(each_image(tmp_path / "ground_truth"))) == 1


def test_files_are_read_several_at_a_time(tmp_path, monkeypatch):
    for number in range(6):
        Image.fromarray(np.full(SIZE, 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    together = threading.Barrier(2)

    def met(path, max_value):
        together.wait(timeout=20)  # breaks where one thread reads all
        return read_image(path, max_value)

    monkeypatch.setattr(images, "read_image", met)
    detector = Detector(Runtime(lambda batch: {"pred_score": batch.mean((1, 2, 3)) * 255}), SIZE)
    found = detector.score(tmp_path)
    assert found.paths == tuple(str(tmp_path / f"{number}.png") for number in range(6))
    assert found.raw_score == pytest.approx(40 * np.arange(6))


def test_no_more_than_a_batch_is_read_ahead(loaded):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield np.zeros((*SIZE, 3), np.uint8)

    first = next(loaded.score_batches(endless()))
    assert len(first) == len(taken) == 32


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (np.full((8, 8, 3), 200.0), ValueError, r"lie in \[0, 1\]; these run from 200 to 200"),
        (np.full((8, 8), np.nan), ValueError, "pixels that are NaN"),
        (np.zeros((8, 8), np.int64), ValueError, "not of int64"),
        (np.zeros((3, 8, 3), np.uint8), ValueError, r"shape \(3, 8, 3\).*leaves open"),
        (np.zeros((2, 5, 8, 8), np.uint8), ValueError, "no batch of images"),
        (np.zeros((0, 8), np.uint8), ValueError, "no pixels"),
        ("nowhere.png", ValueError, r"Cannot read the image nowhere\.png"),
        (b"no image", ValueError, "Cannot read the image that was given"),
        (7, TypeError, "int is no image"),
    ],
)
def test_what_is_no_image_is_refused(given, error, says):
    with pytest.raises(error, match=says):
        list(each_image(given))


@pytest.mark.parametrize("export_type", ["torch", "onnx", "openvino"])
def test_every_export_decides_as_the_checkpoint_does(export_type, case, expected, folder, monkeypatch):
    runtime = {"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino"}[export_type]
    pytest.importorskip(runtime, reason="ONNX and OpenVINO are the extra anomalib-flowood[export]")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = case.export(export_type)
    for way in (path, path.parent, path.with_suffix(".json")):
        detector = anomalib_flowood.load(way)
    got = detector.score(folder)
    assert got.paths == expected.paths
    np.testing.assert_allclose(got.raw_score, expected.raw_score, rtol=1e-4)
    np.testing.assert_allclose(got.score, expected.score, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-4)
    assert np.array_equal(got.p_value, expected.p_value)
    assert np.array_equal(got.label, expected.label)
    assert np.array_equal(got.p_value, exported.p_values(path, got.raw_score))
    assert detector.drift_p_value(got.raw_score) == exported.drift_p_value(path, got.raw_score)


def test_a_fork_is_told_to_load_an_openvino_model_itself(case, pixels):
    detector = anomalib_flowood.load(case.export("openvino"))
    detector.score(pixels[:1])  # which starts its thread
    child = os.fork()
    if not child:
        try:
            detector.score(pixels[:1])
        except RuntimeError as error:
            os._exit(7 if "load it in this process" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("export_type", ["torch", "openvino"])
def test_an_export_may_be_renamed_beside_another(export_type, case, cases, folder, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    for name, exported_case in (("model", cases("embedding_flow")), ("camera", case)):
        path = exported_case.export(export_type)
        for file in path.parent.glob("model.*"):
            shutil.copy(file, tmp_path / f"{name}{file.suffix}")
    for way in (f"camera{path.suffix}", "camera.json"):
        near(anomalib_flowood.load(tmp_path / way).score(folder), expected)


def test_an_onnx_model_may_be_renamed(case, folder, expected, tmp_path):
    for file in case.export("onnx").parent.iterdir():  # graphs name the file of their weights
        shutil.copy(file, tmp_path / (file.name if file.suffix == ".data" else file.name.replace("model", "camera")))
    near(anomalib_flowood.load(tmp_path).score(folder), expected)


def test_an_onnx_model_without_its_raw_scores_is_refused(case, tmp_path):
    """Its p-values would be of scores in [0, 1], and its calibration is of raw ones."""
    for file in case.export("onnx").parent.glob("model.*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no .*model_raw\.onnx, which belongs to .*model\.json: copy it there"):
        anomalib_flowood.load(tmp_path)


def test_the_description_of_another_export_is_told(case, tmp_path):
    shutil.copytree(case.export("onnx").parent, tmp_path, dirs_exist_ok=True)
    shutil.copy(case.export("openvino").with_suffix(".json"), tmp_path)
    with pytest.raises(ValueError, match=r"model\.json describes a \.xml file, and not .*model\.onnx"):
        anomalib_flowood.load(tmp_path / "model.onnx")


def test_an_export_of_an_earlier_version_is_told(case, tmp_path):
    path = case.export("openvino")
    known = json.loads(path.with_suffix(".json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({name: known[name] for name in known.keys() - {"level"}}))
    shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match=r"model\.json is of an earlier version, without level: export"):
        anomalib_flowood.load(tmp_path)


def test_a_name_that_is_empty_is_not_the_folder_of_the_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("somewhere.png")
    with pytest.raises(FileNotFoundError, match="The name of the images is empty"):
        list(each_image(""))


def test_what_cannot_be_loaded_is_named(case, tmp_path, monkeypatch):
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    with pytest.raises(FileNotFoundError, match="There is no .*nothing"):
        anomalib_flowood.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no exported model"):
        anomalib_flowood.load(tmp_path)
    run = case.export("onnx").parents[1]
    with pytest.raises(FileNotFoundError, match=r"Name one of what lies below it: .*model\.onnx") as refused:
        anomalib_flowood.load(run)
    assert "_raw.onnx" not in str(refused.value)
    with pytest.raises(ValueError, match="TRUST_REMOTE_CODE=1"):
        anomalib_flowood.load(case.export("torch"))
    with pytest.raises(ValueError, match="is loaded for the CPU, not for cuda: load the checkpoint"):
        anomalib_flowood.load(case.export("onnx"), "cuda")
    for name in ("a.xml", "b.onnx", "b_raw.onnx"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"several exported models .*: a\.xml, b\.onnx"):
        anomalib_flowood.load(tmp_path)
    other = tmp_path / "notes.txt"
    other.touch()
    with pytest.raises(ValueError, match="neither a checkpoint"):
        anomalib_flowood.load(other)


def test_the_package_loads_nothing_for_it():
    code = "import sys, anomalib_flowood; sys.exit(any(m in sys.modules for m in ('torch', 'anomalib', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_checkpoint_is_scored_with_on_another_device(case, folder, expected):
    with pretend_device() as device:
        detector = anomalib_flowood.load(case.checkpoint, device)
        near(detector.score(folder), expected)
        near(pickle.loads(pickle.dumps(detector)).score(folder), expected)


def test_a_default_device_of_the_process_is_not_where_a_detector_is_loaded(case, folder, expected):
    torch.set_default_device("meta")  # of which every machine knows; a tensor there has no values
    try:
        near(anomalib_flowood.load(case.checkpoint).score(folder), expected)
    finally:
        torch.set_default_device(None)


def test_commands_score_on_the_device_that_is_named(case, folder, expected, tmp_path, monkeypatch):
    def stopped(seconds):
        if (tmp_path / "watch.csv").read_text().count("\n") > 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", stopped)
    table = ["--output", str(tmp_path / "watch.csv")]
    with pretend_device() as device, pytest.raises(SystemExit, match="130"):
        main(["watch", str(case.checkpoint), str(folder), *table, "--device", device.type])
    with (tmp_path / "watch.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("score", "raw_score", "p_value"):
        np.testing.assert_allclose([float(row[name]) for row in rows], getattr(expected, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("command", ["serve", "watch"])
@pytest.mark.parametrize(
    ("kind", "device", "says"),
    [
        ("checkpoint", "cuda:9", r"PyTorch cannot compute on cuda:9 here \(.+\)\. Name another device, or leave"),
        ("torch", "cuda:9", r"PyTorch cannot compute on cuda:9 here \(.+\)\. Name another device, or leave"),
        ("onnx", "cuda", r"model\.onnx is loaded for the CPU, not for cuda: load the checkpoint"),
        ("checkpoint", "gpu", r"'gpu' is no device of PyTorch's: name cpu, cuda, "),
        ("onnx", "gpu", r"'gpu' is no device of PyTorch's: name cpu, cuda, "),
    ],
)
def test_a_device_that_is_not_there_is_named(command, kind, device, says, case, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = case.checkpoint if kind == "checkpoint" else case.export(kind)
    where = ["--port", "0"] if command == "serve" else [str(tmp_path)]
    with pytest.raises(SystemExit, match="1"):
        main([command, str(path), *where, "--device", device])
    assert re.search(says, capsys.readouterr().err)


def test_a_detector_in_memory_is_scored_with_where_it_is(case, folder, expected):
    module = open_checkpoint(case.checkpoint)
    with pretend_device() as device:
        near(of_module(module.to(device)).score(folder), expected)
        assert module.device == device
