# SPDX-License-Identifier: Apache-2.0
"""Files of checkpoints: read, or refused with one clear error that says what is wrong with them."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals
from torch import Tensor

from anomalib_flowood.files import at_home
from anomalib_flowood.names import subclasses

CLASS = "anomalib_flowood_class"
"""Where a checkpoint names its detector's class."""
MODULE = "anomalib_flowood_module"
"""Where it names the module of that class."""

_LIGHTNING = "pytorch-lightning_version"
_ZIP = b"PK"


class CheckpointError(ValueError):
    """A file is no checkpoint that can be loaded."""

    def __init__(self, path: object, what: str) -> None:
        super().__init__(f"{named(path)} {what}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint, its tensors mapped to the file where the format allows that.

    Args:
        path: The file.

    Returns:
        What was saved, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is empty, truncated, damaged, or something other than a checkpoint.
    """
    path = at_home(path)
    if not path.exists():
        msg = f"There is no checkpoint {path}. `flowood train` writes one, below its results folder."
        raise FileNotFoundError(msg)
    if not path.is_file():
        raise CheckpointError(path, "is a folder: name the file in it that ends in .ckpt.")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(path, "is empty. Was the disk full when it was written or copied?")
    archive = head.startswith(_ZIP)
    if archive:
        _check_archive(path)
    plain_types = [kind for cls in subclasses(AnomalibModule) for kind in cls.checkpoint_safe_globals()]
    try:
        with anomalib_safe_globals(extra=plain_types):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # torch raises whatever its readers meet
        raise CheckpointError(path, _unreadable(error, head)) from error
    _check_content(path, checkpoint)
    return checkpoint


def named(path: object) -> str:
    """Name a checkpoint at the beginning of a sentence; ``None`` is one that has no file."""
    return f"The checkpoint {path}" if path else "The checkpoint"


def _check_archive(path: Path) -> None:
    """Look for a zip archive's index, which is at its end, and for damage: its checksums are torch's own."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = archive.namelist()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        size = path.stat().st_size
        what = f"is truncated or damaged: its {size:,} bytes are no whole archive. Copy it again, or train again."
        raise CheckpointError(path, what) from error
    if damaged is not None:
        raise CheckpointError(path, f"is damaged: {damaged} fails its checksum. Copy it again, or train again.")
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(path, f"is a zip archive of something else ({', '.join(names[:3])}, …).")


def _unreadable(error: Exception, head: bytes) -> str:
    """Say what a file is that torch does not read."""
    if not head.startswith(_ZIP):
        try:
            text = head[:400].decode()
        except UnicodeDecodeError:
            text = "\0"
        if text.isprintable() or text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
            return f"is a text file that begins with {text.strip()[:40]!r}."
        return "is not in torch's format: it is a file of another kind, or damaged. Copy it again, or train again."
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        objects = f" ({found[1]})" if found else ""
        return (
            f"holds Python objects{objects} and not tensors and settings alone: it is an exported model, or was "
            "written by another version of anomalib or Lightning. Name the .ckpt file that training wrote, or train "
            "again."
        )
    return f"cannot be read: {str(error).splitlines()[0]}"


def _check_content(path: Path, checkpoint: Any) -> None:
    if not isinstance(checkpoint, dict):
        raise CheckpointError(path, f"holds a {type(checkpoint).__name__} and no detector.")
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, Mapping) or _LIGHTNING not in checkpoint:
        if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
            what = "holds weights alone, without the settings of a detector. Name the .ckpt file that training wrote."
        else:
            missing = _LIGHTNING if isinstance(weights, Mapping) else "state_dict"
            has = ", ".join(map(str, list(checkpoint)[:8])) or "nothing"
            what = f"is none of Lightning's: it has no {missing}. It has {has}."
        raise CheckpointError(path, what)
    if CLASS in checkpoint and not isinstance(checkpoint.get("hyper_parameters"), Mapping):
        raise CheckpointError(path, "has no hyper_parameters, so that nothing says how to build its detector.")
