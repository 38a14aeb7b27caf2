# SPDX-License-Identifier: Apache-2.0
"""OpenVINO models that compute in single precision where their CPU would take bfloat16; detectors': test_engine.py."""

import numpy as np
import pytest
import torch
from model_helpers import compile_model, feature_map_flow, lowered_layers, pixel_flow
from torch import nn
from torchvision.transforms.v2 import Normalize

from anomalib_flowood.models.components.pre_processor import AntialiasedResize, ChannelNormalize
from anomalib_flowood.models.components.single_precision import keep_single_precision

ov = pytest.importorskip("openvino", reason="OpenVINO export is the extra anomalib-flowood[export]")
ops = pytest.importorskip("openvino.opset13", reason="OpenVINO export is the extra anomalib-flowood[export]")

RNG = np.random.default_rng(0)


def weights(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def linear(x, inputs, outputs, *, transposed=False):
    matrix = weights(outputs, inputs) if transposed else weights(inputs, outputs)
    return ops.relu(ops.add(ops.matmul(x, matrix, False, transposed), weights(outputs)))


def _rows(x):
    return ops.gather(ops.shape_of(x, output_type="i64"), np.array([0]), np.int64(0))


def lengths(x):
    return ops.clamp(ops.reduce_l2(x, np.array([1]), True), 1e-12, float(np.finfo(np.float32).max))


def of_length_1(x):
    return ops.divide(x, lengths(x))


# Each ends in a convolution, before which OpenVINO lowers whatever it may.
GRAPHS = {
    "linear": ((-1, 24), lambda x: linear(linear(x, 24, 40), 40, 9, transposed=True)),
    "linear_on_tokens": ((-1, -1, 24), lambda x: linear(x, 24, 40)),
    "linear_on_positions": ((-1, 5, -1, 24), lambda x: linear(x, 24, 40, transposed=True)),
    "linear_after_reshape": ((-1, 4, 6), lambda x: linear(ops.reshape(x, np.array([-1, 24]), False), 24, 40)),
    "difference": ((-1, 6, 7), lambda x: ops.subtract(ops.exp(x), ops.abs(ops.sin(x)))),
    "quotient": ((-1, 6, 7), lambda x: ops.divide(ops.sin(x), ops.exp(x))),
    "difference_from_a_linear_one": (
        (-1, 6, 7),
        lambda x: ops.subtract(ops.exp(x), ops.add(ops.multiply(ops.sin(x), np.float32(2)), np.float32(3))),
    ),
    "max_pool": (
        (-1, 2, 12, 10),
        lambda x: ops.max_pool(ops.exp(x), [2, 2], [1, 1], [1, 1], [1, 1], [3, 3], axis=2).output(0),
    ),
    "pad": (
        (-1, 2, 5, 5),
        lambda x: ops.pad(ops.exp(x), np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0]), "constant", np.float32(0)),
    ),
    "unsqueeze": ((-1, 8, -1), lambda x: ops.add(ops.unsqueeze(ops.exp(x), np.array([1, -1])), weights(8, 1, 1))),
    "linear_at_each_position": (
        (-1, 6, 20),
        lambda x: ops.transpose(
            ops.matmul(weights(20, 4, 6), ops.transpose(ops.exp(x), np.array([2, 1, 0])), False, False),
            np.array([2, 1, 0]),
        ),
    ),
    "transpositions_in_a_row": (
        (-1, 6, 5),
        lambda x: ops.matmul(
            weights(5, 4, 6),
            ops.transpose(ops.transpose(ops.exp(x), np.array([0, 2, 1])), np.array([1, 2, 0])),
            False,
            False,
        ),
    ),
    "repetition": (
        (-1, 1, 7),
        lambda x: ops.add(
            ops.broadcast(ops.exp(x), np.array([1, 6, 1]), broadcast_spec="BIDIRECTIONAL"), weights(6, 7)
        ),
    ),
    "repetition_of_constants": (
        (-1, 5),
        lambda x: ops.concat([ops.exp(x), ops.broadcast(weights(1, 4), ops.concat([_rows(x), np.array([4])], 0))], 1),
    ),
    "vectors_of_length_1": ((-1, 6, 7, 5), lambda x: of_length_1(ops.sin(x))),
    "upsampling": (
        (-1, 2, 7, 5),
        lambda x: ops.interpolate(ops.relu(x), np.array([28, 30]), "cubic", "sizes", axes=np.array([2, 3])),
    ),
}


def build(shape, graph):
    images = ops.parameter(ov.PartialShape(list(shape)), np.float32, "input")
    flat = ops.reshape(graph(images), np.array([1, 1, -1]), False)
    return ov.Model([ops.convolution(flat, weights(1, 1, 1), [1], [0], [0], [1])], [images])


