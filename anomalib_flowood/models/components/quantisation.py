# SPDX-License-Identifier: Apache-2.0
"""INT8 for the backbone alone: what comes after it measures small differences, which eight bits do not hold.

anomalib hands the whole graph to NNCF; of an anomaly score nothing is left then. Here the backbone is quantised, by
training images, and all that follows keeps single precision. What is left over changes raw scores a little, so that the
quantised model is calibrated on its own scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from .export_check import Runtime

_IMAGES = 300
"""Training images by which NNCF finds the ranges of activations; its own number."""


def check_quantisable(model: nn.Module) -> None:
    """Check, before anything is exported, that a model can be compressed to INT8.

    Raises:
        ValueError: If it has no frozen backbone.
        ModuleNotFoundError: If NNCF is not installed.
    """
    if getattr(model, "backbone", None) is None:
        msg = (
            f"INT8 is for backbones, and {type(model).__name__} has none: eight bits hold no density. Export it "
            "without compression, or with fp16."
        )
        raise ValueError(msg)
    if find_spec("nncf") is None:
        msg = "INT8 exports need NNCF: pip install 'anomalib-flowood[int8]'."
        raise ModuleNotFoundError(msg, name="nncf")


def backbone_nodes(graph: Any, model: nn.Module) -> set[str]:
    """Return the names of an ONNX graph's nodes that are of a model's backbone, as PyTorch's exporter tells of each."""
    backbone = getattr(model, "backbone", None)
    (path,) = [name for name, module in model.named_modules() if module is backbone] or [None]
    return {
        node.name
        for node in graph.graph.node
        for entry in node.metadata_props
        if path and entry.key == "pkg.torch.onnx.name_scopes" and f"'model.{path}'" in entry.value
    }


def quantised(model: Any, nodes: Set[str], images: Iterable[np.ndarray]) -> Any:
    """Quantise weights and activations of a part of an OpenVINO model.

    Args:
        model: As converted from ONNX, whose nodes keep their names.
        nodes: Names of the nodes that are to be quantised, with what OpenVINO made of them.
        images: Normal images, ``(N, 3, H, W)``, in [0, 1].

    Returns:
        The quantised model, for one image at a time where their number was open: then OpenVINO (2026.4) takes maps that
        are quantised for the next layer, and looked at besides, for zeros.
    """
    import nncf

    kept = nncf.IgnoredScope(names=_outside(model, nodes), validate=False)
    samples = _first(images, _IMAGES)
    # On a thread of its own, as every inference by OpenVINO: see openvino_runtime().
    with ThreadPoolExecutor(1) as thread:
        # Weights of 7 bits: CPUs without VNNI add products of 8 bits up in 16, which overflow.
        safe = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
        arguments = {"ignored_scope": kept, "subset_size": len(samples), "advanced_parameters": safe}
        found = thread.submit(nncf.quantize, model, nncf.Dataset(samples), **arguments).result()
    shape = found.input(0).partial_shape
    if shape[0].is_dynamic:
        shape[0] = 1
        found.reshape({found.input(0): shape})
    return found


def _first(images: Iterable[np.ndarray], count: int) -> list[np.ndarray]:
    """Take so many images, always the same, though loaders draw their order.

    The graph that gives the calibration is to be quantised by the same images as the one that is kept.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # that of the CPU alone, which is put back
        return list(islice(images, count))


def with_small_weights(model: Any, nodes: Set[str]) -> Any:
    """Store the weights of a part of an OpenVINO model in INT8; arguments as for :func:`quantised`."""
    import nncf

    return nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(names=_outside(model, nodes), validate=False))


def _outside(model: Any, nodes: Set[str]) -> list[str]:
    """Names of the operations on images that are neither among these nodes nor between them."""
    ordered = model.get_ordered_ops()
    constant: set[str] = set()
    behind: set[str] = set()
    for op in ordered:
        sources = {value.get_node().get_friendly_name() for value in op.input_values()}
        if op.get_type_name() == "Constant" or (sources and sources <= constant):
            constant.add(op.get_friendly_name())
        if op.get_friendly_name() in nodes or sources & behind:
            behind.add(op.get_friendly_name())
    before: set[str] = set()
    for op in reversed(ordered):
        users = {
            target.get_node().get_friendly_name() for output in op.outputs() for target in output.get_target_inputs()
        }
        if op.get_friendly_name() in nodes or users & before:
            before.add(op.get_friendly_name())
    return [name for op in ordered if (name := op.get_friendly_name()) not in constant | (behind & before)]


def normal_images(loader: Iterable[Any], shape: Sequence[int | None]) -> Iterator[np.ndarray]:
    """Yield normal images one by one as a model takes them, ``(N, 3, H, W)``: N times the same where N is fixed.

    Args:
        loader: Yields anomalib's batches.
        shape: Of the model's input.
    """
    count, _, height, width = shape
    for batch in loader:
        images, labels = batch.image, batch.gt_label
        images = images if labels is None else images[~labels.bool()]
        size = [height or images.shape[2], width or images.shape[3]]
        for image in functional.resize(images, size, antialias=True):
            yield image.expand(count or 1, -1, -1, -1).numpy()


def raw_scores(runtime: Runtime, images: Iterable[np.ndarray]) -> tuple[Tensor, Tensor | None]:
    """Score normal images by a model that has no calibration.

    Returns:
        Raw scores, ``(n,)``, and the largest value of each image's map; ``None`` where there are no maps.
    """
    outputs = [runtime.run(image) for image in track(images, "Calibrating the INT8 model", transient=True)]
    scores = torch.stack([torch.from_numpy(output["pred_score"]).flatten()[0] for output in outputs])
    maps = [torch.from_numpy(output["anomaly_map"])[0] for output in outputs if "anomaly_map" in output]
    return scores, torch.stack([found.max() for found in maps]) if maps else None
