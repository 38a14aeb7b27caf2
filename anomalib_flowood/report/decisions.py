# SPDX-License-Identifier: Apache-2.0
"""What a threshold makes of scores: alarms, what is missed, and how each source fares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from anomalib_flowood import conformal
from anomalib_flowood.metrics import auroc
from anomalib_flowood.names import counted

_CHANCE = 1e-3
"""Probability below which alarms are not taken for chance."""
_TINY = 1e-9
"""Below it nobody reads the digits, and rounding has them."""


@dataclass(frozen=True)
class Decision:
    """By what a job labels images, and what comes of it.

    Attributes:
        threshold: Images with a higher raw score raise an alarm.
        alpha: The level that was asked for; NaN where p-values do not set the threshold.
        level: Share of fresh inside images that raise an alarm, in expectation; NaN likewise.
        calibration_images: Number of inside images that have set the threshold; NaN likewise.
        true_negatives: Inside images without an alarm.
        false_positives: Inside images with one.
        false_negatives: Outside images that are missed.
        true_positives: Outside images that are found.
        judged_twice: Inside images that are among those which have set the threshold.
    """

    threshold: float
    alpha: float
    level: float
    calibration_images: float
    true_negatives: int
    false_positives: int
    false_negatives: int
    true_positives: int
    judged_twice: int = 0

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
        return self.text()

    def text(self, inside: str = "inside", outside: str = "outside") -> str:
        """What comes of it, in a sentence.

        Args:
            inside: What to call inside images.
            outside: What to call outside images.
        """
        parts = []
        if self.inside:
            expected = expectation(self.level, self.calibration_images)
            verb = "raises" if self.inside == 1 else "raise"
            alarms = f"{self.false_positives:,} of {counted(self.inside, f'{inside} image')} {verb} an alarm"
            parts.append(f"{alarms} ({percent(self.false_positives / self.inside)}{expected and f'; {expected}'})")
        if self.outside:
            share = percent(self.true_positives / self.outside)
            verb = "is" if self.outside == 1 else "are"
            parts.append(
                f"{self.true_positives:,} of {counted(self.outside, f'{outside} image')} {verb} found ({share})"
            )
        return f"{', '.join(parts)}.{self._beyond_chance(inside)}{self._once_more(inside)}"

    def _beyond_chance(self, inside: str) -> str:
        """Say that more inside images raise an alarm than chance explains, where that is so."""
        if math.isnan(self.level) or math.isnan(self.calibration_images):
            return ""
        images = int(self.calibration_images)
        rank = round(self.level * (images + 1))
        chance = conformal.alarms_p_value(self.false_positives, self.inside, images, rank)
        if chance < _CHANCE:
            p = conformal.p_text(chance, 1, _TINY)
            return (
                f" Chance does not give so many alarms (p {p}): these {inside} images are unlike those that "
                "it was fitted to and calibrated on (camera, light, position), those came in series of near copies, "
                f"or not all of these are {inside}."
            )
        return ""

    def _once_more(self, inside: str) -> str:
        """Say that images are judged which have set the threshold, where there are any."""
        if not self.judged_twice:
            return ""
        same = "Validation and test images are the same (val_split_mode same_as_test)"
        some = f"{self.judged_twice:,} of the {inside} ones are validation images, too"
        which = same if self.judged_twice == self.inside else some
        return f" {which}: the threshold is from them, so that this does not say how many other ones raise an alarm."

    def sentence(self) -> str:
        """What comes of it, by normal and anomalous images, and at which level."""
        return self.at("alpha") + self.text("normal", "anomalous")

    def at(self, alpha: str) -> str:
        """Name the level, to stand before what comes of it; nothing where it is not known."""
        if self.level > self.alpha:
            return f"At a {self.level_in_words(alpha)} ({alpha} = {self.alpha:g} takes more images to calibrate on): "
        return "" if math.isnan(self.alpha) else f"At {self.level_in_words(alpha)}: "

    def level_in_words(self, alpha: str) -> str:
        """Name the level that was asked for, as ``alpha``, or the higher one that few calibration images allow."""
        if self.level > self.alpha:
            return f"level of {percent(self.level)}"
        return "" if math.isnan(self.alpha) else f"{alpha} = {self.alpha:g}"

    def table(self) -> Table:
        """The confusion matrix."""
        table = Table(box=box.SIMPLE_HEAD, title="Labels of the test images", title_justify="left")
        table.add_column("images")
        for label in ("labelled normal", "labelled anomalous"):
            table.add_column(label, justify="right")
        if self.inside:
            table.add_row("normal", f"{self.true_negatives:,}", f"{self.false_positives:,}")
        if self.outside:
            table.add_row("anomalous", f"{self.false_negatives:,}", f"{self.true_positives:,}")
        return table

    def show(self, console: Console) -> None:
        """Print the confusion matrix, what it says, and what more images to calibrate on would buy."""
        console.print(self.table())
        console.out(self.sentence(), highlight=False)
        if not math.isnan(self.calibration_images):
            console.out(conformal.more_images(int(self.calibration_images)), highlight=False)


def expectation(level: float, calibration_images: float) -> str:
    """Say which share of inside images is expected to raise an alarm, after calibration on so many images.

    Either may be NaN where it is not known; without the share nothing is said.
    """
    if math.isnan(level):
        return ""
    expected = f"expected: at most {percent(level)}"
    if math.isnan(calibration_images):
        return expected
    images = int(calibration_images)
    low, high = conformal.rate_interval(images, round(level * (images + 1)))
    return f"{expected}, {100 * low:.2g} to {percent(high)} in 90 of 100 calibrations on {counted(images, 'image')}"


def percent(share: float) -> str:
    """A share in percent, with three digits."""
    return "-" if math.isnan(share) else f"{100 * share:.3g}\u00a0%"


def decision_of(post_processor: Any) -> dict[str, float]:
    """Return what a detector labels images by, of the post-processor of any of anomalib's detectors, or of none.

    Returns:
        ``threshold``, the raw score above which an image is labelled anomalous. Where normal images alone set it, also
        ``alpha``, ``level``, the share of fresh normal images that are labelled so in expectation, and
        ``calibration_images``, how many have set it. What is not there or not known is left out.
    """
    found = {"threshold": "image_threshold", "alpha": "alpha", "level": "level"}
    values = {name: getattr(post_processor, attribute, None) for name, attribute in found.items()}
    numbers = {name: float(value) for name, value in values.items() if value is not None}
    if "level" in numbers:
        numbers["calibration_images"] = len(post_processor.calibration)
    if getattr(post_processor, "contamination", 0):  # between the level and the bound of conformal.trimmed
        del numbers["level"], numbers["calibration_images"]
    return {} if math.isnan(numbers.get("threshold", math.nan)) else numbers


JUDGED_TWICE = "judged_twice"
"""The column of ``results.csv`` that counts inside test images among those which have set the threshold."""


def without_expectation(decision: Mapping[str, float], judged_twice: int) -> dict[str, float]:
    """Leave what is expected of fresh images out of a decision, if some of the test images have set its threshold."""
    if not judged_twice:
        return dict(decision)
    kept = {name: value for name, value in decision.items() if name not in {"level", "calibration_images"}}
    return {**kept, JUDGED_TWICE: judged_twice}


def decide(job: Mapping[str, Any] | pd.Series, scores: pd.DataFrame) -> Decision | None:
    """Label a job's test images.

    Args:
        job: Its row of ``results.csv``: ``threshold``, and what else :func:`decision_of` returns where inside images
            alone set it.
        scores: Its test images: ``label`` and ``score``.

    Returns:
        What comes of it; ``None`` for a job without a threshold.
    """
    names = ("threshold", "alpha", "level", "calibration_images")
    threshold, alpha, level, calibration_images = (float(job.get(name, math.nan)) for name in names)
    if math.isnan(threshold):
        return None
    twice = float(job.get(JUDGED_TWICE, math.nan))
    alarm = (scores["score"] > threshold).to_numpy()
    outside = (scores["label"] == 1).to_numpy()
    counts = (~outside & ~alarm, ~outside & alarm, outside & ~alarm, outside & alarm)
    numbers = [int(count.sum()) for count in counts] + [0 if math.isnan(twice) else int(twice)]
    return Decision(threshold, alpha, level, calibration_images, *numbers)


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
