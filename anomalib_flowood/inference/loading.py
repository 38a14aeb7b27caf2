# SPDX-License-Identifier: Apache-2.0
"""Detectors out of checkpoints and exports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from anomalib_flowood.data.path_dataset import size_read
from anomalib_flowood.exported import description_path, digest_of, read_description
from anomalib_flowood.files import at_home, files_below
from anomalib_flowood.inference.detector import Detector
from anomalib_flowood.models.components import ConformalPostProcessor, open_checkpoint
from anomalib_flowood.models.components.export_check import (
    Runtime,
    module_runtime,
    onnx_runtime,
    openvino_runtime,
    raw_onnx_path,
    torch_runtime,
)

_SUFFIXES = {".pt", ".onnx", ".xml", ".json"}
_NEEDED = {"export_type", "file", "image_size", "level", "max_value", "raw_score"}
"""Keys of a description, some of which version 0.1.0 did not write."""
_NAMED = 5
"""The most files that a message names."""


def load(path: str | Path, device: str | torch.device = "cpu") -> Detector:
    """Load a trained detector to score images with.

    Args:
        path: A checkpoint (``model.ckpt``), an export (``model.xml``, ``model.onnx``, ``model.pt``, or the
            ``model.json`` beside it), or the folder of an export. OpenVINO computes in single precision.
        device: Where PyTorch computes, for a checkpoint or a torch export: ``"cuda"``, say. Other exports are for the
            CPU.

    Returns:
        The detector, which reads and resizes images as its training did, and has its calibration. It is pickled as the
        file's absolute path, from which it is loaded again.

    Raises:
        FileNotFoundError: If there is no such file or folder, no export in a folder, or no ``model.json`` or
            ``model_raw.onnx`` beside an export that needs it.
        ValueError: If a folder holds several exports; if a file is none of these, or an export of an incompatible
            version; if files of an export were replaced, or its description was changed; if PyTorch does not have the
            device here, or the export is for the CPU only. Also if a torch export is to be loaded, which runs the code
            in it, and the environment variable ``TRUST_REMOTE_CODE`` is not 1, which is anomalib's rule.
        CheckpointError: If a checkpoint is broken.
        ModuleNotFoundError: If the runtime of an export is not installed.
    """
    path = at_home(path)
    if not path.exists():
        msg = f"There is no {path} (looked for it from {Path.cwd()})."
        raise FileNotFoundError(msg)
    if path.is_dir():
        path = _export_in(path)
    with torch.device("cpu"):  # from where it goes to the device, whatever torch.set_default_device was told
        return _loaded(path, device)


def _loaded(path: Path, device: str | torch.device) -> Detector:
    """The detector of a file."""
    again = load, (path.absolute(), device)
    if path.suffix == ".ckpt":
        _check_device(device)
        return of_module(open_checkpoint(path).to(device), again)
    if path.suffix not in _SUFFIXES:
        msg = f"{path} is neither a checkpoint (.ckpt) nor an export (.xml, .onnx, .pt, or the .json beside it)."
        raise ValueError(msg)
    known = read_description(path)
    path = _described(path, known)
    size = known["image_size"]
    return Detector(
        _runtime(path, known, device),
        tuple(size) if size else None,
        known["calibration_scores"],
        known["level"],
        known["max_value"],
        again,
        known.get("left_out_scores", ()),
    )


def of_module(module: Any, again: Any = None) -> Detector:
    """Wrap a trained detector that is in memory.

    Args:
        module: One of the detectors of this package. It is put into evaluation mode, and computes on its own device.
        again: See :class:`Detector`; by default this function and the module.
    """
    module = module.eval()
    post_processor = module.post_processor
    calibrated = isinstance(post_processor, ConformalPostProcessor) and post_processor.calibrated
    return Detector(
        module_runtime(module),
        size_read(module),
        post_processor.kept.tolist() if calibrated else (),
        post_processor.level if calibrated else None,
        getattr(module, "max_value", None),
        again or (of_module, (module,)),
        post_processor.left_out.tolist() if calibrated else (),
    )


def _export_in(folder: Path) -> Path:
    """Return the only export in a folder."""
    found = sorted(file for file in folder.iterdir() if _is_export(file))
    if not found:
        msg = f"There is no exported model (.xml, .onnx, .pt) in {folder}."
        below = sorted(str(file) for file in files_below(folder) if file.suffix == ".ckpt" or _is_export(file))
        if below:
            msg += f" Name one of what lies below it: {', '.join(below[:_NAMED])}{', …' if len(below) > _NAMED else ''}"
        raise FileNotFoundError(msg)
    if len(found) > 1:
        msg = f"There are several exported models in {folder}, name one: {', '.join(file.name for file in found)}."
        raise ValueError(msg)
    return found[0]


def _is_export(file: Path) -> bool:
    """Whether a file is a model, and neither a description nor the graph of raw scores beside an ONNX model."""
    return file.suffix in _SUFFIXES - {".json"} and not (file.suffix == ".onnx" and file.stem.endswith("_raw"))


def _described(path: Path, known: dict[str, Any]) -> Path:
    """Return the export that a description belongs to, by name, though both may have been renamed."""
    if missing := sorted(_NEEDED - known.keys()):
        msg = f"{description_path(path)} is of an earlier version, without {', '.join(missing)}: export the model anew."
        raise ValueError(msg)
    kind = Path(known["file"]).suffix
    if path.suffix not in {kind, ".json"}:
        msg = f"{description_path(path)} describes a {kind} file, and not {path}: has that of another export replaced"
        msg += " its own? Export the model again."
        raise ValueError(msg)
    path = path.with_suffix(kind)
    needed = [path]
    if known["export_type"] == "onnx" and known["raw_score"].get("output") == "raw_score":
        needed.append(raw_onnx_path(path))  # without it p-values would be of another score
    digests = {_renamed(name, known["file"], path): digest for name, digest in known.get("files", {}).items()}
    for file in [*needed, *digests]:
        if not file.exists():
            msg = f"There is no {file}, which belongs to {description_path(path)}: copy it there, or export again."
            raise FileNotFoundError(msg)
    for file, digest in digests.items():
        if digest_of(file) != digest:
            msg = (
                f"{file} is not the file that {description_path(path)} was written with: it was not copied whole, or "
                "is of another export. Copy all files of the export once more, or export again."
            )
            raise ValueError(msg)
    return path


def _renamed(name: str, model: str, path: Path) -> Path:
    """Return the path of an export's file after a renaming; the weights of an ONNX graph keep their name."""
    stem = Path(model).stem
    kept = name.endswith(".onnx.data") or not name.startswith(stem)
    return path.with_name(name if kept else path.stem + name.removeprefix(stem))


