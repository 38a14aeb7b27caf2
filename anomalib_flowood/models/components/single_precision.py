# SPDX-License-Identifier: Apache-2.0
"""OpenVINO models that compute in single precision on every CPU.

OpenVINO's CPU plugin computes in bfloat16 where the processor supports it, unless whoever compiles the model says
otherwise. An anomaly score is a small difference of large numbers, for which eight bits of mantissa are too few. A
model file cannot set a precision, but each of its nodes can: the attribute ``precise``, which excludes a node from half
precision, also excludes it from bfloat16. A node that the plugin rewrites into others loses the attribute, so such
nodes are replaced here beforehand by equivalent ones that the plugin leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np


def keep_single_precision(path: Path, *, half_weights: bool = False) -> None:
    """Rewrite an OpenVINO model so that its nodes keep single precision when it is compiled.

    Args:
        path: The model's ``.xml``, with its ``.bin`` beside it; both are overwritten.
        half_weights: Whether the model stores its weights in half precision, and is to keep doing so.
    """
    import openvino as ov

    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file is overwritten below
    model = core.read_model(path)
    for node in model.get_ordered_ops():
        replace = _REPLACEMENTS.get(node.get_type_name())
        single = node.get_output_size() > 0 and node.get_output_element_type(0) == ov.Type.f32
        new = replace(node) if replace and single else None
        if new is not None:
            new.set_friendly_name(node.get_friendly_name())
            names = node.output(0).get_names()
            node.output(0).replace(new.output(0))
            new.output(0).add_names(names)
    model.validate_nodes_and_infer_types()
    ov.save_model(model, path, compress_to_fp16=half_weights)
    _mark(path)


def _mark(path: Path) -> None:
    """Set the attribute of every node in the file, since OpenVINO's Python API cannot."""
    tree = ET.parse(path)  # noqa: S314  # OpenVINO has just written it
    for layer in tree.getroot().findall("layers/layer"):
        information = layer.find("rt_info")
        if information is None:
            information = ET.Element("rt_info")
            layer.insert(0 if layer.find("data") is None else 1, information)
        if information.find("attribute[@name='precise']") is None:  # nodes with half-precision weights have it already
            ET.SubElement(information, "attribute", name="precise", version="0")
    tree.write(path, xml_declaration=True)


def _subtract(node: Any) -> Any:
    """Two additions for a subtraction, which the plugin would turn into an addition and a negation."""
    from openvino import opset13 as ops

    value, subtracted = node.input_values()
    # The factor -0.5 must not be a constant: the plugin would fuse it with the constants of preceding products and sums
    # into nodes without the attribute.
    half = ops.multiply(subtracted, ops.clamp(subtracted, -0.5, -0.5))
    return ops.add(ops.add(value, half), half)


def _divide(node: Any) -> Any:
    """A product with the inverse, into which the plugin would turn a division; the exponent must not be a constant."""
    from openvino import opset13 as ops

    value, divisor = node.input_values()
    normalized = _normalize_l2(value, divisor.get_node())
    if normalized is not None:
        return normalized
    if divisor.get_node().get_type_name() == "Constant":
        return ops.multiply(value, np.float32(1) / divisor.get_node().data)
    return ops.multiply(value, ops.power(divisor, ops.clamp(divisor, -1, -1)))


def _normalize_l2(value: Any, divisor: Any) -> Any:
    """OpenVINO's L2 normalisation for maps that are divided by the lengths of their channel vectors; else ``None``.

    The product with a power, which other divisions become, would compute the power for every channel.
    """
    from openvino import opset13 as ops

    if divisor.get_type_name() != "Clamp" or value.get_partial_shape().rank.get_length() != 4:
        return None
    length, least = divisor.input_value(0).get_node(), divisor.get_attributes()["min"]
    if length.get_type_name() != "ReduceL2" or length.input_value(0) != value or not least > 0:
        return None
    axes, kept = length.input_value(1).get_node(), length.get_attributes()["keep_dims"]
    if not kept or axes.get_type_name() != "Constant" or axes.data.ravel().tolist() != [1]:
        return None
    return ops.normalize_l2(value, np.array([1]), max(least**2, float(np.finfo(np.float32).tiny)), "max")


def _max_pool(node: Any) -> Any:
    """The older version of max pooling, to which the plugin converts the newer one; that can also return indices."""
    from openvino import opset1 as ops

    options = node.get_attributes()
    dilated = any(step != 1 for step in options.pop("dilations", ()))
    if dilated or (node.get_output_size() > 1 and node.output(1).get_target_inputs()):
        return None
    kept = ("strides", "pads_begin", "pads_end", "rounding_type", "auto_pad")
    return ops.max_pool(node.input_value(0), kernel_shape=options["kernel"], **{name: options[name] for name in kept})


def _pad(node: Any) -> Any:
    """The older version of padding, to which the plugin converts the newer one; that can also crop."""
    from openvino import opset1 as ops

    value, begin, end, *fill = node.input_values()
    widths = [width.get_node() for width in (begin, end)]
    if any(width.get_type_name() != "Constant" or (width.data < 0).any() for width in widths):
        return None
    return ops.pad(value, begin, end, node.get_attributes()["pad_mode"], *fill)


