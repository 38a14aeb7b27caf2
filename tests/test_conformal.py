# SPDX-License-Identifier: Apache-2.0
"""Conformal p-values against enumeration, simulation and the definition."""

import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from anomalib_flowood import conformal
from anomalib_flowood.data.datamodules.splits import held_out

NAN, INF = float("nan"), float("inf")
scores = st.lists(st.one_of(st.integers(-3, 3).map(float), st.sampled_from([INF, -INF, 0.5])), min_size=1, max_size=30)
levels = st.integers(1, 999).map(lambda number: number / 1000)


@given(scores, scores)
def test_p_values_are_those_of_the_definition(calibration, new):
    found = conformal.p_values(torch.tensor(calibration), torch.tensor(new))
    expected = [(1 + sum(c >= score for c in calibration)) / (len(calibration) + 1) for score in new]
    assert found.tolist() == expected
    assert found.dtype == torch.float64


def test_p_values_keep_the_shape_and_the_finer_type():
    calibration = torch.tensor([1.0, 2.0])
    just_above = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert conformal.p_values(calibration, just_above).tolist() == [[1.0, 2 / 3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_p_values_of_scores_of_any_precision(dtype):
    scores = torch.tensor([[0.5, 2.0], [-1.0, torch.inf]], dtype=dtype)
    calibration = torch.tensor([2.0, 0.25, 1.0])
    found = conformal.p_values(calibration, scores)
    assert found.tolist() == [[3 / 4, 2 / 4], [1.0, 1 / 4]]
    assert found.dtype == torch.float64
    ascending = calibration.sort().values.numpy()
    assert conformal.p_values_among(ascending, scores.double().numpy()).tolist() == found.tolist()


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=25), levels)
def test_the_false_alarm_rate_of_exchangeable_images_is_at_most_alpha(values, alpha):
    # Each image is the new one once, the others calibrate: the mean over all orders of exchangeable images.
    values = torch.tensor(values, dtype=torch.float32)
    images = len(values) - 1
    kept = [torch.cat([values[:place], values[place + 1 :]]) for place in range(len(values))]
    flagged = [bool(conformal.p_values(others, value) < alpha) for others, value in zip(kept, values, strict=True)]
    rate = Fraction(sum(flagged), len(flagged))
    assert rate <= Fraction(str(alpha))
    if images >= conformal.images_needed(alpha):
        exact = Fraction(conformal.threshold_rank(images, alpha), images + 1)
        assert rate <= exact < Fraction(str(alpha))
        if len(values.unique()) == len(values):
            assert rate == exact


@pytest.mark.parametrize("alpha", [0.5, 0.4, 0.25, 0.2])
def test_the_rate_is_exact_over_all_orders(alpha):
    orders = torch.tensor(list(itertools.permutations(range(6))), dtype=torch.float32)
    flagged = [bool(conformal.p_values(order[:5], order[5]) < alpha) for order in orders]
    assert Fraction(sum(flagged), len(flagged)) == Fraction(math.ceil(Fraction(str(alpha)) * 6) - 1, 6)


@given(scores.filter(lambda values: all(map(math.isfinite, values))), levels)
def test_a_score_above_the_threshold_is_a_p_value_below_alpha(calibration, alpha):
    images = len(calibration)
    if images < conformal.images_needed(alpha):
        return
    threshold = sorted(calibration)[images - conformal.threshold_rank(images, alpha)]
    candidates = torch.tensor([*calibration, *(value + 0.1 for value in calibration), INF, -INF])
    p_values = conformal.p_values(torch.tensor(calibration), candidates)
    assert torch.equal(p_values < alpha, candidates > threshold)


@given(levels)
def test_the_images_needed_can_flag_and_one_fewer_cannot(alpha):
    needed = conformal.images_needed(alpha)
    assert needed == next(n for n in itertools.count(1) if Fraction(1, n + 1) < Fraction(str(alpha)))
    assert conformal.p_values(torch.zeros(needed), torch.tensor(1.0)) < alpha
    assert conformal.threshold_rank(needed, alpha) >= 1
    if needed > 1:
        assert not conformal.p_values(torch.zeros(needed - 1), torch.tensor(1.0)) < alpha
    with pytest.raises(ValueError, match=f"at least {needed} in-distribution validation images"):
        conformal.threshold_rank(needed - 1, alpha)


