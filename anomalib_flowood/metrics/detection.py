# SPDX-License-Identifier: Apache-2.0
"""Detection metrics for anomalib's evaluator, over all images and for every out-of-distribution set on its own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from anomalib.data import Batch
from anomalib.metrics import AnomalibMetric
from anomalib.metrics import F1Score as AnomalibF1Score
from anomalib.metrics.aupro import _AUPRO
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from anomalib_flowood.flows import with_doubles

from . import bins
from .functional import (
    INSIDE,
    OUTSIDE,
    aupr_in,
    aupr_out,
    auroc,
    check_scores,
    detection_error,
    fpr_at_tpr,
    not_defined,
    per_set,
)


class _Scores(Metric):
    """Keeps scores, labels and sources until a subclass measures them all at once."""

    is_differentiable = False
    full_state_update = False
    preds: list[Tensor]
    target: list[Tensor]
    source: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("preds", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")
        # Names as NUL-terminated bytes: ranks can gather these without agreeing on codes.
        self.add_state("source", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor, source: Sequence[str] | None = None) -> None:
        """Store one batch.

        Args:
            preds: Raw scores, ``(N,)``, or ``(N, 1)`` as those of anomalib's Padim; or of pixels, ``(N, 1, H, W)``,
                which belong to no set.
            target: Labels, 0 or 1 (or booleans), ``(N,)``; of pixels of the shape of their scores.
            source: The set that each image belongs to, N names. Images without belong to one set.

        Raises:
            ValueError: If a score is NaN, a label is neither 0 nor 1, the shapes differ, or there is not one source for
                each score.
        """
        preds = preds.squeeze(-1) if preds.shape == (*target.shape, 1) else preds
        check_scores(preds, target)
        self._keep(preds.detach(), target.detach())
        if preds.ndim != 1:
            return
        names = [OUTSIDE] * len(preds) if source is None else source
        if len(names) != len(preds):
            msg = f"Each of the {len(preds)} scores needs a source, got {len(names)}."
            raise ValueError(msg)
        # Encoded as file names are, since names may come from folders.
        text = os.fsencode("".join(f"{name}\0" for name in names))
        # With its type, which an empty list does not say.
        self.source.append(torch.tensor(list(text), dtype=torch.uint8, device=preds.device))

    def _keep(self, preds: Tensor, target: Tensor) -> None:
        self.preds.append(preds.flatten())
        self.target.append(target.flatten().to(torch.uint8))  # small: there may be a label for each pixel

    @staticmethod
    def measure(scores: Tensor, labels: Tensor) -> float:
        """The metric as a function of scores and labels."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Return the metric over all images, ``()``, float64."""
        return torch.tensor(self.measure(_cat(self.preds), _cat(self.target)), dtype=torch.float64)

    def compute_sets(self) -> dict[str, Tensor]:
        """Return the metric for each set, as :func:`~anomalib_flowood.metrics.per_set` does; scalars, float64."""
        if not self.update_called:
            return {}
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            preds, target, source = _cat(self.preds), _cat(self.target), _cat(self.source)
        if len(source) == 0:
            return {}
        names = os.fsdecode(source.cpu().numpy().tobytes()).split("\0")[:-1]
        values = self._measure_sets(preds, target, names)
        place = with_doubles(preds.device)
        return {name: torch.tensor(value, dtype=torch.float64, device=place) for name, value in values.items()}

    def _measure_sets(self, scores: Tensor, labels: Tensor, sources: Sequence[str]) -> dict[str, float]:
        return per_set(self.measure, scores, labels, sources)


def _cat(state: list[Tensor]) -> Tensor:
    return dim_zero_cat(state) if len(state) else torch.zeros(0)


