# SPDX-License-Identifier: Apache-2.0
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from anomalib_flowood.data.datasets import SourcedImageBatch
from anomalib_flowood.metrics import (
    AUROC,
    DETECTION_METRICS,
    FPR95,
    AUPRIn,
    AUPROut,
    BitsPerDim,
    BitsPerDimMedian,
    DetectionError,
    F1Score,
    SetMetric,
    aupr_in,
    aupr_out,
    auroc,
    detection_error,
    fpr_at_tpr,
    per_set,
)
from benchmarks import pixel_auroc
from benchmarks.peak import anonymous

CLASSES = {cls.__name__: cls for cls in (AUROC, FPR95, AUPROut, AUPRIn, DetectionError)}


def sklearn_fpr95(labels: np.ndarray, scores: np.ndarray) -> float:
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(fpr[tpr >= 0.95].min())


def sklearn_detection_error(labels: np.ndarray, scores: np.ndarray) -> float:
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(((fpr + 1 - tpr) / 2).min())


REFERENCES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "AUROC": roc_auc_score,
    "FPR95": sklearn_fpr95,
    "AUPROut": average_precision_score,
    "AUPRIn": lambda labels, scores: average_precision_score(1 - labels, -scores),
    "DetectionError": sklearn_detection_error,
}


def batch(scores: torch.Tensor, labels: torch.Tensor, sources: list[str] | None = None) -> ImageBatch:
    fields = {"image": torch.zeros(len(scores), 3, 2, 2), "pred_score": scores, "gt_label": labels.bool()}
    return ImageBatch(**fields) if sources is None else SourcedImageBatch(**fields, source=sources)


def agrees(scores: np.ndarray, labels: np.ndarray, batches: int = 1) -> None:
    raw, targets = torch.from_numpy(scores), torch.from_numpy(labels)
    metrics = {name: cls(prefix="image_") for name, cls in CLASSES.items()}
    for part in np.array_split(np.arange(len(scores)), batches):
        for metric in metrics.values():
            metric.update(batch(raw[part], targets[part]))
    single = scores.astype(np.float32)  # anomalib's batches hold float32, whatever they are given
    for name, reference in REFERENCES.items():
        assert DETECTION_METRICS[name](raw, targets) == pytest.approx(reference(labels, scores), abs=1e-9)
        assert metrics[name].compute().item() == pytest.approx(reference(labels, single), abs=1e-9)
        assert metrics[name].compute_sets() == {}


def test_every_metric_has_a_function_and_a_class() -> None:
    assert DETECTION_METRICS.keys() == CLASSES.keys() == REFERENCES.keys()
    for name, cls in CLASSES.items():
        assert cls.measure is DETECTION_METRICS[name]


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
    scores, labels = torch.full((10,), 7e7), torch.arange(10) % 5 == 0
    assert auroc(scores, labels) == 0.5
    assert fpr_at_tpr(scores, labels) == 1.0
    assert aupr_out(scores, labels) == pytest.approx(0.2)
    assert aupr_in(scores, labels) == pytest.approx(0.8)
    assert detection_error(scores, labels) == 0.5


def test_known_values() -> None:
    """Worked by hand: scores 1 2 3 4 5 6, out-of-distribution at 3, 5 and 6."""
    scores, labels = torch.arange(6.0), torch.tensor([0, 0, 1, 0, 1, 1])
    assert auroc(scores, labels) == pytest.approx(8 / 9)
    assert fpr_at_tpr(scores, labels) == pytest.approx(1 / 3)
    assert aupr_out(scores, labels) == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert aupr_in(scores, labels) == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert detection_error(scores, labels) == pytest.approx(1 / 6)


def test_a_recall_of_exactly_95_percent_is_enough() -> None:
    scores, labels = torch.tensor([10.0] * 19 + [-1.0] + [0.0] * 5), torch.tensor([1] * 20 + [0] * 5)
    assert fpr_at_tpr(scores, labels) == 0
    assert fpr_at_tpr(scores, labels, tpr=0.951) == 1


def test_a_detector_that_is_always_wrong_is_not_turned_round() -> None:
    scores, labels = torch.arange(6.0), torch.tensor([1, 1, 1, 0, 0, 0])
    assert auroc(scores, labels) == 0
    assert fpr_at_tpr(scores, labels) == 1
    assert detection_error(scores, labels) == 0.5  # a threshold beyond all scores