def _runtime(path: Path, known: dict[str, Any], device: str | torch.device) -> Runtime:
    try:
        return _computing(path, known, device)
    except (ValueError, ModuleNotFoundError, FileNotFoundError):
        raise
    except Exception as error:  # each runtime has its own errors for broken files
        reason = " ".join(str(error).split())[:200]
        msg = f"{path} cannot be loaded: is it whole, with what lies beside it? ({reason}) Export the model again."
        raise ValueError(msg) from error


def _computing(path: Path, known: dict[str, Any], device: str | torch.device) -> Runtime:
    if known["export_type"] == "torch":
        if os.environ.get("TRUST_REMOTE_CODE", "0").lower() not in {"1", "true"}:
            msg = (
                f"Loading {path} runs the code in it. If you trust whoever gave it to you, set TRUST_REMOTE_CODE=1 in "
                "the environment, as for anomalib's TorchInferencer; a checkpoint holds no code."
            )
            raise ValueError(msg)
        _check_device(device)
        return torch_runtime(path, device)
    if _named(device).type != "cpu":
        msg = f"{path} is loaded for the CPU, not for {device}: load the checkpoint that it was exported from, or leave"
        msg += " device out."
        raise ValueError(msg)
    if known["export_type"] == "onnx":
        return onnx_runtime(path)
    return openvino_runtime(path, raw=known["raw_score"]["tensor"] == "raw_score")


def _named(device: str | torch.device) -> torch.device:
    """Return the device of a name, whether it is available or not."""
    try:
        return torch.device(device)
    except RuntimeError as error:
        msg = f"{device!r} is no device of PyTorch's: name cpu, cuda, cuda:1, mps or the like, or leave device out."
        raise ValueError(msg) from error


def _check_device(device: str | torch.device) -> None:
    """Refuse a device that is not available, before a model is read."""
    named = _named(device)
    try:
        torch.empty(1, device=named)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        msg = f"PyTorch cannot compute on {device} here ({reason}). Name another device, or leave it out for the CPU."
        raise ValueError(msg) from error
