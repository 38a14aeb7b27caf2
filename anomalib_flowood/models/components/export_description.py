# SPDX-License-Identifier: Apache-2.0
"""What an export is of, in the ``model.json`` beside it: settings, weights, calibration, versions."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.deploy.export import ExportType

from anomalib_flowood.data.path_dataset import size_read
from anomalib_flowood.exported import FORMAT, description_path, digest_of
from anomalib_flowood.files import write_text

from .checkpoints import settings_of
from .export_check import raw_onnx_path, reference
from .post_processor import ConformalPostProcessor

if TYPE_CHECKING:
    from .weights import CheckedWeights

_VERSIONED = ("anomalib-flowood", "anomalib", "torch", "timm", "onnx", "onnxruntime", "openvino")


def identity(detector: CheckedWeights) -> str:
    """Return a digest of what makes raw scores: class, arguments, pre-processing, weights."""
    digest = hashlib.sha256(json.dumps(_settings(detector), sort_keys=True).encode())
    for name, value in sorted(detector.model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe(detector: CheckedWeights, path: Path, export_type: ExportType, compression: str | None) -> dict[str, Any]:
    """Describe an export, as ``model.json`` does; docs/export.md lists its keys.

    Args:
        detector: In evaluation mode, on the CPU.
        path: The exported model, in a folder that holds the files of this export alone.
        export_type: Its type.
        compression: How it is compressed, if it is.
    """
    post_processor = detector.post_processor
    alpha, level, threshold, calibration, left_out = None, None, None, [], []
    if isinstance(post_processor, ConformalPostProcessor):
        alpha = post_processor.alpha
        if post_processor.calibrated:
            level = post_processor.level
            threshold, calibration = float(post_processor.image_threshold), post_processor.kept.tolist()
            left_out = post_processor.left_out.tolist()
    outputs = reference(detector, torch.zeros(1, 3, 32, 32))
    raw = "raw_score" if "raw_score" in outputs else "pred_score"
    where = {
        ExportType.TORCH: {"method": "raw_scores"},
        ExportType.ONNX: {"file": raw_onnx_path(path).name, "output": raw},
        ExportType.OPENVINO: {"file": path.name, "tensor": raw},
    }[export_type]
    return {
        "format": FORMAT,
        "file": path.name,
        "export_type": export_type.value,
        "compression": compression,
        **_settings(detector),
        "max_value": getattr(detector, "max_value", None),
        "identity": identity(detector),
        "outputs": [name for name in outputs if name != "raw_score"],
        "raw_score": where,
        "alpha": alpha,
        "level": level,
        "threshold": threshold,
        "calibration_scores": calibration,
        "left_out_scores": left_out,
        "files": {file.name: digest_of(file) for file in sorted(path.parent.iterdir()) if file.is_file()},
        "versions": _versions(),
    }


def write_description(path: Path, description: dict[str, Any]) -> None:
    """Write ``model.json`` beside an export."""
    text = json.dumps(_plain(description), indent=1, allow_nan=False)
    write_text(description_path(path), f"{text}\n")


def _plain(value: Any) -> Any:
    """A value as JSON has it, which knows neither infinities nor tuples."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _versions() -> dict[str, str]:
    versions = {}
    for name in _VERSIONED:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _settings(detector: CheckedWeights) -> dict[str, Any]:
    pre_processing: dict[str, Any] = getattr(detector.pre_processor, "checkpoint_config", dict)()
    return {
        "class": f"anomalib_flowood.{type(detector).__name__}",
        "arguments": _plain(settings_of(detector.hparams)),
        "image_size": _plain(size_read(detector)),
        "pre_processing": _plain(pre_processing.get("transform")),
        "score": detector.model.scorer.name,
    }