def test_the_detection_error_does_not_depend_on_how_many_images_a_side_has() -> None:
    inside, outside = torch.tensor([0.0, 1, 2, 9]), torch.tensor([3.0, 4, 5, 6])
    labels = torch.tensor([0] * 4 + [1] * 4)
    error = detection_error(torch.cat([inside, outside]), labels)
    many = torch.cat([inside, outside.repeat(50)]), torch.cat([labels[:4], torch.ones(200, dtype=torch.int)])
    assert error == detection_error(*many) == 1 / 8
    assert aupr_out(torch.cat([inside, outside]), labels) < aupr_out(*many)


def test_close_float64_scores_stay_apart() -> None:
    scores = torch.tensor([1e9, 1e9 + 1e-6, 1e9 + 2e-6, 1e9 + 3e-6], dtype=torch.float64)
    assert auroc(scores, torch.tensor([0, 0, 1, 1])) == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_auroc_of_many_tied_pixels_is_exact(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(4, 1, 200, 200, generator=generator) < 0.5  # more than are looked up at a time
    maps = (10 * torch.randn(masks.shape, generator=generator) + 3 * masks).round().to(dtype)
    before = maps.clone()
    value = auroc(maps, masks)
    assert value == pytest.approx(roc_auc_score(masks.flatten().numpy(), maps.flatten().double().numpy()), abs=1e-12)
    inner, outer = maps[~masks].long(), maps[masks].long()
    counts = [torch.bincount(values - before.long().min(), minlength=200) for values in (inner, outer)]
    below = counts[0].cumsum(0) - counts[0]
    pairs = int((counts[1] * (2 * below + counts[0])).sum())
    assert value == pairs / (2 * len(inner) * len(outer))
    assert torch.equal(maps, before)  # the sorts are of copies


def test_auroc_of_pixels_takes_little_memory() -> None:
    """scikit-learn's on ranks took 25 times the memory of the scores."""
    if anonymous() is None:
        pytest.skip("anonymous memory is read from /proc, which this system lacks")
    # In a process of its own, in which no other test has threads. Many pixels, beside which 20 MiB of buffers and of
    # what allocators keep are little: it is 2 to 3 times their memory.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        above_rest = pool.submit(pixel_auroc.measure, "metrics.auroc", 16, 512, torch.get_num_threads()).result()[2]
    maps, masks = pixel_auroc.test_set(16, 512)
    assert 0 < above_rest < 6 * maps.nbytes
    metric = AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_")
    metric.update(ImageBatch(image=torch.zeros(16, 3, 2, 2), anomaly_map=maps, gt_mask=masks.bool()))
    assert sum(state.nbytes for state in (*metric.preds, *metric.target)) == 5 * maps.numel()


@pytest.mark.parametrize("name", CLASSES)
def test_infinite_scores_rank_as_extremes(name: str) -> None:
    scores = np.array([-np.inf, 0.0, 1.0, 1.0, 2.0, np.inf, np.inf, 3.0])
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    finite = np.nan_to_num(scores, posinf=100.0, neginf=-100.0)
    assert DETECTION_METRICS[name](torch.from_numpy(scores), torch.from_numpy(labels)) == pytest.approx(
        REFERENCES[name](labels, finite), abs=1e-12
    )


@pytest.mark.parametrize("name", CLASSES)
def test_nan_scores_are_refused_at_once(name: str) -> None:
    scores, labels = torch.tensor([0.0, math.nan, 1.0, math.nan]), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="2 of 4 scores are NaN"):
        CLASSES[name]().update(batch(scores, labels))
    with pytest.raises(ValueError, match="2 of 4 scores are NaN"):
        DETECTION_METRICS[name](scores, labels)


@pytest.mark.parametrize(("label", "missing"), [(0, "out-of-distribution"), (1, "in-distribution")])
@pytest.mark.parametrize("name", CLASSES)
def test_one_class_only_is_nan_with_a_warning(name: str, label: int, missing: str) -> None:
    metric = CLASSES[name]()
    metric.update(batch(torch.rand(5), torch.full((5,), label)))
    with pytest.warns(UserWarning, match=f"^{name} is not defined: there are no {missing}"):
        assert math.isnan(metric.compute())


