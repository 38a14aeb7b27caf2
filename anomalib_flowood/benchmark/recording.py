# SPDX-License-Identifier: Apache-2.0
"""The raw scores of a test, as they come, and what is measured on them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_flowood import processes
from anomalib_flowood.data.seen import as_seen, moves_places, transform_of
from anomalib_flowood.metrics import DETECTION_METRICS, per_set
from anomalib_flowood.report.decisions import decision_of, without_expectation
from anomalib_flowood.report.maps import Kept, MapKeeper, shown_images


class ScoreRecorder(Callback):
    """Keeps every test image's raw score and times the test loop, data loading included.

    Lightning calls the callbacks given to the engine before the model's own, of which the post-processor is one: the
    scores are seen here before they are normalised and clamped.
    """

    def __init__(self) -> None:
        self._parts: list[pd.DataFrame] = []
        self._keeper = MapKeeper()
        self._start = 0.0
        self.seconds = 0.0
        self.sourced = False
        """Whether the data say which set each image belongs to; else its folder is taken for its source."""
        self.shown_maps: dict[str, Kept] = {}
        """Anomaly map and mask, made small, of each image that a report shows and that has them, by its path."""
        self.decision: dict[str, float] = {}
        """What the detector labels images by, see :func:`decision_of`."""

    def on_test_start(self, *_: Any) -> None:
        """Start the clock."""
        self._parts = []
        self._keeper = MapKeeper()
        self._start = time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's scores.

        Raises:
            ValueError: If the detector gives neither a score nor a map, or the images have no labels.
        """
        score: Any = getattr(outputs, "pred_score", None)
        anomaly_map: Any = getattr(outputs, "anomaly_map", None)
        if score is None and anomaly_map is None:
            msg = f"{type(pl_module).__name__} gave neither a score nor an anomaly map for the test images."
            raise ValueError(msg)
        if batch.gt_label is None:
            msg = "The test images have no labels, so there is nothing to compare scores with."
            raise ValueError(msg)
        score = anomaly_map.flatten(1).amax(dim=1) if score is None else score
        raw = score.detach().flatten().cpu().double()
        paths = [str(path) for path in batch.image_path or [""] * len(raw)]
        sources = getattr(batch, "source", None)
        self.sourced = sources is not None
        sources = [Path(path).parent.name or "test" for path in paths] if sources is None else sources
        labels = batch.gt_label.detach().flatten().cpu().int()
        columns = {"image_path": paths, "source": list(sources), "label": labels.numpy(), "score": raw.numpy()}
        own = processes.own_rows(trainer, batch_idx, len(raw), dataloader_idx)
        self._parts.append(pd.DataFrame(columns)[:own])
        loaders = getattr(trainer, "test_dataloaders", None)
        loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
        moved = moves_places(pl_module, getattr(loader, "dataset", None))
        seen = as_seen(batch.image, transform_of(pl_module)) if moved else None
        self._keeper.add(paths, anomaly_map, getattr(batch, "gt_mask", None), seen)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock before any metric is computed; bits per dimension, which no score needs, do not count.

        Of several processes each gets the scores of all.
        """
        self.seconds = time.perf_counter() - self._start - getattr(pl_module, "bits_seconds", 0.0)
        processor = getattr(pl_module, "post_processor", None)
        self.decision = decision_of(processor)
        self._parts = [processes.in_data_set_order(self.scores)]
        self.decision = without_expectation(self.decision, _judged_twice(trainer, processor, self.scores))
        paths = [path for rows in shown_images(self.scores).values() for path in rows["image_path"]]
        self.shown_maps = {
            path: kept for some in processes.gathered_objects(self._keeper.of(paths)) for path, kept in some.items()
        }

    @property
    def scores(self) -> pd.DataFrame:
        """One row per test image: ``image_path``, ``source``, ``label``, ``score``."""
        if not self._parts:
            return pd.DataFrame(columns=["image_path", "source", "label", "score"])
        return pd.concat(self._parts, ignore_index=True)


def _judged_twice(trainer: Trainer, post_processor: Any, scores: pd.DataFrame) -> int:
    """Count the normal test images that are among those which set the threshold, as far as the data module says."""
    samples = getattr(getattr(getattr(trainer, "datamodule", None), "val_data", None), "samples", None)
    if samples is None or not {"image_path", "label_index"} <= {*samples}:
        return 0
    validated = {str(path) for path in samples.loc[samples["label_index"] == 0, "image_path"]}
    tested = scores.loc[scores["label"] == 0, "image_path"]
    # A checkpoint may have been calibrated on other images than those that these data validate on.
    of_others = len(getattr(post_processor, "calibration", ())) > len(validated)
    return 0 if of_others else sum(path in validated and Path(path).is_file() for path in tested)


def measure(recorder: ScoreRecorder) -> dict[str, Any]:
    """Compute all metrics of a test's raw scores, and its speed.

    Args:
        recorder: What it recorded.

    Returns:
        The metrics by name (of every out-of-distribution set too, where the data name several), what
        :func:`decision_of` says, ``images`` and ``images_per_s``.

    Raises:
        ValueError: If a score is NaN.
    """
    scores = recorder.scores
    score, label = torch.tensor(scores["score"].to_numpy()), torch.tensor(scores["label"].to_numpy())
    result: dict[str, Any] = {
        **{name: metric(score, label) for name, metric in DETECTION_METRICS.items()},
        **recorder.decision,
        "images": len(score),
        "images_per_s": len(score) / recorder.seconds,
    }
    if recorder.sourced:
        sources = scores["source"].tolist()
        for name, metric in DETECTION_METRICS.items():
            result |= {f"{name}/{key}": value for key, value in per_set(metric, score, label, sources).items()}
    return result