def _counts(state: list[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """The counts of this process that a state holds, made when they are first needed."""
    if not state:
        state.append(bins.no_counts(like, dtype))
    return state[0]


class SetMetric(AnomalibMetric, _Scores):
    """A metric that has a value over all images, and one for every out-of-distribution set on its own.

    The sets come from the batch's ``source``, one name per image, as the batches of
    :class:`~anomalib_flowood.data.CrossDataset` and :class:`~anomalib_flowood.data.OneClass` have it. Without it there
    is one set. :class:`PerSetEvaluator` logs both; anomalib's evaluator only the value over all images.

    Scores are ranked as they are, whatever their scale. With one class only a value is NaN, with a warning; a NaN score
    raises a ``ValueError`` when it arrives.

    Args:
        fields: What to read from a batch: scores and labels.
        prefix: Put in front of the class's name.
        strict: Refuse a batch without these fields; else it is passed over.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    default_fields = ("pred_score", "gt_label")

    def __init__(
        self, fields: Sequence[str] | None = None, prefix: str = "", strict: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(fields, prefix, strict, **kwargs)
        self.title = self.name.removeprefix("image_")
        """The name under which sets are listed: ``AUROC/mnist``."""

    def update(self, batch: Batch) -> None:  # type: ignore[override]
        """Store one batch; see the class for what is read from it."""
        super().update(batch, source=getattr(batch, "source", None))


class AUROC(SetMetric):
    """Area under the ROC curve, :func:`~anomalib_flowood.metrics.auroc`.

    The pixels of maps larger than 512 × 512 are counted in bins: see :mod:`anomalib_flowood.metrics.bins`.

    Example:
        >>> import torch
        >>> from anomalib.data import ImageBatch
        >>> metric = AUROC(prefix="image_")
        >>> batch = ImageBatch(
        ...     image=torch.rand(4, 3, 8, 8),
        ...     pred_score=torch.tensor([1000.0, 1001.0, 1002.0, 1003.0]),
        ...     gt_label=torch.tensor([0, 0, 1, 1]),
        ... )
        >>> metric.update(batch)
        >>> metric.name, metric.compute().item()
        ('image_AUROC', 1.0)
    """

    higher_is_better = True
    measure = staticmethod(auroc)
    counts: list[Tensor]

    def __init__(
        self, fields: Sequence[str] | None = None, prefix: str = "", strict: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(fields, prefix, strict, **kwargs)
        self.add_state("counts", default=[], dist_reduce_fx="cat")

    def _keep(self, preds: Tensor, target: Tensor) -> None:
        if bins.are_large(preds):
            bins.count(_counts(self.counts, preds, torch.int64), preds, target)
        else:
            super()._keep(preds, target)

    def compute(self) -> Tensor:
        """Return the area over all images, ``()``, float64."""
        if not len(self.counts):
            return super().compute()
        counts = _cat(self.counts)  # a copy
        if len(self.preds):  # of small maps
            bins.count(counts[: 2 * bins.BINS], _cat(self.preds), _cat(self.target))
        found = bins.occupied(counts)
        area, error = bins.auroc_of(found)
        if math.isnan(area):
            not_defined(self.name, outside=bool(found[1].any()), stacklevel=3)
        bins.tell(self.name, error)
        return torch.tensor(area, dtype=torch.float64)


class AUPROut(SetMetric):
    """Average precision, out-of-distribution positive, :func:`~anomalib_flowood.metrics.aupr_out`."""

    higher_is_better = True
    measure = staticmethod(aupr_out)


class AUPRIn(SetMetric):
    """Average precision of the negated score, in-distribution positive, :func:`~anomalib_flowood.metrics.aupr_in`."""

    higher_is_better = True
    measure = staticmethod(aupr_in)


class FPR95(SetMetric):
    """False positive rate at 95 % recall of the out-of-distribution side, which is positive.

    See :func:`~anomalib_flowood.metrics.fpr_at_tpr`.
    """

    higher_is_better = False
    measure = staticmethod(fpr_at_tpr)


class DetectionError(SetMetric):
    """Smallest ½ (FPR + FNR) of any threshold, :func:`~anomalib_flowood.metrics.detection_error`."""

    higher_is_better = False
    measure = staticmethod(detection_error)


class _RegionOverlap(_AUPRO):
    """anomalib's per-region overlap; of large maps the pixels are counted, and not kept."""

    name: str
    counts: list[Tensor]
    regions: Tensor
    fpr_limit: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", default=[], dist_reduce_fx="cat")
        self.add_state("regions", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep or count maps, ``(N, 1, H, W)``, and masks, ``(N, H, W)``; errors as for :func:`check_scores`."""
        check_scores(preds.reshape(target.shape), target)
        if bins.are_large(preds):
            counts = _counts(self.counts, preds, torch.float64)
            self.regions += bins.count_overlap(counts, preds.detach(), target.detach())
        else:
            super().update(preds, target)

    def perform_cca(self) -> Tensor:
        """Number the regions of all masks, ``(N, H, W)``; anomalib finds none in a mask without a normal pixel."""
        target = _cat(self.target)
        return bins.regions_of(target.cpu().numpy()).to(target.device)

    def compute(self) -> Tensor:
        """Return the area, ``()``."""
        if len(self.counts):
            counts, regions = _cat(self.counts), int(self.regions)
            if len(self.preds):  # of small maps
                regions += bins.count_overlap(counts[: 2 * bins.BINS], _cat(self.preds), _cat(self.target))
            area, error = bins.aupro_of(bins.occupied(counts), regions, float(self.fpr_limit))
            if not math.isnan(area):
                bins.tell(self.name, error)
                return torch.tensor(area)
            return torch.tensor(not_defined(self.name, outside=bool(regions), stacklevel=3))
        target = _cat(self.target)
        if bool(target.any()) and not bool(target.all()):
            return super().compute()
        return torch.tensor(not_defined(self.name, outside=bool(target.any()), stacklevel=3))


class AUPRO(AnomalibMetric, _RegionOverlap):  # type: ignore[misc]  # as anomalib makes its own
    """anomalib's area under the per-region overlap, up to a false positive rate of 0.3, of maps.

    NaN, with a warning, where no pixel is anomalous, or all are: anomalib's is 0 then. The pixels of maps larger than
    512 × 512 are counted in bins: see :mod:`anomalib_flowood.metrics.bins`.
    """


class F1Score(AnomalibF1Score):
    """anomalib's F1 score of labels, but NaN, with a warning, where one of the two classes is absent.

    torchmetrics' score is 0 without anomalous images, whether or not there are alarms, and up to 1 without normal ones,
    however many of these would be flagged.
    """

    default_fields = ("pred_label", "gt_label")

    def update(self, batch: Batch) -> None:  # type: ignore[override]
        """Count one batch, which is empty where another process has the remaining images."""
        labels = getattr(batch, self.fields[0], None)
        if labels is None or len(labels):
            super().update(batch)

    def compute(self) -> Tensor:
        """Return the score, ``()``; ``None`` if no batch had labels and ``strict`` is off."""
        value = super().compute()
        counts: Any = self  # typed as lists, too, which only an average over single samples would have
        outside, inside = int(counts.tp + counts.fn), int(counts.tn + counts.fp)
        if value is None or (outside and inside):
            return value
        return torch.full_like(value, not_defined(self.name, outside=bool(outside), stacklevel=3))


def _of_label(middle: Callable[[Tensor], float], values: Tensor, labels: Tensor, label: int) -> float:
    chosen = values[labels == label].cpu().double()
    if len(chosen) == 0:
        return not_defined("BitsPerDim", outside=not label, stacklevel=4)
    return middle(chosen)


class BitsPerDim(SetMetric):
    """Mean of the images' bits per dimension, −log2 p(x) / D, of pixels averaged over the dequantisation's noise.

    The value is that of the in-distribution images, ``BitsPerDim/inside``, which the literature calls a flow's test
    likelihood: lower is better. The sets are all out-of-distribution images, ``outside``, and each set where there are
    several. It says nothing about detection: a flow may find the outside more likely.

    Detectors put ``bits_per_dim``, ``(N,)``, into a test batch where the score is a likelihood. From other detectors
    there is no value with ``strict=False``.

    Args:
        fields: What to read from a batch: bits per dimension and labels.
        prefix: Put in front of the class's name.
        strict: Refuse a batch without these fields; else it is passed over.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False
    default_fields = ("bits_per_dim", "gt_label")

    def __init__(
        self, fields: Sequence[str] | None = None, prefix: str = "", strict: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(fields, prefix, strict, **kwargs)
        self.name = f"{self.title}/{INSIDE}"

    @staticmethod
    def middle(bits: Tensor) -> float:
        """The mean of bits, ``(N,)``."""
        return float(bits.mean())

    @classmethod
    def measure(cls, scores: Tensor, labels: Tensor) -> float:
        """Return the value of in-distribution images."""
        return _of_label(cls.middle, scores, labels, 0)

    def _measure_sets(self, scores: Tensor, labels: Tensor, sources: Sequence[str]) -> dict[str, float]:
        outside = partial(_of_label, self.middle, label=1)
        return {OUTSIDE: outside(scores, labels)} | per_set(outside, scores, labels, sources)


class BitsPerDimMedian(BitsPerDim):
    """Median of the images' bits per dimension: a few images can dominate the mean, :class:`BitsPerDim`."""

    @staticmethod
    def middle(bits: Tensor) -> float:
        """The median of bits, ``(N,)``, which may be infinite; of an even number the mean of the middle two."""
        return float(np.median(bits.cpu().numpy()))