@pytest.mark.parametrize(("label", "missing"), [(False, "out-of-distribution"), (True, "in-distribution")])
@pytest.mark.parametrize("predicted", [False, True])
def test_f1_of_one_class_only_is_no_number(label: bool, missing: str, predicted: bool) -> None:
    metric, both = F1Score(prefix="image_"), F1Score()
    one = ImageBatch(
        image=torch.rand(3, 3, 8, 8), pred_label=torch.tensor([predicted] * 3), gt_label=torch.tensor([label] * 3)
    )
    metric.update(one)
    with pytest.warns(UserWarning, match=f"^image_F1Score is not defined: there are no {missing}"):
        assert math.isnan(metric.compute())
    both.update(one)
    both.update(one.update(in_place=False, gt_label=~one.gt_label))
    assert both.compute() == pytest.approx(2 / 3 if predicted else 0)  # no alarm at all is a zero
    assert F1Score(strict=False).compute() is None


def test_no_samples_at_all() -> None:
    metric = AUROC()
    with pytest.warns(UserWarning, match="there are no"):
        assert math.isnan(metric.compute())
    assert metric.compute_sets() == {}


def test_wrong_labels_and_shapes() -> None:
    with pytest.raises(ValueError, match="must be 0"):
        auroc(torch.rand(3), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        fpr_at_tpr(torch.rand(3), torch.zeros(4))


def test_names_reset_and_place_in_an_evaluator() -> None:
    metrics = [cls(prefix="image_") for cls in CLASSES.values()]
    assert [metric.name for metric in metrics] == [f"image_{name}" for name in CLASSES]
    assert [metric.title for metric in metrics] == [*CLASSES]
    evaluator = Evaluator(test_metrics=metrics)
    evaluator.on_test_batch_end(None, None, None, batch(torch.arange(4.0) * 100, torch.tensor([0, 0, 1, 1])), 0)
    assert [metric.compute().item() for metric in evaluator.test_metrics] == [1.0, 0.0, 1.0, 1.0, 0.0]
    metrics[0].reset()
    assert metrics[0].preds == metrics[0].target == metrics[0].source == []


# -- sets ------------------------------------------------------------------------------------------------------------


def test_per_set_takes_every_inside_image_and_one_outside_set() -> None:
    scores = torch.tensor([0.0, 1, 2, 3, 4, 5, -1, 1.5])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    sources = ["a", "b", "a", "b", "far", "far", "near", "near"]
    values = per_set(auroc, scores, labels, sources)
    assert values == {"far": 1.0, "near": 0.25, "mean": 0.625}
    assert list(values) == ["far", "near", "mean"]


def test_one_set_has_nothing_of_its_own_and_names_of_our_own_are_kept_apart() -> None:
    scores, labels = torch.arange(4.0), torch.tensor([0, 1, 1, 1])
    assert per_set(auroc, scores, labels, ["in", "x", "x", "x"]) == {}
    assert [*per_set(auroc, scores, labels, ["in", "mean", "outside", "T-shirt/top"])] == [
        "T-shirt/top",
        "mean (set)",
        "outside (set)",
        "mean",
    ]


def test_per_set_without_inside_images() -> None:
    with pytest.warns(UserWarning, match="there are no in-distribution"):
        values = per_set(auroc, torch.rand(3), torch.ones(3), ["x", "y", "y"])
    assert values.keys() == {"x", "y", "mean"}
    assert all(math.isnan(value) for value in values.values())


def test_a_source_is_missing() -> None:
    with pytest.raises(ValueError, match="Each of 3 scores needs a label and a source, got 3 and 2"):
        per_set(auroc, torch.rand(3), torch.tensor([0, 1, 1]), ["x", "y"])
    with pytest.raises(ValueError, match="Each of the 3 scores needs a source, got 2"):
        AUROC().update(batch(torch.rand(3), torch.tensor([0, 1, 1]), ["x", "y"]))


SETS = ["inside", "mnist", "ümlaut/ß", "kmnist"]  # the first is the inside


@st.composite
def sourced_scores(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Scores, labels and sources of four sets in any order, each with at least one image."""
    number = draw(hnp.arrays(np.int64, draw(st.integers(0, 30)), elements=st.integers(0, 3)))
    number = draw(st.permutations([0, 1, 2, 3, *number.tolist()]))
    values = st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, 1.0]))
    scores = torch.from_numpy(draw(hnp.arrays(np.float32, len(number), elements=values)))
    return scores, torch.tensor(number) > 0, np.array(SETS)[number]


def parts(n: int, batches: int) -> Iterator[np.ndarray]:
    return (part for part in np.array_split(np.arange(n), batches) if len(part))


@settings(max_examples=60, deadline=None)
@given(sourced_scores(), st.integers(1, 5), st.randoms())
def test_one_pass_is_as_good_as_a_pass_for_each_set(
    data: tuple[torch.Tensor, torch.Tensor, np.ndarray], batches: int, random: object
) -> None:
    scores, labels, sources = data
    order = torch.tensor(random.sample(range(len(scores)), len(scores)))  # type: ignore[attr-defined]
    for name, cls in CLASSES.items():
        one_pass, shuffled = cls(), cls()
        for part in parts(len(scores), batches):
            one_pass.update(batch(scores[part], labels[part], sources[part].tolist()))
            other = order[part]
            shuffled.update(batch(scores[other], labels[other], sources[other.numpy()].tolist()))
        values = {key: value.item() for key, value in one_pass.compute_sets().items()}
        assert values == {key: value.item() for key, value in shuffled.compute_sets().items()}
        assert values.keys() == {*SETS[1:], "mean"}
        for source in SETS[1:]:
            chosen = np.isin(sources, [SETS[0], source])
            separate = cls()
            separate.update(batch(scores[chosen], labels[chosen]))
            assert values[source] == separate.compute().item()
            finite = np.nan_to_num(scores[chosen].double().numpy(), posinf=1e39, neginf=-1e39)
            assert values[source] == pytest.approx(REFERENCES[name](labels[chosen].numpy() * 1, finite), abs=1e-9)
        assert values["mean"] == pytest.approx(np.mean([values[source] for source in SETS[1:]]), abs=1e-12)


def test_a_batch_without_sources_is_a_set_of_its_own() -> None:
    metric = AUROC()
    metric.update(batch(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 1, 1])))
    assert metric.compute_sets() == {}
    metric.update(batch(torch.tensor([0.5, 0.2]), torch.tensor([0, 1]), ["in", "mnist"]))
    values = {name: value.item() for name, value in metric.compute_sets().items()}
    assert values == {"mnist": 0.5, "outside (set)": 1.0, "mean": 0.75}


def test_pixels_belong_to_no_set() -> None:
    metric = AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False)
    maps = torch.rand(3, 1, 2, 2)
    metric.update(
        SourcedImageBatch(
            image=torch.zeros(3, 3, 2, 2),
            anomaly_map=maps,
            gt_mask=(maps > 0.5).squeeze(1),
            source=["in", "mnist", "kmnist"],
        )
    )
    assert metric.compute().item() == 1.0
    assert metric.compute_sets() == {}
    assert metric.title == "pixel_AUROC"


def states(metric: SetMetric) -> list[torch.Tensor]:
    # torchmetrics gathers an empty tensor in the place of an empty list.
    return [torch.cat(getattr(metric, name) or [torch.tensor([])]) for name in metric._reductions]


@pytest.mark.parametrize("cls", [*CLASSES.values(), BitsPerDim, BitsPerDimMedian])
def test_ranks_that_saw_other_sets_gather_to_the_same_numbers(cls: type[SetMetric]) -> None:
    """The second rank saw no image of the first one's outside sets, and names of another length."""
    scores, labels = torch.rand(12), torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1])
    sources = ["in", "mnist", "svhn", "in", "mnist", "in", *["kmnist"] * 2, "in", "in", "ümlaut", "kmnist"]
    first, second = slice(0, 5), slice(5, 12)

    def part(rows: slice) -> ImageBatch:
        chosen = batch(scores[rows], labels[rows], sources[rows])
        chosen.bits_per_dim = scores[rows]  # type: ignore[attr-defined]
        return chosen

    other = cls()
    other.update(part(second))
    gathered = iter([*states(other), *states(other)])  # once for the sets, once for all images
    rank = cls(
        dist_sync_fn=lambda state, group: [state, next(gathered)],
        distributed_available_fn=lambda: True,
    )
    rank.update(part(first))
    alone = cls()
    alone.update(part(slice(0, 12)))
    sets = rank.compute_sets()
    assert sets == alone.compute_sets()
    assert {"mnist", "svhn", "kmnist", "ümlaut", "mean"} <= sets.keys()
    assert rank.compute() == alone.compute()
    assert len(torch.cat(rank.preds)) == 5  # the rank has its own images back


