# SPDX-License-Identifier: Apache-2.0
"""Opens checkpoints with the class and the settings that they name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule
from packaging.version import Version
from torch import Tensor

from anomalib_flowood import __version__
from anomalib_flowood.features import LOCAL_DIR
from anomalib_flowood.names import subclasses
from anomalib_flowood.parsing import arguments_of

from .checkpoint_files import CLASS, MODULE, CheckpointError, named, read_checkpoint

SCORE = "anomalib_flowood_score"
VERSION = "anomalib_flowood_version"

_REASONS = {
    "0.2.0": "its fitted statistics have moved into modules of their own, and their names with them",
}
"""Why checkpoints from before these versions cannot be read."""

_UNNAMED = "0.1.0 or before"
_CONFORMAL = "anomalib_flowood.models.components.ConformalPostProcessor"
_LEVEL = {"alpha", "contamination"}
"""The keys of its configuration; other post-processors have others."""


class SettingsError(ValueError):
    """Settings were given that differ from a checkpoint's, but may not."""


def open_checkpoint(path: str | Path, **changes: Any) -> Any:
    """Open a trained detector with the class, settings and weights of a checkpoint.

    Args:
        path: A checkpoint that a detector of this package wrote.
        **changes: Arguments of the class that may differ from the checkpoint's: ``score``,
            ``post_processor=ConformalPostProcessor(alpha=…)``, other components, and what only training needs.

    Returns:
        The detector, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is broken, or no detector of this package wrote it.
        SettingsError: If another setting is to change.
    """
    detector = detector_class(path, read_checkpoint(path))
    return detector.load_from_checkpoint(path, map_location="cpu", **changes)


def detector_class(path: object, checkpoint: Mapping[str, Any]) -> Any:
    """Find the class that wrote a checkpoint.

    Args:
        path: Its file, to be named in errors.
        checkpoint: What was read from it.

    Returns:
        A subclass of ``AnomalibModule``.

    Raises:
        CheckpointError: If no detector of this package wrote it, its class is not imported, or its version cannot be
            read.
    """
    writer = checkpoint.get(CLASS)
    if writer is None:
        raise CheckpointError(path, "was not written by a detector of anomalib_flowood: load it with its own class.")
    cls = imported_class(checkpoint)
    if cls is None:
        module = checkpoint.get(MODULE, "MODULE")
        what = (
            f"was written by {writer}, a class that is not imported here: import its module, or name it with that to a "
            f"command that takes one (--model {module}.{writer})."
        )
        raise CheckpointError(path, what)
    check_version(path, checkpoint, cls)
    return cls


def imported_class(checkpoint: Mapping[str, Any]) -> Any:
    """Find the class that wrote a checkpoint among imported ones; ``None`` if it is not there.

    If several have the name, it is that of the same module; the last one, if the module has redefined it, as notebooks
    do.
    """
    classes = [cls for cls in subclasses(AnomalibModule) if cls.__name__ == checkpoint.get(CLASS)]
    written = [cls for cls in classes if cls.__module__ == checkpoint.get(MODULE)]
    return written[-1] if written else next(iter(classes), None)


def check_version(path: object, checkpoint: Mapping[str, Any], detector: Any) -> None:
    """Refuse a checkpoint from before the earliest version that a detector can read.

    Args:
        path: Its file, to be named in the error.
        checkpoint: What was read from it.
        detector: The class that wrote it; its ``readable_since`` is that version, if there is one.

    Raises:
        CheckpointError: If an earlier version wrote it.
    """
    since = getattr(detector, "readable_since", None)
    version = checkpoint.get(VERSION)
    if since is None or (version is not None and Version(version) >= Version(since)):
        return
    what = (
        f"was written by version {version or _UNNAMED} of anomalib-flowood, and {detector.__name__} reads those from "
        f"{since} on, for {_REASONS[since]}. Train again, which takes seconds to minutes, or read it with "
        f"anomalib-flowood {version or '0.1.0'}."
    )
    raise CheckpointError(path, what)


