# SPDX-License-Identifier: Apache-2.0
"""anomalib's ways to predict, on checkpoints and exports of every detector: they run, and give the scores of `load`.

What its scripts do (``tools/inference`` of its repository, which its package does not have) is done here by the
functions of anomalib that they call.
"""

import functools
import json

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import PredictDataset
from anomalib.data.utils import generate_output_image_filename, get_image_filenames, read_image
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.visualization import visualize_image_item
from anomalib.visualization.image.functional import overlay_image, visualize_anomaly_map, visualize_mask
from model_helpers import DETECTORS
from PIL import Image
from torch.utils.data import DataLoader

import anomalib_flowood

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
EXPORTS = ("torch", "openvino")
"""`model.onnx` for the inferencer of OpenVINO: `tests/models/test_export.py`."""
SIZE = (41, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs of another size than the detectors'."""
    folder = tmp_path_factory.mktemp("images")
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(params=DETECTORS)
def case(request, cases):
    return cases(request.param)


@pytest.fixture
def inferencer(monkeypatch, tmp_path):
    """As anomalib's scripts choose one, by the file."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)  # where that of OpenVINO puts its cache

    def of(path):
        if path.suffix == ".pt":
            return TorchInferencer(path, device="cpu")
        pytest.importorskip("openvino", reason="OpenVINO export is the extra anomalib-flowood[export]")
        return OpenVINOInferencer(path, device="CPU", config=EXACT)

    return of


def close(got, want):
    # A relative difference of raw scores, where rounding is what is left (docs/export.md, the check).
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("export_type", EXPORTS)
def test_an_inferencer_gives_the_scores_of_load(export_type, case, folder, inferencer):
    path = case.export(export_type)
    want = anomalib_flowood.load(case.checkpoint).score(folder)
    model = inferencer(path)
    for row, file in enumerate(sorted(folder.iterdir())):
        image = Image.open(file)
        pixels = np.asarray(image)
        ways = (file, str(file), image, pixels, torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1))
        for given in ways:
            found = model.predict(given)
            close(found.pred_score, want.score[row : row + 1])
            assert np.array_equal(found.pred_label, want.label[row : row + 1])
            if want.anomaly_map is None:
                assert found.anomaly_map is None
            else:
                close(found.anomaly_map.squeeze(), want.anomaly_map[row])


@pytest.mark.parametrize("export_type", EXPORTS)
def test_pictures_of_its_scripts_are_drawn(export_type, case, folder, inferencer, tmp_path):
    model = inferencer(case.export(export_type))
    for file in get_image_filenames(folder):
        item = model.predict(read_image(file, as_tensor=export_type == "torch")).items[0]
        picture = visualize_image_item(
            item, fields=["image"], overlay_fields=[("image", ["anomaly_map"]), ("image", ["pred_mask"])]
        )
        picture.save(generate_output_image_filename(input_path=file, output_path=tmp_path / "pictures"))
    assert [file.name for file in sorted((tmp_path / "pictures").rglob("*.png"))] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("export_type", EXPORTS)
def test_its_gradio_app_draws_what_has_a_map(export_type, case, folder, inferencer):
    image = Image.open(folder / "0.png")
    found = inferencer(case.export(export_type)).predict(image)
    if case.detector.model(torch.rand(1, 3, *case.detector.input_size)).anomaly_map is None:
        with pytest.raises(AttributeError):  # The app takes it for granted that there is a map: docs/export.md.
            visualize_anomaly_map(found.anomaly_map)
        return
    drawn = [visualize_anomaly_map(found.anomaly_map), visualize_mask(found.pred_mask, mode="contour")]
    assert [overlay_image(base=image, overlay=overlay).size for overlay in drawn] == [SIZE[::-1]] * 2


def test_its_lightning_script_gives_the_scores_of_load(case, folder, tmp_path):
    want = anomalib_flowood.load(case.checkpoint).score(folder)
    settings = torch.load(case.checkpoint, weights_only=True)["hyper_parameters"]
    detector = type(case.detector)(**settings)
    data = PredictDataset(path=folder)
    loader = DataLoader(data, collate_fn=data.collate_fn)
    run = Engine(default_root_dir=tmp_path, devices=1, accelerator="cpu", enable_progress_bar=False)
    batches = run.predict(detector, dataloaders=[loader], ckpt_path=case.checkpoint)
    close(torch.cat([batch.pred_score for batch in batches]), want.score)
    close(torch.cat([batch.p_value for batch in batches]), want.p_value)
    assert [path for batch in batches for path in batch.image_path] == list(want.paths)


def test_anomalib_predict_gives_the_scores_of_load(case, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = torch.load(case.checkpoint, weights_only=True)["hyper_parameters"]
    config = tmp_path / "detector.json"
    name = f"anomalib_flowood.{type(case.detector).__name__}"
    config.write_text(json.dumps({"model": {"class_path": name, "init_args": settings}}))
    found = []
    monkeypatch.setattr(Engine, "predict", _keeping(found, Engine.predict))
    command = ["predict", "--config", str(config), "--data", str(folder), "--ckpt_path", str(case.checkpoint)]
    command += ["--return_predictions", "true"]
    AnomalibCLI([*command, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"])
    want = anomalib_flowood.load(case.checkpoint).score(folder)
    close(torch.cat([batch.pred_score for batch in found[0]]), want.score)


def _keeping(found, predict):
    @functools.wraps(predict)  # the command line has its arguments
    def kept(*args, **kwargs):
        found.append(predict(*args, **kwargs))
        return found[-1]

    return kept