# -- bits per dimension ----------------------------------------------------------------------------------------------


def bits_batch(bits: list[float], labels: list[int], sources: list[str] | None = None) -> ImageBatch:
    chosen = batch(torch.zeros(len(bits)), torch.tensor(labels), sources)
    chosen.bits_per_dim = torch.tensor(bits)  # type: ignore[attr-defined]
    return chosen


def test_bits_per_dimension_of_both_sides() -> None:
    metric = BitsPerDim()
    metric.update(bits_batch([1.0, 2.0, 7.0], [0, 0, 1]))
    metric.update(bits_batch([6.0, 8.0], [0, 1]))
    assert (metric.name, metric.compute().item()) == ("BitsPerDim/inside", 3.0)
    assert {name: value.item() for name, value in metric.compute_sets().items()} == {"outside": 7.5}


def test_bits_per_dimension_of_every_set() -> None:
    metric = BitsPerDim(prefix="image_")
    metric.update(bits_batch([1.0, 2.0, 7.0, 4.0, 4.0], [0, 0, 1, 1, 1], ["in", "in", "x", "y", "y"]))
    assert metric.name == "BitsPerDim/inside"
    values = {name: value.item() for name, value in metric.compute_sets().items()}
    assert values == {"outside": 5.0, "x": 7.0, "y": 4.0, "mean": 5.5}


