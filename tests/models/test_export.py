# SPDX-License-Identifier: Apache-2.0
"""Exports: what lies beside them, where they are put, and their own check."""

import json
import os
import shutil
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem, InferenceBatch
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from model_helpers import DETECTORS, data, engine, pixel_flow
from signal_stack import disable_signal_stack, has_signal_stack
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from anomalib_flowood import PixelFlow, exported
from anomalib_flowood.models.components import ConformalPostProcessor, ExportCheckError, export_check, export_images
from anomalib_flowood.models.components.export_check import (
    BOUND,
    Runtime,
    agree,
    check_export,
    compare,
    compare_runtime,
    onnx_runtime,
    openvino_runtime,
)

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def pixels(cases):
    return cases("pixel_flow")


@pytest.fixture(scope="module")
def maps(cases):
    return cases("feature_map_flow")


def strict_json(path):
    def refuse(constant):
        msg = f"{path} holds {constant}, which is not JSON"
        raise ValueError(msg)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def raw_scores(case, export_type, images):
    """As docs/export.md says."""
    path = case.export(export_type)
    if export_type == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is the extra anomalib-flowood[export]")
        session = onnxruntime.InferenceSession(path.with_name("model_raw.onnx"))
        return session.run(["raw_score"], {"input": images.numpy()})[0]
    if export_type == "openvino":
        openvino = pytest.importorskip("openvino", reason="OpenVINO export is the extra anomalib-flowood[export]")
        core = openvino.Core()
        model = core.read_model(path)
        model.add_outputs("raw_score")
        return core.compile_model(model, "CPU", EXACT)(images.numpy())["raw_score"]
    return torch.load(path, weights_only=False)["model"].raw_scores(images).numpy()


@pytest.mark.parametrize("export_type", ["torch", "onnx", "openvino"])
def test_an_export_gives_raw_scores_and_all_decisions(export_type, maps):
    detector, images = maps.detector, torch.rand(6, 3, 50, 37)
    found = raw_scores(maps, export_type, images)
    checked = f"Check of {maps.export(export_type)}: largest differences from PyTorch on 10 normal images"
    assert checked in maps.said(export_type)
    with torch.no_grad():
        raw = detector.model(detector.pre_processor.transform(images)).pred_score
    np.testing.assert_allclose(found, raw, rtol=1e-4)

    path, post_processor = maps.export(export_type), detector.post_processor
    known = strict_json(path.with_name("model.json"))
    assert known == exported.read_description(path)
    assert known["class"] == "anomalib_flowood.FeatureMapFlow"
    assert known["image_size"] == [48, 48]
    assert known["pre_processing"]["init_args"]["transforms"][0]["init_args"]["size"] == [48, 48]
    assert (known["score"], known["alpha"]) == ("nll", 0.05)
    assert known["outputs"] == ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
    assert torch.equal(torch.tensor(known["calibration_scores"]), post_processor.calibration)
    assert known["threshold"] == float(post_processor.image_threshold)
    assert {"anomalib-flowood", "anomalib", "torch"} <= set(known["versions"])
    assert known["check"]["passed"]
    assert all(value <= BOUND for value in known["check"]["largest_differences"].values())

    scores = np.concatenate([post_processor.calibration[::3].numpy(), [np.inf, -np.inf, 0.0]]).astype(np.float32)
    p_values = exported.p_values(path, scores)
    assert np.array_equal(p_values, post_processor.p_values(torch.tensor(scores)))
    assert exported.drift_p_value(path, scores) == post_processor.drift_p_value(torch.tensor(scores))


@pytest.mark.parametrize("export_type", ["onnx", "openvino"])
def test_anomalibs_openvino_inferencer_predicts(export_type, maps, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="OpenVINO export is the extra anomalib-flowood[export]")
    path = maps.export(export_type)
    monkeypatch.chdir(tmp_path)  # where the inferencer puts its cache
    image = torch.rand(1, 3, 40, 50)
    got = OpenVINOInferencer(path, device="CPU", config=EXACT).predict(image)
    with torch.no_grad():
        want = maps.detector(image)
    np.testing.assert_allclose(got.pred_score, want.pred_score, rtol=1e-4)
    # Noise is off by thousands of deviations, between which single precision leaves less of a pixel.
    np.testing.assert_allclose(got.anomaly_map.squeeze(), want.anomaly_map.squeeze(), rtol=1e-4, atol=1e-4)
    assert np.array_equal(got.pred_label, want.pred_label)
    assert np.array_equal(got.pred_mask.squeeze(), want.pred_mask.squeeze())


