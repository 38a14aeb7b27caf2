# SPDX-License-Identifier: Apache-2.0
"""Detection metrics as functions of raw scores and labels.

torchmetrics passes scores outside [0, 1] through a sigmoid, batch by batch. A negative log-likelihood in the thousands
becomes 1.0 there, every image ties with every other, and the AUROC reads 0.5. It also forms the rates in float32. The
metrics here rank the raw scores, in whole numbers (AUROC) or with scikit-learn, in float64.

A higher score means out-of-distribution, which counts as positive (label 1), as in OpenOOD
(``openood/evaluators/metrics.py``, ``auc_and_fpr_recall``) and pytorch-ood. An older version of that file, and the
code of Liang et al. (ODIN, ICLR 2018, arXiv 1706.02690), count in-distribution as positive: their FPR95 is another
number.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_curve
from torch import Tensor

from anomalib_flowood.checks import refuse_nan

ArrayLike: TypeAlias = Tensor | np.ndarray
"""Tensors, or NumPy arrays, which a loaded detector returns."""

MEAN = "mean"
"""Name of the average over all out-of-distribution sets."""
GROUP = ": "
"""Separates the name of a group of sets from that of a set: ``near: cifar100``."""
INSIDE, OUTSIDE = "inside", "outside"
"""Names of all in-distribution and of all out-of-distribution images."""
NOT_DEFINED = "not defined"
"""What tables show for a metric that needs two classes where there is only one."""


_CHECKED = 2**22
"""Scores that are checked at a time: there may be many, one for each pixel."""


def check_scores(scores: Tensor, labels: Tensor) -> None:
    """Refuse scores and labels whose metrics would be meaningless.

    Args:
        scores: Scores of any shape.
        labels: Labels of the same shape.

    Raises:
        ValueError: If a score is NaN, a label is neither 0 nor 1, or the shapes differ.
    """
    if scores.shape != labels.shape:
        msg = f"Scores and labels must have the same shape, got {tuple(scores.shape)} and {tuple(labels.shape)}."
        raise ValueError(msg)
    for some, of_some in zip(scores.flatten().split(_CHECKED), labels.flatten().split(_CHECKED), strict=True):
        refuse_nan(some)
        if not bool(((of_some == 0) | (of_some == 1)).all()):
            msg = "Labels must be 0 (in-distribution) or 1 (out-of-distribution)."
            raise ValueError(msg)


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Tensor, Tensor]:
    """Return both as tensors, checked by :func:`check_scores`."""
    scores, labels = torch.as_tensor(scores).detach(), torch.as_tensor(labels).detach()
    check_scores(scores, labels)
    return scores, labels


def _of_ranks(
    measure: Callable[[np.ndarray, np.ndarray], float], scores: ArrayLike, labels: ArrayLike, name: str
) -> float:
    """Take a measure of labels and dense ranks; NaN (with a warning) if one of the two classes is absent.

    Only the order of scores counts, and scikit-learn refuses infinite ones.
    """
    scores, labels = _checked(scores, labels)
    ranks = torch.unique(scores.flatten().cpu(), return_inverse=True)[1].numpy()
    truth = labels.flatten().cpu().long().numpy()
    if len(np.unique(truth)) == 2:
        return float(measure(truth, ranks))
    return not_defined(name, outside=bool(truth.any()), stacklevel=4)


def rate_text(value: float) -> str:
    """Format a rate with three digits, or say that it is not defined."""
    return NOT_DEFINED if math.isnan(value) else f"{value:.3f}"


def not_defined(name: str, *, outside: bool, stacklevel: int) -> float:
    """Warn that a metric needs two classes and there is only one, and return NaN.

    Args:
        name: The metric's name.
        outside: Whether the one class is out-of-distribution.
        stacklevel: As for :func:`warnings.warn`.
    """
    missing = "in-distribution (label 0)" if outside else "out-of-distribution (label 1)"
    warnings.warn(f"{name} is {NOT_DEFINED}: there are no {missing} samples.", UserWarning, stacklevel=stacklevel)
    return float("nan")


_AT_ONCE = 2**16
"""Anomalous values that :func:`auroc` looks up at a time, to keep its memory small."""


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve; ties count one half.

    It is computed as the share of pairs, one of either class, that are in order (Mann and Whitney 1947), by two sorts
    in place and in whole numbers: exact to the last digit, and fast and small enough for the pixels of a test set. It
    takes about as much memory as the scores, if these are float32 or float64.

    Args:
        scores: Scores of any shape, scale and floating dtype, infinities included: of images, or of pixels.
        labels: 1 for out-of-distribution, 0 for in-distribution, same shape as ``scores``.

    Returns:
        The area, or NaN (with a warning) if one of the two classes is absent.

    Raises:
        ValueError: If a score is NaN, a label is neither 0 nor 1, or the shapes differ.
    """
    scores, labels = _checked(scores, labels)
    values, outside = scores.flatten().cpu(), (labels.flatten() == 1).cpu().numpy()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()  # NumPy has no bfloat16, and sorts float16 slowly
    # NumPy takes by a mask without the indices, of 64 bits each, that PyTorch makes of one.
    inner, outer = values.numpy()[~outside], values.numpy()[outside]
    if not (len(inner) and len(outer)):
        return not_defined("AUROC", outside=bool(len(outer)), stacklevel=3)
    inner.sort()
    outer.sort()
    twice = 0
    for start in range(0, len(outer), _AT_ONCE):
        for side in ("left", "right"):  # how many inner values are below, and how many are not above
            twice += int(np.searchsorted(inner, outer[start : start + _AT_ONCE], side=side).sum())
    return twice / (2 * len(inner) * len(outer))