def test_a_level_is_meant_as_written():
    # In binary, 0.05 lies just above 1 / 20 and 0.7 just below 7 / 10.
    assert [conformal.images_needed(alpha) for alpha in (0.05, 0.1, 0.03, 0.7, 1e-4)] == [20, 10, 33, 1, 10_000]
    assert conformal.threshold_rank(99, 0.05) == 4
    assert conformal.threshold_rank(9, 0.7) == 6
    assert conformal.threshold_rank(999, np.float64(0.05)) == 49


def test_the_refusal_says_what_helps():
    message = (
        "alpha=0.05 takes at least 20 in-distribution validation images (label 0), and there are 19. Hold out more "
        "(val_split_ratio of the data module, of anomalib's also val_split_mode: from_train), or set alpha above 1/20, "
        "the smallest p-value that they can give."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        conformal.threshold_rank(19, 0.05)
    with pytest.raises(ValueError, match=r"and there are none. Hold out more \(val_split_ratio .*\)\.$"):
        conformal.threshold_rank(0, 0.05)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, NAN])
def test_impossible_levels(alpha):
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        conformal.images_needed(alpha)


@pytest.mark.parametrize("function", [conformal.p_values, conformal.drift_p_value])
def test_scores_without_a_rank_are_refused(function):
    good = torch.zeros(3)
    with pytest.raises(ValueError, match="1 of 2 calibration scores are NaN"):
        function(torch.tensor([0.0, NAN]), good)
    with pytest.raises(ValueError, match="2 of 3 scores are NaN"):
        function(good, torch.tensor([NAN, 0.0, NAN]))
    with pytest.raises(ValueError, match="There are no calibration scores"):
        function(torch.empty(0), good)
    with pytest.raises(ValueError, match="no scores to test for drift"):
        conformal.drift_p_value(good, torch.empty(0))


def test_the_guides_table():
    guide = (Path(__file__).parents[1] / "docs" / "decisions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) % \| ([\d.]+) % to ([\d.]+) % \|$", guide, re.MULTILINE)
    assert len(rows) == 5
    for images, *shares in rows:
        n = int(images.replace(",", ""))
        m = conformal.threshold_rank(n, 0.05)
        expected = [m / (n + 1), *stats.beta.ppf([0.05, 0.95], m, n + 1 - m)]
        assert shares == [f"{100 * share:.1f}" for share in expected]


def test_the_guides_table_of_small_folders():
    guide = (Path(__file__).parents[1] / "docs" / "decisions.md").read_text(encoding="utf-8")
    number, share = r"(\d+)", r"([\d.]+) %"
    rows = re.findall(
        rf"^\| {number} \| {number} \| {number} \| {share} \| {share} to {share} \|$", guide, re.MULTILINE
    )
    assert len(rows) == 7
    for images, held, fitted, *shares in rows:
        n = held_out(int(images), None)
        assert (int(held), int(fitted)) == (n, int(images) - n)
        m = conformal.nearest_rank(n, 0.05)
        expected = [m / (n + 1), *stats.beta.ppf([0.05, 0.95], m, n + 1 - m)]
        assert shares == [f"{100 * share:.1f}" for share in expected]


@pytest.mark.parametrize("images", [1, 2, 7, 19])
def test_too_few_images_flag_what_is_above_all_of_them(images):
    assert conformal.nearest_rank(images, 0.05) == 1
    with pytest.raises(ValueError, match=f"and there (is|are) {images}"):
        conformal.threshold_rank(images, 0.05)
    message = conformal.few_images(images, 0.05)
    assert message.startswith(
        f"With {images} held-out normal image{'s' if images > 1 else ''} the smallest p-value is "
    )
    assert f"is 1/{images + 1} = " in message
    with pytest.raises(ValueError, match="and there are none"):
        conformal.nearest_rank(0, 0.05)
    assert [conformal.nearest_rank(n, 0.05) for n in (20, 99)] == [conformal.threshold_rank(n, 0.05) for n in (20, 99)]


