# SPDX-License-Identifier: Apache-2.0
"""The folder that a benchmark or a test leaves and a report reads.

It holds ``results.csv`` (one row per job), ``scores.csv`` (one row per test image and job) and ``run.json`` (when, with
which versions and settings, and how detectors and data were configured).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from anomalib_flowood.checks import refuse_nan
from anomalib_flowood.files import NAMES, unescaped, write_text

RESULTS, SCORES, RECORD = "results.csv", "scores.csv", "run.json"
"""Names of the files."""

JOB_COLUMNS = ["detector", "data", "seed"]
"""Columns that say which job a row is of."""

SCORE_COLUMNS = [*JOB_COLUMNS, "image_path", "source", "label", "score"]
"""Columns of ``scores.csv``."""

_SETTINGS = ("model.", "data.", "accelerator")
"""What the names of columns with settings begin with."""
_RECORDED = ("command", "date", "versions", "machine", "settings", "detectors", "data")
_PACKAGES = ("anomalib-flowood", "anomalib", "torch", "torchvision", "lightning", "timm", "FrEIA")


def write_record(
    folder: Path,
    command: str,
    *,
    detectors: Mapping[str, Any],
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Path:
    """Write down what runs, and on what.

    Args:
        folder: The run's folder.
        command: The subcommand, ``"benchmark"`` or ``"test"``.
        detectors: The configuration of each detector (``class_path`` and ``init_args``) by its label.
        data: The configuration of each data module by its label.
        settings: What else was set: seeds, accelerators, the trainer's arguments, a checkpoint.

    Returns:
        The file written.
    """
    import torch  # here alone: a run's folder is read without it

    machine = {"platform": platform.platform(), "CPU threads": torch.get_num_threads(), "CPUs": os.cpu_count()}
    if torch.cuda.is_available():
        machine["GPU"] = torch.cuda.get_device_name()
    record = {
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in _PACKAGES} | {"Python": platform.python_version()},
        "machine": machine,
        "settings": dict(settings),
        "detectors": dict(detectors),
        "data": dict(data),
    }
    path = folder / RECORD
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")
    return path


@dataclass(frozen=True)
class Run:
    """A run's results.

    Attributes:
        folder: Where they are.
        results: One row per job, failed ones (``error``) included.
        scores: One row per test image of every job that succeeded.
        record: What ``run.json`` holds; empty for a run of an older version, which wrote none.
    """

    folder: Path
    results: pd.DataFrame
    scores: pd.DataFrame
    record: dict[str, Any]


def read_run(folder: Path) -> Run:
    """Read and check a run's folder.

    Raises:
        FileNotFoundError: If there is no such folder, or it lacks a file.
        ValueError: If a file cannot be read, lacks columns or holds values that no test gives.
    """
    if not folder.is_dir():
        msg = f"{folder} is no folder. Give the one that `flowood benchmark` or `flowood test` named at its end."
        raise FileNotFoundError(msg)
    results = _read_table(folder / RESULTS, [*JOB_COLUMNS, "AUROC", "FPR95"], ["detector", "data", "error"])
    if results.empty:
        msg = f"{folder / RESULTS} has no rows: no job has finished."
        raise ValueError(msg)
    results = results.assign(error=results.get("error", ""))
    done = results[results["error"] == ""]
    scores = pd.DataFrame(columns=SCORE_COLUMNS)
    if not done.empty:
        path = folder / SCORES
        scores = _read_table(path, SCORE_COLUMNS, ["detector", "data", "image_path", "source"])
        scores = scores.merge(done[JOB_COLUMNS].drop_duplicates(), on=JOB_COLUMNS)
        _check_scores(path, scores, done)
    return Run(folder, results, scores, _read_record(folder / RECORD))


def _read_table(path: Path, columns: list[str], texts: list[str]) -> pd.DataFrame:
    """Read a CSV file that has at least these columns."""
    if not path.is_file():
        msg = f"There is no {path.name} in {path.parent}: it is not the folder of a benchmark or a test."
        raise FileNotFoundError(msg)
    try:
        # A class may be called "nan" or "NA": in columns of text nothing is missing but what is empty.
        header = [str(name) for name in pd.read_csv(path, nrows=0, encoding_errors=NAMES)]
        settings = [name for name in header if name.startswith(_SETTINGS)]
        texts = [*texts, *settings]
        frame = pd.read_csv(
            path,
            dtype=dict.fromkeys(texts, str),
            keep_default_na=False,
            na_values={name: ["", "nan", "NaN"] for name in header if name not in texts},
            encoding_errors=NAMES,
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        msg = f"{path} is no table that can be read: {error}"
        raise ValueError(msg) from error
    only_failures = path.name == RESULTS and "error" in frame and (frame["error"] != "").all()
    missing = [name for name in (JOB_COLUMNS if only_failures else columns) if name not in frame]
    if missing:
        msg = f"{path} lacks the columns {', '.join(missing)}. It has to be as `flowood benchmark` writes it."
        raise ValueError(msg)
    for name in set(columns) - set(texts):
        if name in frame and not frame.empty and not pd.api.types.is_numeric_dtype(frame[name]):
            msg = f"{path}: the column {name} has to hold numbers."
            raise ValueError(msg)
    written = {str(name): frame[name].map(unescaped) for name in frame.select_dtypes(exclude=["number", "bool"])}
    written |= {name: written[name].fillna("") for name in texts if name in written}  # of a row that is cut off
    written |= {name: pd.Series(map(_setting, written[name]), frame.index, dtype=object) for name in settings}
    return frame.assign(**written).copy()  # of hundreds of columns, laid out anew


def _setting(text: str) -> int | float | str:
    """What a setting was before it was written: a number, where that is written so, and no ``007`` or ``1e5``."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            if str(kind(text)) == text and math.isfinite(kind(text)):
                return kind(text)
    return text


def _check_scores(path: Path, scores: pd.DataFrame, done: pd.DataFrame) -> None:
    """Refuse scores that cannot be ranked or belong to no job."""
    detectors, data = scores["detector"], scores["data"]
    where = f"scores in {path}"
    refuse_nan(scores["score"].to_numpy(), where, lambda row: f"{detectors.iloc[row]} on {data.iloc[row]}")
    if not np.isin(scores["label"], (0, 1)).all():
        msg = f"{path}: a label has to be 0 (in-distribution) or 1 (out-of-distribution)."
        raise ValueError(msg)
    lacking = done[JOB_COLUMNS].merge(scores[JOB_COLUMNS].drop_duplicates(), how="left", indicator=True)
    lacking = lacking[lacking["_merge"] == "left_only"]
    if not lacking.empty:
        first = lacking.iloc[0]
        msg = f"{path} has no scores of {first['detector']} on {first['data']}, seed {first['seed']}."
        raise ValueError(msg)


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8", errors=NAMES))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        msg = f"{path} is no JSON file: {error}"
        raise ValueError(msg) from error
    missing = [name for name in _RECORDED if not isinstance(record, dict) or name not in record]
    if missing:
        msg = f"{path} lacks {', '.join(missing)}. It has to be as `flowood benchmark` writes it."
        raise ValueError(msg)
    return record