def saved_arguments(path: object, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a checkpoint's detector was built, as in a configuration file.

    Args:
        path: Its file, to be named in errors.
        checkpoint: What was read from it.

    Returns:
        ``class_path`` and ``init_args``.

    Raises:
        CheckpointError: As for :func:`detector_class`.
    """
    cls = detector_class(path, checkpoint)
    known = arguments_of(cls)
    arguments = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in known}
    level = checkpoint.get("anomalib_post_processor_config") or {}
    if "alpha" in level and level.keys() <= _LEVEL and "post_processor" in known:
        arguments["post_processor"] = {"class_path": _CONFORMAL, "init_args": level}
    for component, enabled in checkpoint.get("anomalib_components_enabled", {}).items():
        if not enabled and component in known:
            arguments[component] = False
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


def settings_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyper-parameters without what LightningCLI keeps among them: ``_instantiator`` and ``_class_path``."""
    return {name: value for name, value in stored.items() if not name.startswith("_")}


def check_settings(
    path: object, stored: Mapping[str, Any], given: Mapping[str, Any], may_change: Collection[str], remedy: str
) -> None:
    """Refuse settings that differ from a checkpoint's, by name.

    Where a ``local-dir:`` backbone lies does not count: its weights come from the checkpoint.

    Args:
        path: The checkpoint's file, to be named in the error.
        stored: The checkpoint's ``hyper_parameters``. What it lacks is of a later version, and does not count.
        given: Settings of a detector.
        may_change: Names of settings that may differ.
        remedy: What to do, for the error.

    Raises:
        SettingsError: If there are any.
    """
    differing = []
    for name in sorted(stored.keys() & given.keys() - set(may_change)):
        theirs, ours = stored[name], given[name]
        moved = name == "backbone" and any(str(value).startswith(LOCAL_DIR) for value in (theirs, ours))
        if not moved and plain(theirs) != plain(ours):
            differing.append(f"{name} is {theirs!r} there and {ours!r} here")
    if differing:
        msg = f"{named(path)} was trained with other settings: {'; '.join(differing)}. {remedy}"
        raise SettingsError(msg)


def check_finite(path: object, state_dict: Mapping[str, Any]) -> None:
    """Refuse weights that cannot give scores.

    Args:
        path: The checkpoint that they are from, to be named in the error; ``None`` for those of a detector in memory.
        state_dict: A detector's.

    Raises:
        ValueError: If a weight or a fitted statistic is NaN, or infinite and not a score's; a
            :class:`CheckpointError` for a checkpoint.
    """
    for name, value in state_dict.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or not name.startswith("model."):
            continue
        # Statistics of scores may be infinite on purpose.
        broken = value.isnan() if name.startswith("model.scorer.") else ~value.isfinite()
        if bool(broken.any()):
            what = (
                f"is broken: {int(broken.sum())} of {value.numel()} values of {name} are NaN or infinite, and so would "
                "all scores be. Train again, with a lower learning rate, or take an earlier checkpoint."
            )
            raise CheckpointError(path, what) if path else ValueError(f"This detector {what}")


def check_fitted(path: object, checkpoint: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of a training that was interrupted before anything was fitted.

    Args:
        path: The checkpoint's file, to be named in the error.
        checkpoint: What was read from it.

    Raises:
        CheckpointError: If its detector cannot score anything yet.
    """
    if not bool(checkpoint["state_dict"].get("model.fitted", True)):
        what = (
            f"is of a training that was interrupted after {checkpoint.get('global_step', 0)} steps, before what scores "
            "need was fitted: they would be at random. Go on with it first (`flowood train … --ckpt_path`, "
            "Engine.fit(ckpt_path=…)), or train again."
        )
        raise CheckpointError(path, what)


def plain(value: Any) -> Any:
    """Convert a setting to what JSON knows, so that a tuple equals a list, and a path its text."""
    return json.loads(json.dumps(value, default=str))


def written_by(checkpoint: Mapping[str, Any]) -> str:
    """Say which version wrote a checkpoint, and which one this is."""
    return f"written by version {checkpoint.get(VERSION, _UNNAMED)}, this is {__version__}"
