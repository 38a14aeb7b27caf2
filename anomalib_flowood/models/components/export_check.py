# SPDX-License-Identifier: Apache-2.0
"""Compares an exported model with the detector in PyTorch, on the same images."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.deploy.export import ExportType
from torch import Tensor
from torchvision.transforms.v2 import functional

from anomalib_flowood.names import counted

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule

    from .export_images import KeepsImages

logger = logging.getLogger(__name__)

BOUND = 1e-4
"""The largest relative difference allowed between an export in single precision and PyTorch; see :func:`compare`."""

Outputs = Mapping[str, np.ndarray]

_RAW = ("raw_score", "pred_score", "anomaly_map")
_TITLES = {"raw_score": "raw score", "pred_score": "score", "anomaly_map": "map"}


class ExportCheckError(ArithmeticError):
    """An exported model gives other scores than PyTorch."""


@dataclass(frozen=True)
class Runtime:
    """A loaded export.

    Attributes:
        run: Takes images in [0, 1], ``(N, 3, H, W)``, and returns the outputs by name.
        shape: The shape of its input; ``None`` for a dimension that may vary.
        takes_bytes: Whether images may also be ``uint8``.
    """

    run: Callable[[np.ndarray], Outputs]
    shape: Sequence[int | None] = (None, 3, None, None)
    takes_bytes: bool = False


def check_export(
    detector: KeepsImages, path: Path, export_type: ExportType, compression: str | None, target: Path | None = None
) -> dict[str, Any]:
    """Compare an export with PyTorch; print the differences, and return them for ``model.json``.

    Args:
        detector: In evaluation mode, on the CPU.
        path: The exported model.
        export_type: Its type.
        compression: How it is compressed, if it is.
        target: Its final path, to be printed; ``None`` if it stays where it is.
    """
    target = path if target is None else target
    if detector.check_images is None:
        print(f"Check of {target}: nothing could be checked, for the detector keeps no normal images (too large).")
        return {"images": 0}
    raw = "raw_score" in reference(detector, detector.check_images[:1] / 255)
    load: Any = {
        ExportType.TORCH: torch_runtime,
        ExportType.ONNX: onnx_runtime,
        ExportType.OPENVINO: partial(openvino_runtime, raw=raw),
    }[export_type]
    try:
        runtime = load(path)
        if compression is not None:
            # At their own size only: it was calibrated on images of the detector's size, and not on enlarged ones.
            own = (side or size for side, size in zip(runtime.shape[2:], detector.check_images.shape[2:], strict=True))
            runtime = replace(runtime, shape=[*runtime.shape[:2], *own])
        found, images, passed = compare_runtime(detector, runtime)
    except ModuleNotFoundError as error:
        print(f"Check of {target}: nothing could be checked, for {error.name} is not installed.")
        return {"images": 0}
    size = "" if compression is None else f" of {runtime.shape[3]} x {runtime.shape[2]} pixels"
    said = readable(found, images)
    print(f"Check of {target}: largest differences from PyTorch on {counted(images, 'normal image')}{size}: {said}.")
    result: dict[str, Any] = {"images": images, "bound": BOUND, "largest_differences": found}
    if compression is not None:
        logger.warning("Compression (%s) changes scores: no bound is asked of it.", compression)
        return result
    if export_type == ExportType.OPENVINO and (default := openvino_default_precision()) != "f32":
        found, images, kept = compare_runtime(detector, openvino_runtime(path, raw=raw, precision=None))
        if not kept:
            logger.warning(
                "OpenVINO computes in %s on this machine unless it is told otherwise, and some layers of this "
                "model do not keep single precision: the differences are then %s. Compile it with "
                '{"INFERENCE_PRECISION_HINT": "f32"}.',
                default,
                readable(found, images),
            )
        result["default_precision"] = {"name": default, "largest_differences": found}
    return {**result, "passed": passed}


def compare_runtime(detector: KeepsImages, runtime: Runtime) -> tuple[dict[str, float], int, bool]:
    """Largest differences of an export from PyTorch, the number of images, and whether the bound is kept."""
    assert detector.check_images is not None
    own, found, images, kept = detector.check_images.shape[-2:], [], 0, True
    for batch in batches(detector.check_images, runtime.shape):
        got, expected = runtime.run(batch.numpy()), reference(detector, batch)
        found.append(compare(got, expected))
        images += len(batch)
        pixels = detector.model.reads_pixels and batch.shape[-2:] != own
        slack = rounding(detector, batch, expected, pixels=pixels)
        kept &= agree(compare(got, expected, slack))
    return worst(found), images, kept


def torch_runtime(path: Path, device: str | torch.device = "cpu") -> Runtime:
    """Load a torch export that this process has just written, or whose code is trusted."""
    return module_runtime(torch.load(path, map_location="cpu", weights_only=False)["model"].eval().to(device))


def module_runtime(detector: Any) -> Runtime:
    """Return a runtime that computes in PyTorch, one image at a time if the detector takes no more.

    Args:
        detector: In evaluation mode, on the device to compute on.
    """
    count = 1 if detector.images_at_once == 1 else None

    def run(images: np.ndarray) -> Outputs:
        # A copy of read-only arrays, of which PyTorch warns: the channels of grey images share their memory.
        return reference(detector, torch.from_numpy(images if images.flags.writeable else images.copy()))

    return Runtime(run, (count, 3, None, None), detector.takes_bytes)


def onnx_runtime(path: Path) -> Runtime:
    """Load an ONNX export, with the raw score where there is one.

    Raises:
        ModuleNotFoundError: If ONNX Runtime is not installed.
    """
    import onnxruntime

    raw = raw_onnx_path(path)
    options = onnxruntime.SessionOptions()
    # By default there is a spinning thread for every core, even for those that the process may not use.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else math.inf
    if allowed < (os.cpu_count() or 1):
        options.intra_op_num_threads = int(allowed)
    graph = raw if raw.exists() else path
    content = graph.read_bytes()
    weights = [file for file in path.parent.glob("*.onnx.data") if file.name.encode() in content]
    # In memory, not mapped: copying another export over the file would change the weights, or crash the process.
    if weights and hasattr(options, "add_external_initializers_from_files_in_memory"):
        held = [file.read_bytes() for file in weights]
        options.add_external_initializers_from_files_in_memory([file.name for file in weights], held, [*map(len, held)])
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    (given,), names = session.get_inputs(), [output.name for output in session.get_outputs()]
    return Runtime(
        lambda images: dict(zip(names, session.run(None, {given.name: images}), strict=True)),
        [size if isinstance(size, int) else None for size in given.shape],
    )


def openvino_runtime(path: Path, *, raw: bool, precision: str | None = "f32") -> Runtime:
    """Load an OpenVINO export for the CPU.

    A graph with fixed sizes is up to a sixth faster: for the first single image one is compiled for its size, which
    takes about half a second.

    Args:
        path: Of the ``.xml`` file.
        raw: Whether the raw score is a tensor of its own.
        precision: What to compute in; ``None`` for what the plugin takes by itself.

    Raises:
        ModuleNotFoundError: If OpenVINO is not installed.
    """
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # as for ONNX: no mapped file
    model = core.read_model(path)
    if raw:
        model.add_outputs("raw_score")
    # On a thread of its own: OpenVINO (2026.4) leaves a freed signal stack behind on threads that it computes on, so
    # that the signal from a data loader's process that ends would crash this process.
    thread = ThreadPoolExecutor(1)
    hint = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    compiled = thread.submit(core.compile_model, model, "CPU", hint).result()
    names = [output.any_name for output in compiled.outputs]
    shape = [size.get_length() if size.is_static else None for size in compiled.input(0).partial_shape]
    of_one: dict[tuple[int, ...], Any] = {}
    loaded_by = os.getpid()

    def compute(images: np.ndarray) -> Any:
        if len(images) == 1 and None in shape and not of_one:
            model.reshape({model.input(0): list(images.shape)})
            of_one[images.shape] = core.compile_model(model, "CPU", hint)
        return of_one.get(images.shape, compiled)(images, share_inputs=True)

    def run(images: np.ndarray) -> Outputs:
        if os.getpid() != loaded_by:  # without the thread, whose answer would be waited for
            msg = f"{path} was loaded before a fork, and OpenVINO computes where it was: load it in this process."
            raise RuntimeError(msg)
        return dict(zip(names, thread.submit(compute, images).result().values(), strict=True))

    return Runtime(run, shape)


def openvino_default_precision() -> str:
    """Return the default precision of OpenVINO's CPU plugin on this machine: ``f32`` or ``bf16``."""
    import openvino

    return openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()