def _unsqueeze(node: Any) -> Any:
    """A reshape for an unsqueeze."""
    from openvino import opset13 as ops

    axes = node.input_value(1).get_node()
    if axes.get_type_name() != "Constant":
        return None
    rank = node.get_output_partial_shape(0).rank.get_length()
    added = {int(axis) % rank for axis in np.atleast_1d(axes.data)}
    lengths = ops.shape_of(node.input_value(0), output_type="i64")
    kept = iter(range(rank - len(added)))
    shape = [
        np.array([1]) if axis in added else ops.gather(lengths, np.array([next(kept)]), np.int64(0))
        for axis in range(rank)
    ]
    return ops.reshape(node.input_value(0), ops.concat(shape, 0), special_zero=False)


def _broadcast(node: Any) -> Any:
    """A product with ones of that shape, broadcast as integers: the plugin rewrites a broadcast of floats."""
    from openvino import opset13 as ops

    value, shape = node.input_values()[:2]
    if node.get_attributes()["mode"] not in ("numpy", "bidirectional") or node.get_input_size() > 2:
        return None
    ones = ops.broadcast(np.int32(1), shape, broadcast_spec="NUMPY")
    return ops.multiply(value, ops.convert(ones, "f32"))


def _matmul(node: Any) -> Any:
    """A 1 x 1 convolution for a product with a constant matrix."""
    from openvino import opset13 as ops

    matrix = node.input_value(1).get_node()
    if matrix.get_type_name() == "Convert":  # weights stored in half precision
        matrix = matrix.input_value(0).get_node()
    attributes = node.get_attributes()
    if matrix.get_type_name() != "Constant" or matrix.data.ndim != 2 or attributes["transpose_a"]:
        return None
    weights = matrix.data if attributes["transpose_b"] else matrix.data.T
    outputs, inputs = weights.shape
    source = node.input_value(0)
    rank = source.get_partial_shape().rank.get_length()
    leading = None
    if rank > 2:
        leading = ops.gather(ops.shape_of(source, output_type="i64"), np.arange(rank - 1), np.int64(0))
    while source.get_node().get_type_name() == "Reshape":  # the plugin would merge two reshapes in a row
        source = source.get_node().input_value(0)
    columns = ops.reshape(source, np.array([-1, inputs, 1, 1]), special_zero=False)
    kernel = np.ascontiguousarray(weights, dtype=np.float32)[:, :, None, None]
    product = ops.convolution(columns, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    shape = np.array([-1, outputs]) if leading is None else ops.concat([leading, np.array([outputs])], 0)
    return ops.reshape(product, shape, special_zero=False)


def _interpolate(node: Any) -> Any:
    """The older version of interpolation, to which the plugin converts the newer one."""
    from openvino import opset10 as ops

    options = node.get_attributes()
    if options["shape_calculation_mode"] != "sizes" or "pillow" in options["mode"]:
        return None
    image, size, *axes = node.input_values()
    scales = np.ones(size.get_partial_shape()[0].get_length(), dtype=np.float32)  # not read in this mode
    return ops.interpolate(image, size, scales, axes=axes[0] if axes else None, **options)


def _resize(node: Any) -> Any:
    """OpenVINO's antialiased resize for that of `AntialiasedResize`: ``(columns @ (rows @ images).mT).mT``."""
    from openvino import opset13 as ops

    outer = node.input_value(0).get_node()
    inner = outer.input_value(1).get_node() if outer.get_type_name() == "MatMul" else outer
    if outer is inner or inner.get_type_name() != "MatMul":
        return None
    images = inner.input_value(1)
    shape = node.get_output_partial_shape(0)
    if shape.rank.get_length() != 4 or not (shape[2].is_static and shape[3].is_static):
        return None
    if not all(_depends_on_size(product.input_value(0), images) for product in (inner, outer)):
        return None
    size = np.array([shape[2].get_length(), shape[3].get_length()])
    return ops.interpolate(images, size, "bilinear_pillow", "sizes", axes=np.array([2, 3]))


def _transpose(node: Any) -> Any:
    """One transposition for two in a row, which the plugin would merge."""
    from openvino import opset13 as ops

    inner = node.input_value(0).get_node()
    if inner.get_type_name() != "Transpose":
        return _resize(node)
    orders = [each.input_value(1).get_node() for each in (inner, node)]
    if any(order.get_type_name() != "Constant" or not order.data.size for order in orders):
        return None
    first, second = (order.data.astype(np.int64) for order in orders)
    return ops.transpose(inner.input_value(0), first[second])


def _depends_on_size(value: Any, images: Any) -> bool:
    """Whether a value is computed from the shape of the images and constants only."""
    pending, seen = [value], set()
    while pending:
        node = pending.pop().get_node()
        if node.get_friendly_name() in seen or (node.get_type_name() == "ShapeOf" and node.input_value(0) == images):
            continue
        if not node.input_values() and node.get_type_name() != "Constant":
            return False
        seen.add(node.get_friendly_name())
        pending += node.input_values()
    return True


_REPLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "Subtract": _subtract,
    "Divide": _divide,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Unsqueeze": _unsqueeze,
    "Broadcast": _broadcast,
    "MatMul": _matmul,
    "Interpolate": _interpolate,
    "Transpose": _transpose,
}