def _average_precision(truth: np.ndarray, ranks: np.ndarray) -> float:
    return min(1.0, float(average_precision_score(truth, ranks)))  # the sum of the steps may round to more


def aupr_out(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the precision-recall curve, out-of-distribution positive (Hendrycks and Gimpel 2017, AUPR-Out).

    The area is the average precision, the sum of the precisions weighted by the steps in recall. OpenOOD and
    pytorch-ood join the points by straight lines, which is too optimistic (Davis and Goadrich 2006). Precision depends
    on how many images of either side there are: chance is the share of out-of-distribution images. Arguments, NaN and
    errors as for :func:`auroc`.
    """
    return _of_ranks(_average_precision, scores, labels, "AUPROut")


def aupr_in(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the precision-recall curve of the negated score, in-distribution positive (AUPR-In).

    See :func:`aupr_out`; chance is the share of in-distribution images. Arguments, NaN and errors as for :func:`auroc`.
    """
    return _of_ranks(lambda truth, ranks: _average_precision(1 - truth, -ranks), scores, labels, "AUPRIn")


def fpr_at_tpr(scores: ArrayLike, labels: ArrayLike, tpr: float = 0.95) -> float:
    """Share of in-distribution images flagged by a threshold that catches ``tpr`` of the out-of-distribution ones.

    Other arguments, NaN and errors as for :func:`auroc`.

    Args:
        scores: As there.
        labels: As there.
        tpr: The smallest admissible true positive rate (recall of the out-of-distribution side).
    """

    def measure(truth: np.ndarray, ranks: np.ndarray) -> float:
        fpr, reached, _ = roc_curve(truth, ranks, drop_intermediate=False)
        return fpr[reached >= tpr][0]

    return _of_ranks(measure, scores, labels, f"FPR{round(100 * tpr)}")


def detection_error(scores: ArrayLike, labels: ArrayLike) -> float:
    """Smallest misclassification probability of any threshold, both sides equally likely: min ½ (FPR + FNR).

    One minus the detection accuracy of Lee et al. (A simple unified framework for detecting out-of-distribution samples
    and adversarial attacks, NeurIPS 2018), and what the code of Liang et al. (ODIN, ICLR 2018) minimises. At most ½,
    which is chance. Arguments, NaN and errors as for :func:`auroc`.
    """

    def measure(truth: np.ndarray, ranks: np.ndarray) -> float:
        fpr, tpr, _ = roc_curve(truth, ranks, drop_intermediate=False)
        return 0.5 * (fpr + 1 - tpr).min()

    return _of_ranks(measure, scores, labels, "DetectionError")


DETECTION_METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "AUROC": auroc,
    "FPR95": fpr_at_tpr,
    "AUPROut": aupr_out,
    "AUPRIn": aupr_in,
    "DetectionError": detection_error,
}
"""Every metric of scores and labels, by the name of its class."""


def per_set(
    measure: Callable[[Tensor, Tensor], float], scores: ArrayLike, labels: ArrayLike, sources: Sequence[str]
) -> dict[str, float]:
    """Compute a metric for each out-of-distribution set on its own, against all in-distribution images.

    Args:
        measure: A metric of scores and labels, such as :func:`auroc`.
        scores: ``(N,)``.
        labels: 1 for out-of-distribution, 0 for in-distribution, ``(N,)``.
        sources: The set that each image belongs to, N names; those of in-distribution images do not matter.

    Returns:
        The metric by set, in alphabetical order; the unweighted average of each group of sets, where their names have
        one (``near: cifar100``), under the group's name; and last that of all sets, ``"mean"``. Empty with fewer than
        two out-of-distribution sets, where the metric over all images says the same. A set whose name is ``mean``,
        ``inside``, ``outside`` or that of a group gets a suffix: ``mean (set)``.

    Raises:
        ValueError: If there is not one source for each score, or ``measure`` refuses the scores.
    """
    if not len(sources) == len(scores) == len(labels):
        msg = f"Each of {len(scores)} scores needs a label and a source, got {len(labels)} and {len(sources)}."
        raise ValueError(msg)
    scores, labels = torch.as_tensor(scores).detach().cpu(), torch.as_tensor(labels).detach().cpu()
    outside = labels == 1
    names = np.asarray(sources, dtype=np.str_)
    sets = np.unique(names[outside.numpy()]).tolist()
    if len(sets) < 2:
        return {}
    groups = groups_of(sets)
    values = {}
    for name in sets:
        chosen = ~outside | torch.from_numpy(names == name)
        key = f"{name} (set)" if name in {MEAN, INSIDE, OUTSIDE, *groups} else name
        values[key] = measure(scores[chosen], labels[chosen])
    means = {group: float(np.mean([values[name] for name in grouped])) for group, grouped in groups.items()}
    return values | means | {MEAN: float(np.mean([*values.values()]))}


def groups_of(sets: Iterable[str]) -> dict[str, list[str]]:
    """Return the groups that sets belong to, such as OpenOOD's near and far, and the sets of each.

    Args:
        sets: Names of sets: ``near: cifar100`` belongs to ``near``, and ``mnist`` to none.
    """
    groups: dict[str, list[str]] = {}
    for name in sets:
        group, found, _ = name.partition(GROUP)
        if found:
            groups.setdefault(group, []).append(name)
    return groups