def test_anomalibs_torch_inferencer_predicts(maps, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    image = torch.rand(3, 40, 50)
    got = TorchInferencer(maps.export("torch"), device="cpu").predict(image)
    with torch.no_grad():
        assert torch.equal(got.pred_score, maps.detector(image[None]).pred_score)


# -- the check ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_a_fit_keeps_a_few_normal_validation_images(name, cases):
    case = cases(name)
    size = case.detector.input_size
    for detector in (case.detector, type(case.detector).load_from_checkpoint(case.checkpoint)):
        assert detector.check_images.shape == (5, 3, *size)
        assert detector.check_images.dtype == torch.uint8
    module = data(case.folder)
    module.setup()
    images = torch.stack([module.val_data[row].image for row in range(5)])
    resized = Resize(size, antialias=True)(images)
    assert (case.detector.check_images / 255 - resized).abs().max() <= 0.5 / 255 + 1e-6


def test_only_normal_images_of_any_size_are_kept():
    sizes = [(9, 9), (12, 20), (7, 7), (16, 8), (10, 11)]
    items = [ImageItem(image=torch.full((3, *size), 0.1 * n), gt_label=n % 2) for n, size in enumerate(sizes)]
    images = list(export_images._normal_images(DataLoader(items, batch_size=4, collate_fn=ImageBatch.collate), 2))
    assert [tuple(image.shape) for image in images] == [(3, 9, 9), (3, 7, 7)]


def test_keeping_images_changes_no_training(pixels, tmp_path, monkeypatch):
    weights = []
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(export_images, "_image_loader", lambda trainer: None)
        torch.manual_seed(0)
        detector = pixel_flow(max_epochs=1)
        engine(tmp_path).fit(detector, datamodule=data(tmp_path))
        assert (detector.check_images is not None) == keeps
        weights.append(detector.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_an_export_that_resizes_otherwise_is_an_error(pixels, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="ONNX export is the extra anomalib-flowood[export]")
    detector = PixelFlow.load_from_checkpoint(pixels.checkpoint)
    detector.pre_processor.export_transform = Resize((12, 12), antialias=False)  # as anomalib exports it
    with pytest.raises(ExportCheckError, match=r"model.onnx gives other scores than PyTorch.*`--no-check`"):
        detector.to_onnx(tmp_path)
    assert strict_json(tmp_path / "weights" / "onnx" / "model.json")["check"]["passed"] is False
    assert "raw score" in capsys.readouterr().out


def test_an_unchecked_export_is_not_checked(pixels, tmp_path, capsys):
    detector = PixelFlow.load_from_checkpoint(pixels.checkpoint)
    detector.check_exports = False
    path = detector.to_torch(tmp_path)
    assert "check" not in strict_json(path.with_name("model.json"))
    assert "Check of" not in capsys.readouterr().out


def test_what_cannot_be_checked_is_exported_and_says_so(pixels, maps, tmp_path, monkeypatch, capsys):
    checkpoint = torch.load(pixels.checkpoint, weights_only=True)
    del checkpoint["anomalib_flowood_check_images"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    old = PixelFlow.load_from_checkpoint(tmp_path / "old.ckpt")
    assert old.to_torch(tmp_path).exists()
    assert "nothing could be checked, for the detector keeps no normal images" in capsys.readouterr().out

    for export_type, runtime in {ExportType.ONNX: "onnxruntime", ExportType.OPENVINO: "openvino"}.items():
        monkeypatch.setitem(sys.modules, runtime, None)
        assert check_export(maps.detector, tmp_path / "model", export_type, None) == {"images": 0}
        assert f"nothing could be checked, for {runtime} is not installed" in capsys.readouterr().out


def test_the_check_says_where_openvinos_default_precision_differs(maps, monkeypatch, capsys, caplog):
    pytest.importorskip("openvino", reason="OpenVINO export is the extra anomalib-flowood[export]")
    path, runtime = maps.export("openvino"), export_check.openvino_runtime
    capsys.readouterr()

    def coarse(path, *, raw, precision="f32"):
        exact = runtime(path, raw=raw)
        if precision is not None:
            return exact
        return Runtime(lambda images: {**exact.run(images), "raw_score": exact.run(images)["raw_score"] * 1.01})

    monkeypatch.setattr(export_check, "openvino_default_precision", lambda: "bf16")
    monkeypatch.setattr(export_check, "openvino_runtime", coarse)
    found = check_export(maps.detector, path, ExportType.OPENVINO, None)
    assert found["passed"]  # which single precision decides
    assert found["default_precision"]["name"] == "bf16"
    assert found["default_precision"]["largest_differences"]["raw_score"] == pytest.approx(0.01, rel=0.01)
    said = " ".join((capsys.readouterr().out + caplog.text).split())
    assert "OpenVINO computes in bf16 on this machine" in said
    assert '{"INFERENCE_PRECISION_HINT": "f32"}' in said


def test_what_rounding_does_is_not_held_against_an_export(pixels):
    detector = PixelFlow.load_from_checkpoint(pixels.checkpoint).eval()
    (images,) = islice(export_check.batches(detector.check_images, (None, 3, None, None)), 1)
    center = float(detector.raw_scores(images).median())
    detector.post_processor.calibrate(center * (1 + torch.linspace(-1e-6, 1e-6, 40)))  # a few steps of float32

    def moved(step):
        return compare_runtime(
            detector, Runtime(lambda images: export_check.reference(detector, torch.tensor(images), step))
        )

    differences, count, kept = moved(2e-7)
    assert kept
    assert differences["pred_score"] > BOUND
    assert count == 10
    assert not moved(1e-3)[2]
    fixed = list(export_check.batches(detector.check_images, (3, 3, 8, 8)))
    assert [tuple(batch.shape) for batch in fixed] == [(3, 3, 8, 8)] * 2


def test_a_score_that_passes_through_zero_has_the_rounding_of_its_terms():
    scores = torch.tensor([0.04, -0.0003, 0.0])
    processor = ConformalPostProcessor()
    processor.calibrate(torch.linspace(-0.0004, 0.0004, 40))
    detector = SimpleNamespace(
        dtype=torch.float32,
        device=torch.device("cpu"),
        pre_processor=None,
        model=lambda images: InferenceBatch(pred_score=images.flatten(1).mean(1)),
        post_processor=processor,
    )
    images = scores[:, None, None, None].expand(3, 3, 4, 4)
    expected = export_check.reference(detector, images)
    slack = export_check.rounding(detector, images, expected, pixels=False)

    def within(error):
        got = {**expected, "raw_score": expected["raw_score"] + np.float32(error)}
        batch = processor(InferenceBatch(pred_score=torch.tensor(got["raw_score"])))
        return agree(compare({**got, "pred_score": batch.pred_score.numpy()}, expected, slack))

    assert within(0)
    assert within(5e-7)  # what ONNX Runtime was off by
    assert within(-5e-7)
    assert not within(1e-5)
    assert not within(-1e-5)


@pytest.mark.parametrize(("compression", "images"), [(None, 10), ("int8_ptq", 5)])
def test_a_compressed_model_is_compared_in_its_own_size(compression, images, pixels, tmp_path, monkeypatch, capsys):
    detector = PixelFlow.load_from_checkpoint(pixels.checkpoint).eval()
    sizes = set()

    def run(given):
        sizes.add(given.shape[-2:])
        return export_check.reference(detector, torch.tensor(given))

    monkeypatch.setattr(export_check, "onnx_runtime", lambda path: Runtime(run))
    found = check_export(detector, tmp_path / "model.onnx", ExportType.ONNX, compression)
    own = tuple(detector.check_images.shape[-2:])
    assert found["images"] == images
    assert (sizes == {own}) == (compression is not None)
    of = " of {} x {} pixels".format(*own) if compression else ""
    assert f"on {images} normal images{of}: " in capsys.readouterr().out


def test_a_pixel_between_two_levels_may_go_either_way(pixels):
    detector = PixelFlow.load_from_checkpoint(pixels.checkpoint).eval()
    images = torch.full((1, 3, 12, 12), 0.4)
    images[..., 3:9, 3:9] = (100.5 + 3e-5) / 255
    expected = export_check.reference(detector, images)
    got = export_check.reference(detector, images - 6e-5 / 255)
    slack = {pixels: export_check.rounding(detector, images, expected, pixels=pixels) for pixels in (True, False)}
    assert compare(got, expected)["raw_score"] > BOUND
    assert agree(compare(got, expected, slack[True]))
    assert not agree(compare(got, expected, slack[False]))


def test_weights_of_64_bits_are_checked_too(pixels, tmp_path):
    detector = PixelFlow.load_from_checkpoint(pixels.checkpoint).double()
    known = strict_json(detector.to_torch(tmp_path).with_name("model.json"))
    assert known["check"]["largest_differences"]["raw_score"] == 0


def test_differences():
    inf, nan = np.inf, np.nan
    raw = np.array([-1.68, 2.0, inf])
    expected = {
        "pred_score": np.array([0.2, 0.5, 1.0]),
        "pred_label": np.array([False, False, True]),
        "raw_score": raw,
    }
    same = compare(expected, expected)
    assert same == {"raw_score": 0, "pred_score": 0, "labels": 0}
    assert agree(same)
    # A calibration image is the threshold: its label is a matter of rounding.
    rounded = {**expected, "pred_score": np.array([0.2, 0.5 + 6e-8, 1.0]), "pred_label": np.array([False, True, True])}
    assert agree(compare(rounded, expected))
    assert compare({**expected, "pred_label": np.array([True, False, True])}, expected)["labels"] == 1
    assert compare({**expected, "raw_score": raw + 1e-3}, expected)["raw_score"] == pytest.approx(5e-4)
    for broken in (nan, 1e30):
        assert compare({**expected, "raw_score": np.array([-1.68, 2.0, broken])}, expected)["raw_score"] == inf
    assert not agree(compare({**expected, "pred_score": np.array([nan, 0.5, 1.0])}, expected))


# -- places ------------------------------------------------------------------------------------------------------


def test_exports_of_two_runs_lie_beside_their_checkpoints(pixels, tmp_path):
    run = engine(tmp_path)
    run.fit(pixel_flow(max_epochs=1), datamodule=data(tmp_path))
    runs = [pixels.checkpoint, Path(run.trainer.checkpoint_callback.best_model_path)]
    for checkpoint in runs:
        root = checkpoint.parents[6]
        assert root.name == "results"
        path = engine(root.parent).export(pixel_flow(), "torch", ckpt_path=checkpoint)
        assert path == checkpoint.parents[1] / "torch" / "model.pt"
        assert not (root / "weights").exists()
    named = engine(tmp_path).export(pixel_flow(), "torch", export_root=tmp_path, ckpt_path=runs[1])
    assert named == tmp_path / "weights" / "torch" / "model.pt"


def test_the_export_of_another_model_is_not_replaced(pixels, maps, tmp_path):
    path = pixels.detector.to_torch(tmp_path)
    before = path.read_bytes()
    again = PixelFlow.load_from_checkpoint(pixels.checkpoint)
    again.post_processor.alpha = 0.2
    again.to_torch(tmp_path)  # the same weights
    assert exported.read_description(path)["alpha"] == 0.2
    before = path.read_bytes()
    with torch.no_grad():
        next(again.model.flow.parameters()).mul_(1.001)
    for other in (maps.detector, again):
        with pytest.raises(
            ValueError, match=r"model.pt is the export of another model \(anomalib_flowood.PixelFlow, by its"
        ):
            other.to_torch(tmp_path)
    assert path.read_bytes() == before
    assert maps.detector.to_torch(tmp_path, "maps").with_name("maps.json").exists()

    path.with_name("model.json").unlink()
    with pytest.raises(ValueError, match=r"model.pt is there already, and without a model.json"):
        pixels.detector.to_torch(tmp_path)


def test_every_kind_of_export_looks_first(pixels, tmp_path):
    for export_type, name in {"onnx": "model.onnx", "openvino": "model.xml"}.items():
        there = tmp_path / "weights" / export_type / name
        there.parent.mkdir(parents=True)
        there.touch()
        with pytest.raises(ValueError, match=f"{name} is there already"):
            engine(tmp_path).export(pixels.detector, export_type, export_root=tmp_path)
        assert there.stat().st_size == 0


# -- model.json --------------------------------------------------------------------------------------------------


def test_what_is_no_description_is_one_clear_error(tmp_path):
    path = tmp_path / "model.json"
    with pytest.raises(FileNotFoundError, match=r"There is no .*model.json"):
        exported.p_values(tmp_path / "model.xml", [0.0])
    for text, message in [
        ("{", "is not valid JSON"),
        ("[1]", "does not describe an export"),
        ("{}", "does not describe"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            exported.p_values(path, [0.0])
    path.write_text(json.dumps({"identity": "", "calibration_scores": []}))
    with pytest.raises(ValueError, match="exported without calibration scores"):
        exported.p_values(path, [0.0])
    path.write_text(json.dumps({"identity": "", "calibration_scores": [1, 2, 3]}))
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        exported.p_values(path, [0.0, float("nan")])
    assert exported.p_values(path, [[2.5, 0.0]]).tolist() == [[0.5, 1.0]]


def test_without_a_calibration_the_score_is_raw(tmp_path):
    detector = pixel_flow(max_epochs=1)
    run = engine(tmp_path, limit_val_batches=0)
    run.fit(detector, datamodule=data(tmp_path))
    assert len(detector.check_images) == 5  # of the training images
    known = strict_json(detector.to_torch(tmp_path).with_name("model.json"))
    assert (known["threshold"], known["calibration_scores"], known["outputs"]) == (None, [], ["pred_score"])


@pytest.mark.skipif(sys.platform != "linux", reason="stacks for signals are asked for in Linux's way")
def test_the_check_leaves_the_stack_for_signals_alone(maps):
    """OpenVINO gives the thread that it computes on one and frees it, and the next signal would end the process."""
    disable_signal_stack()
    openvino_runtime(maps.export("openvino"), raw=True).run(np.zeros((2, 3, 48, 48), np.float32))
    assert not has_signal_stack()


def test_an_image_alone_has_a_graph_for_its_size_and_the_same_scores(maps):
    runtime = openvino_runtime(maps.export("openvino"), raw=True)
    images = np.random.default_rng(0).random((3, 3, 48, 48), dtype=np.float32)
    larger = np.random.default_rng(1).random((1, 3, 60, 52), dtype=np.float32)
    together, other = runtime.run(images), openvino_runtime(maps.export("openvino"), raw=True).run(larger)
    for _ in range(2):
        alone = [runtime.run(image[None]) for image in images]
        for name, value in together.items():
            np.testing.assert_allclose(np.concatenate([one[name] for one in alone]), value, rtol=1e-5, atol=1e-5)
        for name, value in runtime.run(larger).items():
            np.testing.assert_allclose(value, other[name], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processors are allotted in Linux's way")
def test_onnx_runtime_has_no_threads_for_processors_that_are_not_allotted(maps):
    path, allotted = maps.export("onnx"), os.sched_getaffinity(0)
    threads = Path("/proc/self/task")
    before = len(list(threads.iterdir()))
    try:
        os.sched_setaffinity(0, {min(allotted)})
        runtime = onnx_runtime(path)
        until = time.monotonic() + 5  # threads of others may begin meanwhile, and end; those of a session stay
        while len(list(threads.iterdir())) > before and time.monotonic() < until:
            time.sleep(0.05)
        assert len(list(threads.iterdir())) <= before
    finally:
        os.sched_setaffinity(0, allotted)
    assert np.isfinite(runtime.run(np.zeros((2, 3, 48, 48), np.float32))["raw_score"]).all()


def test_activations_are_traced_out_of_place_and_work_in_place_again(maps, tmp_path, monkeypatch):
    def trace(model, args, f, **_):  # what takes long is left out
        with monkeypatch.context() as patched:
            patched.setattr(torch.compiler, "is_compiling", lambda: True)
            model(*args)
        shutil.copy(maps.export("onnx"), f)

    in_place = [part for part in maps.detector.modules() if getattr(part, "inplace", False)]
    traced = [part.register_forward_hook(lambda part, *_: seen.append(part.inplace)) for part in in_place]
    seen = []
    maps.export("onnx")
    monkeypatch.setattr(torch.onnx, "export", trace)
    maps.detector._graph(tmp_path, "model", maps.detector.input_size)
    for hook in traced:
        hook.remove()
    assert set(seen) == {False}
    assert all(part.inplace for part in in_place)