def raw_onnx_path(path: Path) -> Path:
    """Return the path of the graph beside an ONNX export that also returns the raw score."""
    return path.with_stem(f"{path.stem}_raw")


@torch.no_grad()
def reference(detector: AnomalibModule, images: Tensor, step: float = 0.0) -> Outputs:
    """Return the detector's outputs in PyTorch, with the pre-processing of a test.

    Args:
        detector: In evaluation mode.
        images: In [0, 1], ``(N, 3, H, W)``; or ``uint8``, if the detector takes bytes.
        step: How far raw scores and maps are moved before they are post-processed, relative to their absolute value,
            or to 1 if that is larger.

    Returns:
        The fields of anomalib's batch that are not ``None``, and ``raw_score`` if it differs from ``pred_score``.
    """
    images = images.to(detector.device)
    if images.dtype != torch.uint8:
        images = images.to(detector.dtype)  # weights may have 64 bits
    transform = getattr(detector.pre_processor, "transform", None)
    raw: InferenceBatch = detector.model(images if transform is None else transform(images))
    if step:
        raw = InferenceBatch(*(value if value is None else value + step * value.abs().clamp(min=1) for value in raw))
    done: InferenceBatch = detector.post_processor(raw) if detector.post_processor else raw
    outputs = {name: value.cpu().numpy() for name, value in done._asdict().items() if value is not None}
    if done.pred_score is not raw.pred_score:
        assert raw.pred_score is not None  # every detector scores images
        outputs["raw_score"] = raw.pred_score.cpu().numpy()
    return outputs


