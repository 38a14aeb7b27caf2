# SPDX-License-Identifier: Apache-2.0
"""Exports in INT8: the backbone is quantised, what follows is not, and the calibration is the export's own."""

import json

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy.export import CompressionType
from model_helpers import DETECTORS, data, engine
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_flowood import OneClass, load
from anomalib_flowood.models.components import export, quantisation

pytest.importorskip("nncf", reason="INT8 export is the extra anomalib-flowood[int8]")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    torch.manual_seed(0)  # of some random backbones eight bits leave little
    detector = DETECTORS["feature_map_flow"](coupling_layers=0)
    module = data(folder)
    run = engine(folder)
    run.fit(detector, datamodule=module)
    before = detector.post_processor.calibration.clone()
    path = run.export(detector, "openvino", export_root=folder, compression_type="int8_ptq", datamodule=module)
    assert torch.equal(detector.post_processor.calibration, before)
    return detector.eval(), module, path


def images_of(loader):
    return torch.cat([batch.image for batch in loader])


def test_images_are_drawn_alike_and_no_other_random_number_is_touched(monkeypatch):
    seeded, state = [], torch.random.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    loader = DataLoader(range(100), shuffle=True, collate_fn=np.array)
    first = [int(number[0]) for number in quantisation._first(loader, 20)]
    assert first != sorted(first)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert [int(number[0]) for number in quantisation._first(loader, 20)] == first
    assert not seeded


@pytest.mark.parametrize("kind", ["int8_ptq", "int8_acq"])
def test_without_images_that_it_is_fitted_to_nothing_is_begun(kind, case, tmp_path):
    with pytest.raises(ValueError, match=rf"{kind} is fitted to training images: name their folder .*--data FOLDER"):
        case[0].to_openvino(tmp_path / "new", compression_type=CompressionType(kind))
    assert not (tmp_path / "new").exists()


def test_quantises_the_backbone_and_nothing_behind_it(case):
    import openvino

    detector, module, path = case
    ops = openvino.Core().read_model(path).get_ordered_ops()
    quantised = {
        target.get_node().get_type_name()
        for op in ops
        if op.get_type_name() == "FakeQuantize"
        for output in op.outputs()
        for target in output.get_target_inputs()
    }
    assert {"Convolution"} <= quantised
    assert "MatMul" not in quantised  # of which densities are made
    images = images_of(module.test_dataloader())
    with torch.no_grad():
        expected = detector.model(detector.pre_processor.transform(images)).pred_score.numpy()
    found = load(path).score(images.numpy()).raw_score
    assert not np.allclose(found, expected, rtol=1e-6)
    normal = torch.cat([batch.gt_label for batch in module.test_dataloader()]).numpy() == 0
    assert np.corrcoef(found, expected)[0, 1] > 0.99
    assert found[normal].max() < found[~normal].min()
    np.testing.assert_allclose(found[normal], expected[normal], rtol=0, atol=5)  # normal ones have a spread of 1


def test_images_of_several_sizes_set_the_ranges(case, tmp_path, monkeypatch):
    import openvino

    detector, _, path = case
    for number in range(12):
        pixels = np.full((40 + 8 * (number % 2), 50, 3), 20 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    monkeypatch.setattr(export, "quantised", lambda _model, _nodes, images: [image.shape for image in images])
    parts = OneClass(tmp_path)
    shapes = detector._compress_ov_model(openvino.Core().read_model(path), CompressionType.INT8_PTQ, parts)
    assert shapes == [(1, 3, *detector.input_size)] * len(parts.train_data)


def test_p_values_and_labels_are_those_of_the_quantised_model(case):
    detector, module, path = case
    known = json.loads(path.with_name("model.json").read_text())
    scorer = load(path)
    validation = scorer.score(images_of(module.val_dataloader()).numpy())
    np.testing.assert_allclose(np.sort(validation.raw_score), known["calibration_scores"], rtol=1e-4)
    assert known["compression"] == "int8_ptq"
    assert len(known["calibration_scores"]) == len(detector.post_processor.calibration)
    scores = scorer.score(images_of(module.test_dataloader()).numpy())
    np.testing.assert_array_equal(scores.label, scores.score > 0.5)


def test_small_weights_are_the_backbones_and_calibrated_on_images_that_nobody_has_read_before(tmp_path):
    """With a folder (`flowood export --compression_type int8 --data FOLDER`) it ended in an AttributeError."""
    import openvino

    detector = DETECTORS["embedding_flow"](coupling_layers=0)
    engine(tmp_path).fit(detector, datamodule=data(tmp_path))
    for number in range(12):
        pixels = np.full((40 + 8 * (number % 2), 50, 3), 20 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    parts = OneClass(tmp_path, val_split_ratio=0.5)
    path = detector.to_openvino(tmp_path, compression_type="int8", datamodule=parts)
    known = json.loads(path.with_suffix(".json").read_text())
    scores = load(path).score([item.image_path for item in parts.val_data]).raw_score
    np.testing.assert_allclose(np.sort(scores), known["calibration_scores"], rtol=1e-4)

    ops = openvino.Core().read_model(path).get_ordered_ops()
    small = [op for op in ops if op.get_type_name() == "Constant" and op.get_output_element_type(0).size == 1]
    behind = {"MatMul": False, "Convolution": False, "GroupConvolution": False}
    for op in small:
        while op.get_type_name() not in behind:
            (op,) = {target.get_node() for target in op.output(0).get_target_inputs()}
        behind[op.get_type_name()] = True
    assert behind == {"MatMul": False, "Convolution": True, "GroupConvolution": True}


def test_what_is_quantised_again_is_fitted_to_the_same_images(tmp_path):
    """An export with a calibration of its own is made twice, and anomalib's splits are drawn at random."""
    (tmp_path / "good").mkdir()
    for number in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / "good" / f"{number:02}.png")
    parts = Folder("parts", "good", root=tmp_path, val_split_mode="from_train", num_workers=0)
    detector, drawn = DETECTORS["embedding_flow"](), []
    for _ in range(2):
        export._set_up(detector, parts)
        drawn.append(list(parts.val_data.samples.image_path))
    assert drawn[0] == drawn[1]


def test_int8_needs_a_backbone(tmp_path):
    detector = DETECTORS["pixel_flow"](max_epochs=1)
    engine(tmp_path).fit(detector, datamodule=data(tmp_path))
    with pytest.raises(ValueError, match=r"INT8 is for backbones, and PixelFlowModel has none"):
        detector.to_openvino(tmp_path / "export", compression_type="int8")
    assert not (tmp_path / "export").exists()
