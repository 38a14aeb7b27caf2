# SPDX-License-Identifier: Apache-2.0
"""What a threshold makes of scores: alarms, what is missed, and how each source fares."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch

from anomalib_flowood.metrics import auroc


@dataclass(frozen=True)
class Decision:
    """By what a job labels images, and what comes of it.

    Attributes:
        threshold: Images with a higher raw score raise an alarm.
        alpha: The level that was asked for; NaN where p-values do not set the threshold.
        level: Share of fresh inside images that raise an alarm, in expectation; NaN likewise.
        true_negatives: Inside images without an alarm.
        false_positives: Inside images with one.
        false_negatives: Outside images that are missed.
        true_positives: Outside images that are found.
    """

    threshold: float
    alpha: float
    level: float
    true_negatives: int
    false_positives: int
    false_negatives: int
    true_positives: int

    @property
    def inside(self) -> int:
        """Number of inside images."""
        return self.true_negatives + self.false_positives

    @property
    def outside(self) -> int:
        """Number of outside images."""
        return self.false_negatives + self.true_positives

    def __str__(self) -> str:
        """What comes of it, in a sentence."""
        parts = []
        if self.inside:
            expected = "" if math.isnan(self.level) else f"; expected: {percent(self.level)}"
            alarms = f"{self.false_positives:,} of {self.inside:,} inside images raise an alarm"
            parts.append(f"{alarms} ({percent(self.false_positives / self.inside)}{expected})")
        if self.outside:
            share = percent(self.true_positives / self.outside)
            parts.append(f"{self.true_positives:,} of {self.outside:,} outside images are found ({share})")
        return f"{', '.join(parts)}."


def percent(share: float) -> str:
    """A share in percent, with two digits."""
    return "-" if math.isnan(share) else f"{100 * share:.3g}\u00a0%"


def decide(job: pd.Series, scores: pd.DataFrame) -> Decision | None:
    """Label a job's test images.

    Args:
        job: Its row of ``results.csv``: ``threshold``, and ``alpha`` and ``level`` where inside images alone set it.
        scores: Its test images: ``label`` and ``score``.

    Returns:
        What comes of it; ``None`` for a job without a threshold.
    """
    threshold, alpha, level = (float(job.get(name, math.nan)) for name in ("threshold", "alpha", "level"))
    if math.isnan(threshold):
        return None
    alarm = (scores["score"] > threshold).to_numpy()
    outside = (scores["label"] == 1).to_numpy()
    counts = (~outside & ~alarm, ~outside & alarm, outside & ~alarm, outside & alarm)
    return Decision(threshold, alpha, level, *(int(count.sum()) for count in counts))


def kinds(scores: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Measure how each source of outside images fares against all inside ones.

    Args:
        scores: One job's test images: ``source``, ``label`` and ``score``.
        threshold: Images with a higher score raise an alarm; NaN if there is none.

    Returns:
        A row for each source, in order of appearance: ``kind``, ``images``, ``found`` (how many, NaN without a
        threshold), ``AUROC`` (NaN without inside images) and ``median`` (of the scores).
    """
    inside = torch.tensor(scores.loc[scores["label"] == 0, "score"].to_numpy(float))
    rows = []
    for source, group in scores[scores["label"] == 1].groupby("source", sort=False)["score"]:
        values = torch.tensor(group.to_numpy(float))
        labels = torch.tensor([0] * len(inside) + [1] * len(values))
        rows.append(
            {
                "kind": str(source),
                "images": len(values),
                "found": math.nan if math.isnan(threshold) else int((values > threshold).sum()),
                "AUROC": auroc(torch.cat([inside, values]), labels) if len(inside) else math.nan,
                "median": float(group.median()),
            }
        )
    return pd.DataFrame(rows, columns=["kind", "images", "found", "AUROC", "median"])