def batches(images: Tensor, shape: Sequence[int | None]) -> Iterator[Tensor]:
    """Yield images in two sizes, or in the only size that an export takes.

    Args:
        images: Images at the detector's input size, ``(n, 3, H, W)``, uint8.
        shape: The shape of the export's input.

    Yields:
        Images in [0, 1], ``(N, 3, H, W)``.
    """
    images = images.float() / 255
    count, _, height, width = shape
    count = count or len(images)
    images = torch.stack(list(islice(cycle(images), math.ceil(len(images) / count) * count)))
    own = images.shape[-2:]
    larger = (own[0] + own[0] // 2, own[1] + own[1] // 4)  # the graph has to resize them
    for rows, columns in dict.fromkeys((height or size[0], width or size[1]) for size in (own, larger)):
        yield from functional.resize(images, [rows, columns], antialias=True).split(count)


def rounding(detector: AnomalibModule, images: Tensor, expected: Outputs, *, pixels: bool) -> Outputs:
    """Return how much PyTorch's own outputs change with the last digits of single precision.

    Normal scores that lie close together have normalised scores that depend on the last digits of the raw ones. These
    are moved by a millionth of their value, or of 1 if they are smaller: a log-density near 0 is a sum of larger
    numbers, and has their last digits.

    Args:
        detector: In evaluation mode.
        images: In [0, 1], ``(N, 3, H, W)``.
        expected: Their outputs.
        pixels: Move pixels, too, by a 4,000th of a grey level. A flow on pixels rounds them to 256 levels after
            resizing: one that lies just between two levels may go either way, which changes the score.
    """
    small = 1e-6
    moved = [reference(detector, images, step) for step in (-small, small)]
    if pixels:
        moved += [reference(detector, (images + step).clamp(0, 1)) for step in (-small, small)]
    with np.errstate(invalid="ignore"):
        return {
            name: 2 * np.nan_to_num(np.max([np.abs(one[name] - expected[name]) for one in moved], axis=0), posinf=0.0)
            for name in _RAW
            if name in expected
        }


def compare(got: Outputs, expected: Outputs, slack: Outputs | None = None) -> dict[str, float]:
    """Return the largest differences of an export from PyTorch, and the number of labels that differ.

    Scores and maps in [0, 1] differ by ``|a - b| / (|b| + 0.1)``. Raw ones have no scale of their own, and differ by
    ``|a - b|`` over the largest of the batch. Labels count unless the score is at the threshold but for rounding: one
    of the calibration images always is, and it may be among these images.

    Args:
        got: Outputs of the export.
        expected: Outputs of PyTorch.
        slack: Differences that do not count.
    """
    differences: dict[str, float] = {}
    normalised = "raw_score" in expected
    for name in _RAW:
        if name not in expected:
            continue
        want = expected[name].astype(np.float64)
        have = np.asarray(got[name], dtype=np.float64).reshape(want.shape)
        size = np.abs(want)
        finite = size[np.isfinite(size)]
        raw = name == "raw_score" or not normalised
        scale: Any = max(float(finite.max(initial=0)), 1e-12) if raw else size + 0.1
        with np.errstate(invalid="ignore"):
            distance = np.abs(have - want) - (0.0 if slack is None else slack[name])
            error = np.where(have == want, 0.0, np.maximum(distance, 0.0) / scale)
        differences[name] = float(np.nan_to_num(error, nan=math.inf, posinf=math.inf).max(initial=0))
    if "pred_label" in expected:
        far = np.abs(expected["pred_score"] - 0.5) > BOUND + (0.0 if slack is None else slack["pred_score"])
        wrong = np.asarray(got["pred_label"]).reshape(far.shape) != expected["pred_label"]
        differences["labels"] = int((wrong & far).sum())
    return differences


def worst(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the differences of several batches: the largest ones, and the number of labels."""
    return {name: (sum if name == "labels" else max)(one[name] for one in found) for name in found[0]}


def agree(differences: Mapping[str, float]) -> bool:
    """Whether differences lie within the bound."""
    return all(value == 0 if name == "labels" else value <= BOUND for name, value in differences.items())


def readable(differences: Mapping[str, float], images: int) -> str:
    """Describe differences: ``raw score 3e-07, score 2e-06, labels of 0 of 10 images``."""
    parts = [f"{_TITLES[name]} {value:.1g}" for name, value in differences.items() if name != "labels"]
    if "labels" in differences:
        parts.append(f"labels of {differences['labels']} of {counted(images, 'image')}")
    return ", ".join(parts)
