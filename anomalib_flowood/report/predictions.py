# SPDX-License-Identifier: Apache-2.0
"""The predictions of a detector, kept as a table and shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from anomalib_flowood import conformal, processes
from anomalib_flowood.files import whole_file, write_table
from anomalib_flowood.models.components import ConformalPostProcessor
from anomalib_flowood.names import counted

from .decisions import decide, decision_of, expectation, percent

_SHOWN_PREDICTIONS = 10
_KEPT = ("image_path", "source", "gt_label", "raw_score", "pred_score", "p_value", "pred_label")


class PredictionKeeper(Callback):
    """Keeps what a prediction says of images, without the images and their maps, which would fill the memory."""

    def __init__(self) -> None:
        self.batches: list[SimpleNamespace] = []
        """What :func:`keep_predictions` takes."""
        self._last: Any = None

    def on_predict_start(self, *_: Any) -> None:
        """Begin anew."""
        self.batches, self._last = [], None

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Hold a batch, which the post-processor, whose turn is after ours, has not seen yet."""
        del trainer, pl_module
        self._last = outputs

    def on_predict_batch_start(self, *_: Any) -> None:
        """Take what is wanted of the previous batch, and let go of it: its maps may be large."""
        self._keep_last()

    def on_predict_epoch_end(self, *_: Any) -> None:
        """Take what is wanted of the last batch."""
        self._keep_last()

    def _keep_last(self) -> None:
        if self._last is not None:
            self.batches.append(SimpleNamespace(**{name: getattr(self._last, name, None) for name in _KEPT}))
        self._last = None


class Kept(NamedTuple):
    """What is kept of a prediction.

    Attributes:
        path: The table.
        findings: What was said of all images together, for the record beside the table: ``decision``, in words, and
            ``drift_p_value``, if a calibrated detector of ours has labelled them; and ``unreadable``, how many files
            could not be read, if there are any.
    """

    path: Path
    findings: dict[str, Any]


def keep_predictions(
    predictions: Iterable[Any] | None,
    folder: Path,
    post_processor: nn.Module | None = None,
    errors: Mapping[str, str] | None = None,
) -> Kept | None:
    """Write ``predictions.csv``; print where it is, the most anomalous images, drift, and what could not be read.

    Of several processes that of rank 0 does so, for all of them.

    Args:
        predictions: What anomalib's engine returned: batches, or a list of batches for each data loader, or nothing;
            or the batches of a :class:`PredictionKeeper`.
        folder: Where to write.
        post_processor: The detector's: a calibrated :class:`ConformalPostProcessor` also tests all images together.
        errors: Path and message of each file that could not be read. If there are any, the table has a column
            ``error``, and a row without a score for each of them.

    Returns:
        What is kept, or nothing if there were no predictions (``--return_predictions false``), and in other processes.
    """
    batches: list[Any] = []
    for item in predictions or ():
        batches.extend(item if isinstance(item, list) else [item])
    # Each process has predicted some, and may have none.
    errors = {path: text for some in processes.gathered_objects(dict(errors or {})) for path, text in some.items()}
    table = processes.in_data_set_order(pd.concat([pd.DataFrame(), *map(_rows, batches)], ignore_index=True))
    if processes.rank():
        return None
    scored = len(table)
    if not scored and not errors:
        print("No predictions were returned, so there is nothing to write.")
        return None
    tables = [table] if scored else []
    if errors:
        lost = {"image_path": list(errors), "pred_score": np.nan, "error": list(errors.values())}
        tables.append(pd.DataFrame(lost))
    frame = pd.concat(tables, ignore_index=True)
    if "pred_label" in frame and frame["pred_label"].notna().any():
        frame = frame.astype({"pred_label": "Int64"})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "predictions.csv"
    with whole_file(path) as file:
        write_table(frame, file)

    console = Console(emoji=False)  # a:car:b.png is the name of a file
    findings = _show(frame[:scored], post_processor, console) if scored else {}
    console.out(f"All predictions: {path}", highlight=False)
    if errors:
        lines = [f"{len(errors)} of {len(frame)} files could not be read:", *errors.values()]
        console.out("\n  ".join(lines), highlight=False)
        findings["unreadable"] = len(errors)
    return Kept(path, findings)