@pytest.mark.parametrize("half_weights", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_numbers_are_the_same_and_no_layer_is_lowered(name, half_weights, tmp_path):
    shape, graph = GRAPHS[name]
    path = tmp_path / "model.xml"
    ov.save_model(build(shape, graph), path, compress_to_fp16=half_weights)
    x = RNG.uniform(size=[{0: 3, 1: 11, 2: 19, 3: 33}[axis] if n == -1 else n for axis, n in enumerate(shape)])
    x = x.astype(np.float32)
    before = compile_model(path, "f32")(x)
    keep_single_precision(path, half_weights=half_weights)
    assert {file.name for file in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    for precision in (None, "bf16", "f32"):
        compiled = compile_model(path, precision)
        assert not lowered_layers(compiled)
        np.testing.assert_allclose(compiled(x)[0], before[0], rtol=1e-5, atol=1e-5)


def test_vectors_are_brought_to_one_length_by_one_operation(tmp_path):
    """A power of every number would take fifty times as long."""
    path = tmp_path / "model.xml"
    ov.save_model(build((-1, 6, 7, 5), of_length_1), path, compress_to_fp16=False)
    keep_single_precision(path)
    assert {"NormalizeL2"} == {*layer_types(path)} - {"Parameter", "Constant", "Reshape", "Convolution", "Result"}
    lengths_of_others = build((-1, 6, 7, 5), lambda x: ops.divide(ops.sin(x), lengths(x)))
    ov.save_model(lengths_of_others, path, compress_to_fp16=False)
    keep_single_precision(path)
    assert "NormalizeL2" not in layer_types(path)


def layer_types(path):
    return [node.get_type_name() for node in ov.Core().read_model(path).get_ordered_ops()]


def exported(module, folder, *images):
    """An OpenVINO model of a module, for images of any number and size."""
    path, size = folder / "model.xml", torch.export.Dim.DYNAMIC
    shapes = ({0: size, 2: size, 3: size},)
    torch.onnx.export(module, images, folder / "model.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    ov.save_model(ov.convert_model(folder / "model.onnx"), path, compress_to_fp16=False)
    keep_single_precision(path)
    compiled = compile_model(path, "bf16")
    assert not lowered_layers(compiled)
    return compiled


def test_pixels_are_normalised_by_a_convolution(tmp_path):
    """A sum over channels that are innermost in memory would take seven times as long."""
    normalize = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    images, network = torch.rand(2, 3, 40, 50), nn.Conv2d(3, 2, 3, padding=1).eval()
    compiled = exported(nn.Sequential(ChannelNormalize(normalize), network), tmp_path, images)
    with torch.no_grad():
        expected = network(normalize(images))
    np.testing.assert_allclose(compiled(images.numpy())[0], expected, rtol=1e-5, atol=1e-5)
    types = layer_types(tmp_path / "model.xml")
    assert types.count("Convolution") == 2
    assert not {"Subtract", "Divide", "Multiply"} & {*types}
    assert torch.equal(ChannelNormalize(normalize)(images), normalize(images))


def test_the_antialiased_resize_of_an_export_keeps_its_numbers(tmp_path):
    resize = nn.Sequential(AntialiasedResize((24, 20)), nn.Conv2d(3, 2, 3)).eval()
    compiled = exported(resize, tmp_path, torch.rand(2, 3, 40, 50))
    for height, width in ((24, 20), (100, 31), (13, 640), (1200, 1600)):
        images = torch.rand(2, 3, height, width)
        with torch.no_grad():
            expected = resize(images)
        np.testing.assert_allclose(compiled(images.numpy())[0], expected, rtol=1e-4, atol=1e-5)


def test_names_of_outputs_are_kept(tmp_path):
    path = tmp_path / "model.xml"
    x = ops.parameter(ov.PartialShape([-1, 6]), np.float32, "input")
    product = ops.matmul(x, weights(6, 2), False, False)
    product.output(0).set_names({"pred_score"})
    ov.save_model(ov.Model([product], [x]), path)
    keep_single_precision(path)
    assert compile_model(path, "f32")(np.ones((2, 6), np.float32))["pred_score"].shape == (2, 2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: pixel_flow(mask="horizontal", subnet="highway", coupling_layers=2),
        lambda: feature_map_flow(mask="cycle", subnet="resnet", coupling_layers=1),
        lambda: feature_map_flow(
            backbone="resnet18", map_layers=None, score_layers=None, context="quadrant", coupling_layers=1
        ),
    ],
    ids=["highway", "maps", "resnet18 and quadrants"],
)
def test_no_layer_of_other_networks_is_lowered(build, tmp_path):
    detector = build()
    detector.model.fitted.fill_(True)
    detector.check_exports = False
    assert not lowered_layers(compile_model(detector.to_openvino(tmp_path), "bf16"))
