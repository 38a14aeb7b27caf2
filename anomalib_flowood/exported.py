# SPDX-License-Identifier: Apache-2.0
"""What the ``model.json`` beside an exported model says, and the decisions that it allows.

An exported model gives ``pred_score`` and ``pred_label`` at the level that it was exported with. The file beside it
holds the calibration scores, so that raw scores also have p-values, labels at any other level, and a test for drift.
Nothing here imports anomalib or a runtime.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from anomalib_flowood import conformal
from anomalib_flowood.look import shorten

FORMAT: Final = 1
"""Version of the keys of a description: raised where a reader of earlier ones would go wrong."""


def read_description(model: str | Path) -> dict[str, Any]:
    """Read what is known of an exported model.

    Args:
        model: The exported model (``model.xml``, ``model.onnx``, ``model.pt``) or the ``model.json`` beside it.

    Returns:
        The content of ``model.json``; docs/export.md lists its keys. Scores are numbers, infinite ones too.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not the description of an exported model, has values that none has, or is of a later
            version of this package.
    """
    path = description_path(Path(model))
    if not path.is_file():
        msg = f"There is no {path}, which every export of anomalib_flowood has beside it. Export the model again."
        raise FileNotFoundError(msg)
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not valid JSON ({error}). Export the model again."
        raise ValueError(msg) from error
    if not isinstance(description, dict) or not {"identity", "calibration_scores"} <= set(description):
        msg = f"{path} does not describe an export of anomalib_flowood."
        raise ValueError(msg)
    if description.get("format", FORMAT) != FORMAT:
        wrote = description.get("versions", {}).get("anomalib-flowood", "another version")
        msg = f"{path} is of another format than {FORMAT}, by anomalib-flowood {wrote}: install that, or export anew."
        raise ValueError(msg)
    for key in _SCORES & description.keys():
        description[key] = _numbers(description[key])
    wrong = [key for key, valid in _VALID.items() if key in description and not valid(description[key])]
    if not wrong and description["calibration_scores"] and description.get("level", 0) is None:
        wrong = ["level"]
    if wrong:
        given = shorten(f"{wrong[0]}: {description[wrong[0]]!r}", 100)
        msg = f"{path} has been changed: no export has {given}. Copy it from where it was exported, or export anew."
        raise ValueError(msg)
    return description


def digest_of(file: Path) -> str:
    """SHA-256 of a file, by which a description knows the files that belong to it."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            digest.update(part)
    return digest.hexdigest()


_SCORES: Final = {"calibration_scores", "left_out_scores"}


def _numbers(scores: Any) -> Any:
    """Scores as floats, of which JSON has infinite ones as texts; what are none as they are."""
    try:
        return [float(score) for score in scores]
    except (TypeError, ValueError):
        return scores


def _are_scores(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(score, float) and not math.isnan(score) for score in given)


def _is_size(given: Any) -> bool:
    return given is None or (isinstance(given, list) and len(given) in {1, 2} and all(map(_is_count, given)))


def _is_count(given: Any) -> bool:
    return isinstance(given, int) and given > 0


_VALID: Final[dict[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_SCORES, _are_scores),
    "level": lambda level: level is None or (isinstance(level, int | float) and 0 <= level <= 1),
    "image_size": _is_size,
    "max_value": lambda white: white is None or _is_count(white),
    "export_type": lambda kind: kind in {"torch", "onnx", "openvino"},
    "file": lambda name: isinstance(name, str),
    "raw_score": lambda where: isinstance(where, dict),
}
"""Of keys by which an export is loaded, what values they may have."""


def description_path(model: Path) -> Path:
    """Return the path of the description of an exported model: its own, with the suffix ``.json``."""
    return model.with_suffix(".json")


def p_values(model: str | Path, raw_scores: ArrayLike) -> np.ndarray:
    """Conformal p-values of raw scores of an exported model; ``p_values(...) < alpha`` are labels at any level.

    Args:
        model: The exported model or its ``model.json``, as for :func:`read_description`.
        raw_scores: The model's ``raw_score`` of any number of images, of any shape; they may be infinite.

    Returns:
        p-values, float64, shaped as the scores: :func:`anomalib_flowood.conformal.p_values`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not the description of an exported model, the model was exported without a calibration, or
            a score is NaN.
    """
    return conformal.p_values(_calibration(model), _tensor(raw_scores)).numpy()


def drift_p_value(model: str | Path, raw_scores: ArrayLike) -> float:
    """Whether raw scores, together, are in-distribution: :func:`anomalib_flowood.conformal.drift_p_value`.

    Arguments and errors as for :func:`p_values`, ``(N,)`` scores; no scores at all are an error, too.
    """
    return conformal.drift_p_value(_calibration(model, "left_out_scores"), _tensor(raw_scores))


def _calibration(model: str | Path, *others: str) -> Tensor:
    """The scores that p-values count, and others that a description may have."""
    known = read_description(model)
    scores = known["calibration_scores"]
    if not scores:
        msg = f"{model} was exported without calibration scores: validate the detector, and export it again."
        raise ValueError(msg)
    return torch.tensor(sum((known.get(name, []) for name in others), scores), dtype=torch.float64)


def _tensor(scores: ArrayLike) -> Tensor:
    return torch.from_numpy(np.asarray(scores, dtype=np.float64))