def test_bits_per_dimension_are_summed_in_float64() -> None:
    rng = np.random.default_rng(0)
    bits = rng.normal(3, 1e-3, 100_000).astype(np.float32)
    metric = BitsPerDim()
    for part in np.array_split(bits, 50):
        metric.update(bits_batch(part.tolist(), [0] * len(part)))
    assert metric.compute().item() == pytest.approx(bits.astype(np.float64).mean(), abs=1e-9)


def test_bits_per_dimension_that_cannot_be_had() -> None:
    metric = BitsPerDim(strict=False)
    metric.update(batch(torch.rand(3), torch.tensor([0, 1, 1]), ["in", "x", "y"]))
    assert not metric.update_called
    assert metric.compute_sets() == {}
    with pytest.raises(ValueError, match="missing required field: bits_per_dim"):
        BitsPerDim().update(batch(torch.rand(3), torch.tensor([0, 1, 1])))
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        BitsPerDim().update(bits_batch([1.0, math.nan], [0, 1]))


def test_bits_per_dimension_of_one_side_only() -> None:
    metric = BitsPerDim()
    metric.update(bits_batch([1.0, 2.0], [0, 0]))
    with pytest.warns(UserWarning, match="BitsPerDim is not defined: there are no out-of-distribution"):
        assert math.isnan(metric.compute_sets()["outside"])
    assert metric.compute().item() == 1.5


@pytest.mark.parametrize("rest", [[], [math.inf]])
def test_an_image_without_density_has_infinitely_many_bits(rest: list[float]) -> None:
    for metric, expected in ((BitsPerDim(), math.inf), (BitsPerDimMedian(), math.inf if rest else 2.0)):
        bits = [1.0, math.inf, 2.0, *rest, 2.0]
        metric.update(bits_batch(bits, [*[0] * (len(bits) - 1), 1]))
        assert metric.compute().item() == expected


def test_the_median_is_not_carried_by_few_images() -> None:
    metric = BitsPerDimMedian()
    metric.update(bits_batch([1.0, 2.0, 4.0, 630.0, 7.0, 9.0], [0, 0, 0, 0, 1, 1], [*["in"] * 4, "x", "y"]))
    assert (metric.name, metric.compute().item()) == ("BitsPerDimMedian/inside", 3.0)
    values = {name: value.item() for name, value in metric.compute_sets().items()}
    assert values == {"outside": 8.0, "x": 7.0, "y": 9.0, "mean": 8.0}
