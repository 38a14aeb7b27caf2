# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_auc_score, roc_curve

from anomalib_flowood.metrics import AUROC, FPR95, auroc, fpr_at_tpr


def batch(scores: torch.Tensor, labels: torch.Tensor) -> ImageBatch:
    return ImageBatch(image=torch.zeros(len(scores), 3, 2, 2), pred_score=scores, gt_label=labels.bool())


def sklearn_fpr95(labels: np.ndarray, scores: np.ndarray) -> float:
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(fpr[tpr >= 0.95].min())


def agrees(scores: np.ndarray, labels: np.ndarray, batches: int = 1) -> None:
    raw, targets = torch.from_numpy(scores), torch.from_numpy(labels)
    assert auroc(raw, targets) == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert fpr_at_tpr(raw, targets) == pytest.approx(sklearn_fpr95(labels, scores), abs=1e-9)

    metrics = AUROC(prefix="image_"), FPR95(prefix="image_")
    for part in np.array_split(np.arange(len(scores)), batches):
        for metric in metrics:
            metric.update(batch(raw[part], targets[part]))
    scores = scores.astype(np.float32)  # anomalib's batches hold float32, whatever they are given
    assert metrics[0].compute().item() == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert metrics[1].compute().item() == pytest.approx(sklearn_fpr95(labels, scores), abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_agrees_with_scikit_learn_on_any_scores(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 60))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    values = st.one_of(
        st.floats(-(2.0**100), 2.0**100, width=32),
        st.sampled_from([0.0, 1.0, -1.0, 2.0**100, 2.0**-100, 0.5]),  # ties, and both edges of the sigmoid's range
    )
    scores = data.draw(hnp.arrays(dtype, n, elements=values))
    labels = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, 1)).filter(lambda x: 0 < x.sum() < len(x)))
    agrees(scores, labels, batches=data.draw(st.integers(1, min(n, 4))))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e4, 1e12])
@pytest.mark.parametrize("offset", [-3e3, 0.0, 5e3])
def test_twenty_thousand_likelihoods_on_any_scale(scale: float, offset: float) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 20_000)
    agrees((rng.normal(size=20_000) + 1.5 * labels) * scale + offset, labels, batches=7)


def test_a_score_that_torchmetrics_saturates() -> None:
    """The trap itself: anomalib's AUROC of the same scores is 0.5."""
    from anomalib.metrics import AUROC as SATURATING

    scores, labels = torch.arange(40.0) + 1000, torch.arange(40) >= 20
    ours, theirs = AUROC(), SATURATING(fields=["pred_score", "gt_label"])
    ours.update(batch(scores, labels))
    theirs.update(batch(scores, labels))
    assert theirs.compute().item() == pytest.approx(0.5)
    assert ours.compute().item() == 1.0


def test_batches_on_both_sides_of_the_sigmoid_range() -> None:
    """One batch inside [0, 1], one outside: torchmetrics would squash only the second."""
    scores = np.array([0.1, 0.9, 0.2, 5.0, 7.0, -3.0])
    agrees(scores, np.array([0, 1, 0, 1, 0, 1]), batches=2)


def test_constant_scores_are_chance() -> None:
    scores, labels = torch.full((10,), 7e7), torch.arange(10) % 2
    assert auroc(scores, labels) == 0.5
    assert fpr_at_tpr(scores, labels) == 1.0


def test_close_float64_scores_stay_apart() -> None:
    scores = torch.tensor([1e9, 1e9 + 1e-6, 1e9 + 2e-6, 1e9 + 3e-6], dtype=torch.float64)
    assert auroc(scores, torch.tensor([0, 0, 1, 1])) == 1.0


def test_infinite_scores_rank_as_extremes() -> None:
    assert auroc(torch.tensor([-math.inf, 0.0, 1.0, math.inf]), torch.tensor([0, 0, 1, 1])) == 1.0


def test_nan_scores_are_refused_at_once() -> None:
    for metric in (AUROC(), FPR95()):
        with pytest.raises(ValueError, match="2 of 4 scores are NaN"):
            metric.update(batch(torch.tensor([0.0, math.nan, 1.0, math.nan]), torch.tensor([0, 0, 1, 1])))


@pytest.mark.parametrize(("label", "missing"), [(0, "out-of-distribution"), (1, "in-distribution")])
def test_one_class_only_is_nan_with_a_warning(label: int, missing: str) -> None:
    for metric in (AUROC(), FPR95()):
        metric.update(batch(torch.rand(5), torch.full((5,), label)))
        with pytest.warns(UserWarning, match=f"NaN: there are no {missing}"):
            assert math.isnan(metric.compute())


def test_no_samples_at_all() -> None:
    metric = AUROC()
    with pytest.warns(UserWarning, match="there are no"):
        assert math.isnan(metric.compute())


def test_wrong_labels_and_shapes() -> None:
    with pytest.raises(ValueError, match="must be 0"):
        auroc(torch.rand(3), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        fpr_at_tpr(torch.rand(3), torch.zeros(4))


def test_names_reset_and_place_in_an_evaluator() -> None:
    metrics = AUROC(prefix="image_"), FPR95(prefix="image_")
    assert [metric.name for metric in metrics] == ["image_AUROC", "image_FPR95"]
    evaluator = Evaluator(test_metrics=metrics)
    evaluator.on_test_batch_end(None, None, None, batch(torch.arange(4.0) * 100, torch.tensor([0, 0, 1, 1])), 0)
    assert [metric.compute().item() for metric in evaluator.test_metrics] == [1.0, 0.0]
    metrics[0].reset()
    assert metrics[0].preds == []