def test_the_cost_of_few_images_is_what_is_seen():
    """Over many calibrations of 7 images: how many fresh ones are above all of them, and how that scatters."""
    draws = np.random.default_rng(0).normal(size=(4000, 207))
    rates = (draws[:, 7:] > draws[:, :7].max(1, keepdims=True)).mean(1)
    said = re.search(r"do ([\d.]+) % .* \(([\d.]+) to ([\d.]+) % in 90", conformal.few_images(7, 0.05))
    mean, low, high = (float(number) / 100 for number in said.groups())
    assert rates.mean() == pytest.approx(mean, abs=0.005)
    assert (rates < low).mean() == pytest.approx(0.05, abs=0.03)
    assert (rates > high).mean() == pytest.approx(0.05, abs=0.03)


@pytest.mark.parametrize(("images", "fresh", "rank"), [(5, 4, 1), (5, 4, 2), (3, 6, 3)])
def test_chance_of_so_many_alarms_is_exact_over_all_orders(images, fresh, rank):
    orders = itertools.combinations(range(images + fresh), images)  # places of the calibration images, by their scores
    found = np.array([images + fresh - 1 - places[-rank] - (rank - 1) for places in orders])  # fresh ones above
    for alarms in range(fresh + 1):
        share = np.mean(found >= alarms)
        assert conformal.alarms_p_value(alarms, fresh, images, rank) == pytest.approx(share)


def test_the_drift_test_is_exact_over_all_orders():
    # Seven exchangeable scores, of which any three may be the batch.
    everything = torch.arange(7.0)
    found = []
    for batch in itertools.combinations(range(7), 3):
        chosen = torch.zeros(7, dtype=torch.bool)
        chosen[list(batch)] = True
        found.append(conformal.drift_p_value(everything[~chosen], everything[chosen]))
    found = np.array(found)
    for level in np.unique(found):
        assert (found <= level + 1e-12).mean() == pytest.approx(level)


@pytest.mark.parametrize(("images", "batch"), [(200, 200), (50, 10), (1000, 200)])
def test_drift_raises_no_more_false_alarms_than_it_says(images, batch):
    rng = np.random.default_rng(0)
    draws = 1000
    found, naive = [], []
    for _ in range(draws):
        calibration, new = torch.from_numpy(rng.normal(size=images)), torch.from_numpy(rng.normal(size=batch))
        found.append(conformal.drift_p_value(calibration, new))
        naive.append(stats.combine_pvalues(conformal.p_values(calibration, new).numpy(), method="fisher").pvalue)
    error = (0.05 * 0.95 / draws) ** 0.5
    assert (np.array(found) < 0.05).mean() < 0.05 + 3 * error
    if images == batch:  # what the test mends: Fisher's method takes the p-values for independent
        assert (np.array(naive) < 0.05).mean() > 0.05 + 5 * error


@pytest.mark.parametrize(("mean", "std"), [(0.5, 1.0), (-0.5, 1.0), (0.0, 0.5), (0.0, 2.0)])
def test_drift_is_found_in_either_direction_and_in_width(mean, std):
    rng = np.random.default_rng(0)
    found = [
        conformal.drift_p_value(torch.from_numpy(rng.normal(size=1000)), torch.from_numpy(rng.normal(mean, std, 200)))
        for _ in range(50)
    ]
    assert (np.array(found) < 0.05).mean() > 0.9


def test_ties_and_infinities_raise_no_drift_alarm():
    assert conformal.drift_p_value(torch.ones(500), torch.ones(200)) == 1
    few = torch.arange(5.0)
    assert (
        len({conformal.drift_p_value(torch.arange(20.0), scores) for scores in (few, few.bfloat16(), few.double())})
        == 1
    )
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.poisson(1.0, (300, 290)))
    found = [conformal.drift_p_value(row[:200], row[200:]) for row in counts]
    assert (np.array(found) < 0.05).mean() < 0.05
    assert conformal.drift_p_value(torch.randn(100), torch.full((50,), INF)) < 1e-9
