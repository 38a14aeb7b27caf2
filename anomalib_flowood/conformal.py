# SPDX-License-Identifier: Apache-2.0
"""Split-conformal p-values, the decisions they allow, and a test for drift.

A detector is calibrated on the scores of n in-distribution images that it was not trained on. If a new image is
exchangeable with them, its score is equally likely to take any of the n + 1 ranks among theirs, whatever the detector
and the distribution. That rank gives the p-value: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World
(2005); for anomaly detection Laxhammar and Falkman (2015); for multiple testing Bates, Candès, Lei, Romano and Sesia,
Testing for Outliers with Conformal p-values (2023, arXiv 2104.08279).
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
"""Default level: images with a p-value below it are labelled anomalous."""

BY_DATA_MODULE = "(val_split_ratio of the data module, of anomalib's also val_split_mode: from_train)"
"""How to hold out calibration images, for messages that cannot name the data module."""

HOLD_OUT = f"hold out more {BY_DATA_MODULE}"
"""The remedy that messages give where there are too few calibration images."""


def p_values(calibration: Tensor, scores: Tensor) -> Tensor:
    """Conformal p-value of each score: the share of images, itself included, that are at least as anomalous.

    p = (1 + #{calibration scores ≥ score}) / (n + 1), the marginal p-value of Bates et al. 2023.

    Args:
        calibration: Scores of in-distribution images, ``(n,)``; higher is more anomalous.
        scores: Scores of other images, of any shape; they may be infinite.

    Returns:
        p-values from 1 / (n + 1) to 1, shaped as ``scores``; float64, so that ``p < alpha`` never depends on rounding.

    Raises:
        ValueError: If a score is NaN, or there is no calibration score.
    """
    _check_scores(calibration, scores)
    ascending = np.sort(_float64(calibration), axis=None)
    found = p_values_among(ascending, _float64(scores))
    return torch.from_numpy(np.asarray(found)).to(scores.device)


def p_values_among(ascending: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """As :func:`p_values`, for calibration scores that are sorted already, and scores without NaN; float64."""
    return (1 + len(ascending) - np.searchsorted(ascending, scores)) / (len(ascending) + 1)


def images_needed(alpha: float) -> int:
    """Return the fewest calibration images with which a p-value can be below ``alpha``.

    The smallest p-value is 1 / (n + 1), so that n + 1 > 1 / α is needed: n ≥ ⌊1 / α⌋.

    Args:
        alpha: The level, in (0, 1).

    Raises:
        ValueError: If the level is not in (0, 1).
    """
    return math.floor(1 / _exact(alpha))


def threshold_rank(images: int, alpha: float, remedy: str = HOLD_OUT) -> int:
    """Return m such that p < α exactly where the score exceeds the m-th largest calibration score.

    p < α means 1 + k < α (n + 1), where k calibration scores are at least as large as the image's. The largest such k
    is m - 1 with m = ⌈α (n + 1)⌉ - 1, and k ≤ m - 1 exactly if the m-th largest calibration score is smaller. An image
    that is exchangeable with the calibration images takes each of the n + 1 ranks with the same probability, so that
    it is flagged with probability m / (n + 1) < α, and less often if scores can tie.

    Args:
        images: Number n of calibration images.
        alpha: The level, in (0, 1). It is taken as written: 0.05 is exactly 1 / 20, not the nearest float.
        remedy: What to do about too few images, for the message.

    Raises:
        ValueError: If the level is not in (0, 1), or cannot be reached with so few images; the message says how many
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
    """Return :func:`threshold_rank`, or 1 where there are too few images to reach the level.

    At rank 1, images that score above all calibration images are flagged: a share of 1 / (n + 1) of those that are
    exchangeable with them, the smallest above 0 that is possible.

    Args:
        images: Number n of calibration images.
        alpha: The level, in (0, 1).
        remedy: What to do if there are none, for the message.

    Raises:
        ValueError: If the level is not in (0, 1), or there are no images.
    """
    return 1 if 0 < images < images_needed(alpha) else threshold_rank(images, alpha, remedy)


def few_images(images: int, alpha: float) -> str:
    """Say what it costs, in numbers, that there are too few calibration images for a level.

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
    """Bounds between which the share of new normal images that are flagged lies for 90 of 100 calibration sets.

    Over calibration sets the share follows Beta(m, n + 1 - m) (Vovk 2012, arXiv 1209.2673, proposition 2b).

    Args:
        images: Number n of calibration images.
        rank: m; images that score above the m-th largest calibration score are flagged: see :func:`threshold_rank`.
    """
    low, high = stats.beta.ppf([0.05, 0.95], rank, images + 1 - rank)
    return float(low), float(high)


def alarms_p_value(alarms: int, fresh: int, images: int, rank: int) -> float:
    """Return the probability of at least this many alarms among normal images outside the calibration set.

    Over calibration sets the share of new images that raise an alarm follows Beta(m, n + 1 - m), so that their number
    is beta-binomial. A small probability says that the images are not like the calibration images.

    Args:
        alarms: How many of the images raise an alarm.
        fresh: How many images there are.
        images: Number n of calibration images.
        rank: m, at least 1: the m-th largest calibration score is the threshold.
    """
    return float(stats.betabinom.sf(alarms - 1, fresh, rank, images + 1 - rank))


def more_images(images: int) -> str:
    """Say which levels the calibration images allow, and how many a lower level takes.

    Args:
        images: Number n of calibration images, at least 1.
    """
    who = "1 held-out normal image allows" if images == 1 else f"{images:,} held-out normal images allow"
    least = f"{who} no level below {_percent(1 / (images + 1))}"
    wanted = next((alpha for alpha in (DEFAULT_ALPHA, 0.01, 0.001) if images_needed(alpha) > images), None)
    return f"{least}." if wanted is None else f"{least}; {images_needed(wanted):,} would allow {_percent(wanted)}."


def drift_p_value(calibration: Tensor, scores: Tensor) -> float:
    """p-value of the hypothesis that a batch of images comes from the same distribution as the calibration images.

    The two-sample Kolmogorov-Smirnov test of the scores, which depends on them only through the batch's conformal
    p-values. Methods for independent p-values, such as Fisher's, would raise more false alarms than they promise,
    because the p-values of a batch share their calibration images (Bates et al. 2023). A rank test accounts for that
    (Magnani, Sesia and Solari 2023, arXiv 2308.05534): all orders of exchangeable scores are equally likely. SciPy's
    null distribution is exact up to 10,000 images on either side and asymptotic beyond; ties make the test
    conservative. It detects any difference, and so also batches that are too likely, as digits are to many flows
    trained on clothes.

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
    return float(stats.ks_2samp(_float64(calibration).ravel(), _float64(scores).ravel()).pvalue)


_LEAST = 1e-300
"""About where float64 begins to lose digits; not far below, everything is 0."""


def p_text(p_value: float, digits: int = 2, least: float = _LEAST) -> str:
    """Format a p-value to follow the letter p: ``= 0.031``, or ``< 1e-300``, since no p-value is 0.

    Args:
        p_value: The p-value.
        digits: Significant digits.
        least: Below it, only the bound is shown.
    """
    return f"< {least:.0e}" if p_value < least else f"= {p_value:.{digits}g}"


CONTAMINATION_LEVEL = 0.01
"""Level of the test: at most this share of clean calibration sets is warned of, in expectation."""
_NAMED = 10
"""Most files that a warning names."""
_NO_FILES: Mapping[str, float] = {}


def contamination_p_value(calibration: Tensor) -> tuple[float, int]:
    """p-value of the hypothesis that the highest calibration scores are not set apart by a gap, and how many are.

    If the excesses over the lower quartile have a power-law tail, the normalised spacings i (e_i - e_(i+1)) of their
    logarithms, from the largest score down, are independent and exponential with one mean (Rényi 1953). Each spacing in
    the upper tenth is compared with all those below it, down to the median: a spacing d is at least as large as
    observed with probability (1 + d / (sum of those below))^-(number of those below), which is multiplied by the number
    of places tested (Bonferroni). Lighter tails, such as a Gaussian's, have smaller spacings above than below, which
    makes the test conservative. No test can tell contamination from a heavy tail without an assumption about tails.
    Scores are assumed to be independent draws from a continuous distribution: if images come in many copies, the
    p-values of clean calibration sets are too small.

    Anomalies whose scores lie scattered among those of normal images, or which are more than a tenth, are not detected.

    Args:
        calibration: Scores of calibration images, ``(n,)``, finite.

    Returns:
        The p-value, 1 for fewer than 20 images; how many scores lie above the gap.
    """
    ascending = calibration.detach().cpu().double().sort().values
    images = len(ascending)
    places, half = images // 10, images // 2
    if places < 2:
        return 1.0, 0
    excesses = (ascending.flip(0)[: half + 1] - torch.quantile(ascending, 0.25)).clamp(min=1e-300)
    spacings = torch.arange(1, half + 1) * -excesses.log().diff()
    sum_below = spacings.flip(0).cumsum(0).flip(0)[1 : places + 1].clamp(min=1e-300)
    number_below = half - torch.arange(1, places + 1)
    probabilities = (1 + spacings[:places] / sum_below).pow(-number_below)
    place = int(probabilities.argmin())
    return min(1.0, places * float(probabilities[place])), place + 1


def looks_contaminated(calibration: Tensor, contamination: float = 0.0, files: Mapping[str, float] = _NO_FILES) -> str:
    """Say that calibration scores look contaminated, and what that costs; the empty string if they do not.

    Args:
        calibration: As for :func:`contamination_p_value`.
        contamination: The share that may be contaminated, see :func:`trimmed`; no warning is given of what it covers.
        files: Scores by the names of the files that they belong to, as far as these are known.
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
    """Return the largest number of images that may be contaminated, k = ⌊contamination · n⌋.

    Args:
        images: Number n of calibration images.
        contamination: The largest share that may be contaminated, in [0, 0.5).

    Raises:
        ValueError: If the share is not in [0, 0.5).
    """
    if not 0 <= contamination < 0.5:
        msg = f"contamination must be at least 0 and below 0.5, got {contamination}."
        raise ValueError(msg)
    return math.floor(Fraction(str(float(contamination))) * images)


def trimmed(ascending: Tensor, contamination: float) -> Tensor:
    """Drop the k largest calibration scores, where up to k of n may belong to anomalies, and nobody knows which.

    Let S be the score of a new normal image, c ≤ k the number of contaminated scores, whatever their values and however
    they were chosen, and N = n - c the number of clean ones, with which S is exchangeable. With
    p = (1 + #{kept ≥ S}) / (n - k + 1):

    - False alarms: P(p ≤ j / (n - k + 1)) ≤ (j + k) / (n - c + 1) for every integer j, and so, at a level α with its
      rank m = :func:`threshold_rank` (n - k, α), P(p < α) ≤ (m + k) / (n - k + 1) < α + k / (n - k + 1).
      Proof: p ≤ j / (n - k + 1) means that at most j - 1 kept scores are ≥ S. With the k dropped ones, at most
      j + k - 1 of all scores are, and so at most as many clean ones. S is then among the j + k largest of N + 1
      exchangeable scores, which has a probability of at most (j + k) / (N + 1).
    - Power: the threshold is at most the m-th largest clean score, whatever the contaminated ones are.
      Proof: it is the (m + k)-th largest of all; at most k of those at or above it are contaminated, so at least m are
      clean.
    - If the k dropped scores are exactly the contaminated ones, as when these lie far above the others, the kept ones
      are a clean calibration set: P(p < α) ≤ m / (n - k + 1) < α. If nothing is contaminated, the first bound is
      (m + k) / (n + 1). That is the price: no rule can tell a high-scoring normal image from an anomaly.

    Args:
        ascending: Calibration scores, sorted, ``(n,)``.
        contamination: The largest share of them that may be contaminated, k / n: see :func:`trimmed_number`.

    Returns:
        The n - k smallest, ``(n - k,)``.
    """
    return ascending[: len(ascending) - trimmed_number(len(ascending), contamination)]


def trimmed_bound(images: int, contamination: float, rank: int) -> float:
    """Return the bound of :func:`trimmed` on the expected share of normal images flagged: (m + k) / (n - k + 1).

    Args:
        images: Number n of calibration images, before any is dropped.
        contamination: The largest share of them that may be contaminated.
        rank: m; images that score above the m-th largest kept score are flagged.
    """
    dropped = trimmed_number(images, contamination)
    return (rank + dropped) / (images - dropped + 1)


def price_of_trimming(images: int, contamination: float, rank_of: Callable[[int], int]) -> str:
    """Say which share of false alarms is guaranteed if some calibration images may be anomalies; "" if none may.

    Args:
        images: Number n of calibration images, before any is dropped.
        contamination: The largest share of them that may be contaminated.
        rank_of: Returns the rank m of the threshold among a given number of scores.
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


def _float64(values: Tensor) -> np.ndarray:
    """Return values of any precision, on any device, as an array; float64 holds them all exactly."""
    return values.detach().cpu().double().numpy()


def _exact(alpha: float) -> Fraction:
    """Return the level as it was written, in decimal."""
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