def _show(frame: pd.DataFrame, post_processor: nn.Module | None, console: Console) -> dict[str, Any]:
    """Print the most anomalous images, and what is found of all together: drift, and what labels are worth."""
    worst = frame.sort_values("pred_score", ascending=False, kind="stable").head(_SHOWN_PREDICTIONS)
    table = Table(box=box.SIMPLE_HEAD, title=f"Most anomalous of {counted(len(frame), 'image')}", title_justify="left")
    table.add_column("image", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    if "p_value" in frame:
        table.add_column("p-value", justify="right", no_wrap=True)
    table.add_column("label", no_wrap=True)
    names = {True: "anomalous", False: "normal"}
    for _, row in worst.iterrows():
        p_value = [f"{row['p_value']:.2g}"] if "p_value" in row else []
        label = "" if pd.isna(row["pred_label"]) else names[bool(row["pred_label"])]
        table.add_row(escape(row["image_path"]), f"{row['pred_score']:.4g}", *p_value, label)
    console.print(table)
    if not isinstance(post_processor, ConformalPostProcessor) or not post_processor.calibrated:
        return {}
    drift = post_processor.drift_p_value(torch.tensor(frame["raw_score"].to_numpy()))
    console.out(
        f"Drift: p {conformal.p_text(drift)}, the chance that {len(frame):,} image{'s' * (len(frame) > 1)} of the "
        f"training distribution would differ as much from the {len(post_processor.calibration):,} calibration images "
        "as these do together.",
        highlight=False,
    )
    decision = _decision(frame, post_processor, console)
    if post_processor.level > post_processor.alpha:
        cost = conformal.few_images(len(post_processor.kept), post_processor.alpha)
        console.out(f"Labels: {cost}.", highlight=False)
    return {"decision": decision, "drift_p_value": drift}


def _decision(frame: pd.DataFrame, post_processor: ConformalPostProcessor, console: Console) -> str:
    """Print what comes of the labels: by what the images are, where that is known, or by their number alone."""
    numbers = decision_of(post_processor)
    if "label" in frame and frame["label"].notna().all():
        decision = decide(numbers, frame.assign(score=frame["raw_score"]))
        assert decision is not None  # it is calibrated
        decision.show(console)
        return decision.sentence()
    flagged = int((frame["pred_label"] == 1).sum())
    # Of a trimmed calibration no level is known.
    expected = expectation(numbers.get("level", math.nan), numbers.get("calibration_images", math.nan))
    if_normal = f"; if all were normal, {expected}" if expected else ""
    share = percent(flagged / len(frame))
    text = f"Called anomalous: {flagged:,} of {counted(len(frame), 'image')} ({share}){if_normal}."
    console.out(f"{text}\n{conformal.more_images(len(post_processor.kept))}", highlight=False)
    return text


def _rows(batch: Any) -> pd.DataFrame:
    """One row per image of a predicted batch."""
    count, label = len(batch.pred_score), batch.pred_label
    columns: dict[str, Any] = {"image_path": [str(path) for path in batch.image_path or [""] * count]}
    source = getattr(batch, "source", None)
    if source is not None:
        columns["source"] = list(source)
    truth = getattr(batch, "gt_label", None)
    if truth is not None:
        columns["label"] = truth.detach().flatten().cpu().int().numpy()
    for name in ("raw_score", "pred_score", "p_value"):  # the first and last from our post-processor
        values = getattr(batch, name, None)
        if values is not None:
            values = values.detach().flatten().cpu()
            # With all digits: rounded, a score that ties with a calibration score would no longer do so.
            columns[name] = (values.double() if name == "raw_score" else values).numpy()
    columns["pred_label"] = [None] * count if label is None else label.detach().flatten().cpu().int().numpy()
    return pd.DataFrame(columns)
