# SPDX-License-Identifier: Apache-2.0
"""Split-conformal p-values, the decisions they allow, and a test for drift.

A detector is calibrated on the scores of n in-distribution images that it was not trained on. If a new image is
exchangeable with them, all n + 1 places among their scores are equally likely for it, whatever the detector and the
distribution. Its place is its p-value: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World (2005); for
anomaly detection Laxhammar and Falkman (2015); as a multiple test Bates, Candès, Lei, Romano and Sesia, Testing for
Outliers with Conformal p-values (2023, arXiv 2104.08279).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from anomalib_flowood.checks import refuse_nan

DEFAULT_ALPHA = 0.05
"""The level of labels unless another one is chosen."""

BY_DATA_MODULE = "(val_split_ratio of the data module, of anomalib's also val_split_mode: from_train)"
"""What holds out calibration images where nobody knows where they come from."""

HOLD_OUT = f"hold out more {BY_DATA_MODULE}"
"""What helps where there are too few of them."""


def p_values(calibration: Tensor, scores: Tensor) -> Tensor:
    """Share of the calibration images, and the image itself, that are at least as anomalous as the image.

    p = (1 + #{calibration scores ≥ score}) / (n + 1), the marginal p-value of Bates et al. 2023.

    Args:
        calibration: Scores of in-distribution images, ``(n,)``; higher is more anomalous.
        scores: Scores of other images, of any shape; they may be infinite.

    Returns:
        p-values from 1 / (n + 1) to 1, float64, shaped as ``scores``. Float64 holds them so exactly that ``p < alpha``
        never depends on rounding.

    Raises:
        ValueError: If a score is NaN, or there is no calibration score.
    """
    _check_scores(calibration, scores)
    ascending = np.sort(calibration.cpu().double().numpy(), axis=None)  # float64 holds numbers of any precision
    found = p_values_among(ascending, scores.detach().cpu().double().numpy())
    return torch.from_numpy(np.asarray(found)).to(scores.device)


def p_values_among(ascending: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The same as :func:`p_values`, float64, where the calibration scores are sorted already, and no score is NaN."""
    return (1 + len(ascending) - np.searchsorted(ascending, scores)) / (len(ascending) + 1)


def images_needed(alpha: float) -> int:
    """Return the fewest calibration images of which a p-value can be below ``alpha``.

    The smallest p-value is 1 / (n + 1), so that n + 1 > 1 / α is needed: n ≥ ⌊1 / α⌋.

    Args:
        alpha: The level, in (0, 1).

    Raises:
        ValueError: If the level is not in (0, 1).
    """
    return math.floor(1 / _exact(alpha))


def threshold_rank(images: int, alpha: float, remedy: str = HOLD_OUT) -> int:
    """Return m such that p < α exactly where the score exceeds the m-th largest calibration score.

    p < α says that 1 + k < α (n + 1), with k calibration scores that are as large. The largest such k is m - 1 with
    m = ⌈α (n + 1)⌉ - 1, and no more than m - 1 are as large exactly if the m-th is not. An image that is exchangeable
    with the calibration images takes each of the n + 1 places with the same probability, so that it is flagged with
    probability m / (n + 1) < α, and less often if scores can tie.

    Args:
        images: Number n of calibration images.
        alpha: The level, in (0, 1). It is meant as written: 0.05 is 1 / 20, and not the float beside it.
        remedy: What helps where there are too few images, for the message.

    Raises:
        ValueError: If the level is not in (0, 1), or cannot be reached with so few images: the message says how many
            are needed.
    """
    needed = images_needed(alpha)
    if images < needed:
        have = {0: "there are none", 1: "there is 1"}.get(images, f"there are {images}")
        larger = f", or set alpha above 1/{images + 1}, the smallest p-value that they can give" if images else ""
        msg = (
            f"alpha={alpha:g} takes at least {needed} in-distribution validation images (label 0), and {have}. "
            f"{remedy[0].upper()}{remedy[1:]}{larger}."
        )
        raise ValueError(msg)
    return math.ceil(_exact(alpha) * (images + 1)) - 1


def nearest_rank(images: int, alpha: float, remedy: str = HOLD_OUT) -> int:
    """Return :func:`threshold_rank`, or 1 where so few images cannot reach the level.

    With 1, images are flagged that score above all calibration images: a share of 1 / (n + 1) of those that are
    exchangeable with them, the least above 0 that there is.

    Args:
        images: Number n of calibration images.
        alpha: The level, in (0, 1).
        remedy: What helps where there are none, for the message.

    Raises:
        ValueError: If the level is not in (0, 1), or there are no images.
    """
    return 1 if 0 < images < images_needed(alpha) else threshold_rank(images, alpha, remedy)


def few_images(images: int, alpha: float) -> str:
    """Say what it costs that a level cannot be reached, in numbers.

    Args:
        images: Number n of calibration images, at least 1 and fewer than :func:`images_needed`.
        alpha: The level.
    """
    low, high = rate_interval(images, 1)
    above = f"above all {images}, as do" if images > 1 else "above it, as do"
    return (
        f"With {images} held-out normal image{'s' * (images > 1)} the smallest p-value is 1/{images + 1} = "
        f"{1 / (images + 1):.2g}, so that no image can be called anomalous at alpha = {alpha:g}. Instead those are "
        f"labelled that score {above} {100 / (images + 1):.2g} % of normal images in expectation ({100 * low:.2g} to "
        f"{100 * high:.2g} % in 90 of 100 such calibrations). alpha = {alpha:g} takes {images_needed(alpha)} of them"
    )


def rate_interval(images: int, rank: int) -> tuple[float, float]:
    """Bounds of the share of fresh normal images that one calibration flags, in 90 of 100 calibrations.

    The share is Beta(m, n + 1 - m) distributed over calibration sets (Vovk 2012, arXiv 1209.2673, proposition 2b).

    Args:
        images: Number n of calibration images.
        rank: Those are flagged that score above the m-th largest calibration score: see :func:`threshold_rank`.
    """
    low, high = stats.beta.ppf([0.05, 0.95], rank, images + 1 - rank)
    return float(low), float(high)


def alarms_p_value(alarms: int, fresh: int, images: int, rank: int) -> float:
    """Return how likely chance gives as many alarms, or more, among normal images that did not calibrate.

    The share of fresh images that raise an alarm is Beta(m, n + 1 - m) distributed over calibrations, so that their
    number is beta-binomial. It is small where the images are not like those that calibrate.

    Args:
        alarms: How many of them raise an alarm.
        fresh: Their number.
        images: Number n of calibration images.
        rank: m, the rank among these that is the threshold, at least 1.
    """
    return float(stats.betabinom.sf(alarms - 1, fresh, rank, images + 1 - rank))


def more_images(images: int) -> str:
    """Say what more calibration images would buy.

    Args:
        images: Number n of calibration images, at least 1.
    """
    who = "1 held-out normal image allows" if images == 1 else f"{images:,} held-out normal images allow"
    least = f"{who} no level below {_percent(1 / (images + 1))}"
    wanted = next((alpha for alpha in (DEFAULT_ALPHA, 0.01, 0.001) if images_needed(alpha) > images), None)
    return f"{least}." if wanted is None else f"{least}; {images_needed(wanted):,} would allow {_percent(wanted)}."


def drift_p_value(calibration: Tensor, scores: Tensor) -> float:
    """p-value of the hypothesis that a batch of images, as a whole, comes from where the calibration images come from.

    The two-sample Kolmogorov-Smirnov test of the scores, which depends on them through the batch's conformal p-values
    alone. Methods that combine independent p-values, Fisher's for one, raise more false alarms than they promise: the
    p-values of a batch share their calibration images (Bates et al. 2023). A rank test counts that in (Magnani, Sesia
    and Solari 2023, arXiv 2308.05534): all orders of exchangeable scores are equally likely. SciPy's null distribution
    is exact up to 10,000 images on either side and asymptotic beyond; ties make the test conservative. It answers to
    any difference, and so also to batches that are too likely, as digits are to many flows trained on clothes.

    Args:
        calibration: Scores of in-distribution images, ``(n,)``.
        scores: Scores of the batch, ``(N,)``.

    Raises:
        ValueError: If a score is NaN, or one of the two is empty.
    """
    _check_scores(calibration, scores)
    if scores.numel() == 0:
        msg = "There are no scores to test for drift."
        raise ValueError(msg)
    # Float64 holds numbers of any precision.
    samples = (values.detach().flatten().cpu().double().numpy() for values in (calibration, scores))
    return float(stats.ks_2samp(*samples).pvalue)


_LEAST = 1e-300
"""Below it float64 loses digits, and then all of them."""


def p_text(p_value: float, digits: int = 2, least: float = _LEAST) -> str:
    """Say what a p-value is, to stand behind a p: ``= 0.031``, or ``< 1e-300``, since none is 0.

    Args:
        p_value: The p-value.
        digits: How many to show.
        least: Below it no digits are shown.
    """
    return f"< {least:.0e}" if p_value < least else f"= {p_value:.{digits}g}"


CONTAMINATION_LEVEL = 0.01
"""Of how many clean calibrations in expectation, at most, a warning says that they look contaminated."""
_NAMED = 10
"""The most files that a warning names."""
_NO_FILES: Mapping[str, float] = {}


def contamination_p_value(calibration: Tensor) -> tuple[float, int]:
    """p-value of the hypothesis that no calibration score lies apart above the others, and how many do if any.

    Where excesses over the lower quartile have a power law's tail, the logarithms' spacings i (e_i - e_(i+1)), from the
    largest score down, are independent and exponential with one mean (Rényi 1953). A spacing among the upper tenth is
    compared with all below it, down to the median: the chance to be so large is (1 + d / rest)^-(number below), times
    the number of places looked at (Bonferroni). Lighter tails, such as a Gaussian's, have smaller spacings above than
    below, which makes the test conservative. No test can tell contamination from a tail without saying what tails are.
    Each score is taken for a draw of its own, from a continuous distribution: where images come in many copies, the
    p-values of clean calibrations are too small.

    Anomalies that lie among normal images, one by one at all distances, or that are more than a tenth are not seen.

    Args:
        calibration: Scores of calibration images, ``(n,)``, finite.

    Returns:
        The p-value, 1 for fewer than 20 images; how many scores lie above the gap.
    """
    ascending = calibration.detach().cpu().double().sort().values
    images = len(ascending)
    places, deep = images // 10, images // 2
    if places < 2:
        return 1.0, 0
    excesses = (ascending.flip(0)[: deep + 1] - torch.quantile(ascending, 0.25)).clamp(min=1e-300)
    spacings = torch.arange(1, deep + 1) * -excesses.log().diff()
    below = spacings.flip(0).cumsum(0).flip(0)[1 : places + 1].clamp(min=1e-300)
    others = deep - torch.arange(1, places + 1)
    chances = (1 + spacings[:places] / below).pow(-others)
    place = int(chances.argmin())
    return min(1.0, places * float(chances[place])), place + 1


def looks_contaminated(calibration: Tensor, contamination: float = 0.0, files: Mapping[str, float] = _NO_FILES) -> str:
    """Say that calibration scores look contaminated, and what it costs; nothing where they do not.

    Args:
        calibration: As for :func:`contamination_p_value`.
        contamination: The share that is taken for possible: see :func:`trimmed`. What it covers is not told.
        files: Scores by the files that gave them, as far as they are known.
    """
    p_value, apart = contamination_p_value(calibration)
    images = calibration.numel()
    if p_value >= CONTAMINATION_LEVEL or apart <= trimmed_number(images, contamination):
        return ""
    least = float(calibration.detach().flatten().sort().values[images - apart])
    found = sorted((name for name in files if files[name] >= least), key=lambda name: -files[name])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    which = f": {', '.join(found[:_NAMED])}{more}" if found else ""
    look = "Look at them" if found else "Look for them (`flowood predict` on the validation images names the highest)"
    return (
        f"{apart} of {images} normal validation images score far above the others (p {p_text(p_value, digits=1)})"
        f"{which}. Are there anomalies among them? They raise the threshold, in the worst case so far that nothing is "
        f"called anomalous. {look} and take out what is not normal, or leave so many out of account: "
        f"--model.post_processor.contamination {math.ceil(1000 * apart / images) / 1000:g} (ConformalPostProcessor)"
    )


def trimmed_number(images: int, contamination: float) -> int:
    """The most images that can be contaminated, k = ⌊contamination · n⌋.

    Args:
        images: Number n of calibration images.
        contamination: The largest share that may be, in [0, 0.5).

    Raises:
        ValueError: If the share is not in [0, 0.5).
    """
    if not 0 <= contamination < 0.5:
        msg = f"contamination must be at least 0 and below 0.5, got {contamination}."
        raise ValueError(msg)
    return math.floor(Fraction(str(float(contamination))) * images)


def trimmed(ascending: Tensor, contamination: float) -> Tensor:
    """Calibration scores without the k largest, where up to k of n may be of anomalies, nobody knows which.

    Let S be a fresh normal image's score, c ≤ k the number of contaminated scores, whatever they are and whoever chose
    them, and N = n - c that of clean ones, with which S is exchangeable. With p = (1 + #{kept ≥ S}) / (n - k + 1):

    - False alarms: P(p ≤ j / (n - k + 1)) ≤ (j + k) / (n - c + 1) for every whole j, and so, at a level α with its rank
      m = :func:`threshold_rank` (n - k, α), P(p < α) ≤ (m + k) / (n - k + 1) < α + k / (n - k + 1).
      Proof: p ≤ j / (n - k + 1) says that at most j - 1 kept scores are ≥ S. With the k that were dropped, at most
      j + k - 1 of all are, and so of the clean ones. S is then among the j + k largest of N + 1 exchangeable scores,
      where it is with probability (j + k) / (N + 1) at most.
    - No blindness: the threshold is at most the m-th largest clean score, wherever the contaminated ones lie.
      Proof: it is the (m + k)-th largest of all; k of those above or at it can be contaminated, so m are clean.
    - Where the k dropped are the contaminated ones, as those far above the others, what is kept is a clean calibration:
      P(p < α) ≤ m / (n - k + 1) < α. Where nothing is contaminated the first bound is (m + k) / (n + 1): that is the
      price, since no rule can tell a normal image that scores high from an anomaly.

    Args:
        ascending: Calibration scores, sorted, ``(n,)``.
        contamination: The largest share of them that may be contaminated, k / n: see :func:`trimmed_number`.

    Returns:
        The n - k smallest, ``(n - k,)``.
    """
    return ascending[: len(ascending) - trimmed_number(len(ascending), contamination)]


def trimmed_bound(images: int, contamination: float, rank: int) -> float:
    """The largest share of fresh normal images that is flagged in expectation, (m + k) / (n - k + 1): :func:`trimmed`.

    Args:
        images: Number n of calibration images, before any is dropped.
        contamination: The largest share of them that may be contaminated.
        rank: m; those are flagged that score above the m-th largest score that is kept.
    """
    dropped = trimmed_number(images, contamination)
    return (rank + dropped) / (images - dropped + 1)


def price_of_trimming(images: int, contamination: float, rank_of: Callable[[int], int]) -> str:
    """Say what is promised where some calibration images may be anomalies; nothing where none may.

    Args:
        images: Number n of calibration images, before any is dropped.
        contamination: The largest share of them that may be contaminated.
        rank_of: Gives the rank m of the threshold among a number of scores.
    """
    dropped = trimmed_number(images, contamination)
    if not dropped:
        return ""
    rank = rank_of(images - dropped)
    return (
        f"The highest {dropped} of {images} calibration scores are left out of account (contamination "
        f"{contamination:g}). If no more images are anomalies, at most "
        f"{100 * trimmed_bound(images, contamination, rank):.3g} % of normal images are labelled anomalous in "
        f"expectation; {100 * rank / (images - dropped + 1):.3g} % if these are"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _exact(alpha: float) -> Fraction:
    if not 0 < alpha < 1:
        msg = f"alpha must lie between 0 and 1, got {alpha}."
        raise ValueError(msg)
    return Fraction(str(float(alpha)))


def _check_scores(calibration: Tensor, scores: Tensor) -> None:
    refuse_nan(calibration, "calibration scores")
    refuse_nan(scores)
    if calibration.numel() == 0:
        msg = "There are no calibration scores: validate on in-distribution images first."
        raise ValueError(msg)
