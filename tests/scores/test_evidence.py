# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from anomalib_flowood.scores import Evidence
from anomalib_flowood.scores.evidence import separations


def statistics(n: int, kinds: int = 3, seed: int = 0) -> torch.Tensor:
    """Of normal images: kinds whose means and relative deviations differ by far."""
    drawn = torch.randn(n, kinds, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor([50.0, 8.0, -2000.0][:kinds]) * (1 + torch.tensor([0.1, 0.02, 0.3][:kinds]) * drawn)


def fitted(values: torch.Tensor) -> Evidence:
    evidence = Evidence(values.shape[1]).double()
    evidence.fit(values, [1.0] * values.shape[1])
    return evidence


def test_before_a_fit_statistics_are_taken_as_they_are():
    values = torch.randn(5, 2)
    torch.testing.assert_close(Evidence(2)(values), (1 + values.exp()).log().mean(1) - math.log(2))


def test_from_many_images_each_kind_is_in_units_of_its_own_deviation():
    values = statistics(20_000)
    evidence = fitted(values)
    torch.testing.assert_close(evidence.location, values.mean(0))
    torch.testing.assert_close(evidence.spread, values.std(0), rtol=0.02, atol=0)
    standardised = evidence.standardised(values)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(standardised.std(0), torch.ones(3).double(), rtol=0.02, atol=0)
    assert float(evidence(values.mean(0)[None])) == pytest.approx(0, abs=1e-9)
    # A kind counts by how many of its deviations it is off, whatever its units.
    for kind in range(3):
        moved = values.mean(0) + 9 * values.std(0) * (torch.arange(3) == kind)
        assert float(evidence(moved[None])) == pytest.approx((9 - math.log(2)) / 3, rel=0.02)


def test_what_is_lower_than_usual_makes_up_for_nothing():
    evidence = fitted(statistics(50))
    odd = evidence.location + evidence.spread * torch.tensor([5.0, 0.0, 0.0])
    odd_and_low = evidence.location + evidence.spread * torch.tensor([5.0, -1e6, -1e6])
    as_usual, lower, lowest = evidence(torch.stack([odd, odd_and_low, evidence.location - 1e6 * evidence.spread]))
    assert float(as_usual - lower) == pytest.approx(math.log(2) * 2 / 3)
    assert float(lowest) == pytest.approx(-math.log(2))


def test_more_of_any_kind_is_more_anomalous():
    evidence = fitted(statistics(50))
    steps = torch.linspace(-20, 40, 61, dtype=torch.float64)
    for kind in range(3):
        values = evidence.location + evidence.spread * steps[:, None] * (torch.arange(3) == kind)
        assert bool((evidence(values).diff() > 0).all())


def test_weights_say_what_a_kind_counts_for():
    values = statistics(50)
    alike, weighted = fitted(values), Evidence(3).double()
    weighted.fit(values, [1.0, 0.5, 1.0])
    test = statistics(5, seed=1)
    parts = alike.parts(test) * torch.tensor([1.0, 0.5, 1.0]) * 3 / 2.5
    torch.testing.assert_close(weighted.parts(test), parts)
    torch.testing.assert_close(weighted(test), parts.sum(1))


def test_from_few_images_the_spread_is_drawn_to_what_is_common():
    values = statistics(5)
    relative = values.std(0) / values.mean(0).abs()
    evidence = fitted(values)
    found = evidence.spread / values.mean(0).abs()
    # 4 degrees of freedom of its own, 4 images of all.
    torch.testing.assert_close(found.square(), (relative.square() + relative.square().mean()) / 2)
    assert float(found.max() / found.min()) < float(relative.max() / relative.min()) / 3
    # Of one kind there is nothing else to be drawn to.
    alone = fitted(values[:, :1])
    torch.testing.assert_close(alone.spread, values[:, :1].std(0))


def test_a_kind_that_does_not_vary_counts_without_dominating():
    values = statistics(40)
    values[:, 1] = 8.0
    evidence = fitted(values)
    assert float(evidence.spread[1]) > 8 * 0.01
    assert fitted(torch.full((4, 2), 3.0)).spread.tolist() == pytest.approx([1e-6, 1e-6])


def test_it_does_not_depend_on_the_units_of_a_kind():
    values, test = statistics(7), statistics(20, seed=1)
    factors = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    torch.testing.assert_close(fitted(values * factors)(test * factors), fitted(values)(test))


def test_it_is_fitted_in_double_precision_and_travels_with_a_checkpoint():
    values = 1e5 + statistics(30)
    evidence = Evidence(3)
    evidence.fit(values.float(), [1.0, 0.5, 1.0])
    torch.testing.assert_close(evidence.location.double(), values.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(evidence.spread.double(), fitted(values).spread, rtol=1e-3, atol=0)
    assert evidence.spread.dtype == torch.float32
    again = Evidence(3)
    again.load_state_dict(evidence.state_dict())
    torch.testing.assert_close(again(values.float()), evidence(values.float()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(0, 2), "needs at least 2 normal images, got 0"),
        (torch.zeros(1, 2), "needs at least 2 normal images, got 1"),
        (torch.tensor([[1.0, 2.0], [math.nan, 1.0]]), "NaN or infinite: has the flow diverged"),
        (torch.tensor([[1.0, 2.0], [3.0, math.inf]]), "NaN or infinite: has the flow diverged"),
    ],
)
def test_what_has_no_spread_is_refused_and_changes_nothing(values, message):
    evidence = Evidence(2)
    with pytest.raises(ValueError, match=message):
        evidence.fit(values, [1.0, 0.5])
    assert evidence.location.tolist() == [0, 0]
    assert evidence.spread.tolist() == [1, 1]
    assert evidence.shares.tolist() == [0.5, 0.5]


def test_nan_stays_nan():
    assert fitted(statistics(9))(torch.tensor([[1.0, math.nan, 2.0]], dtype=torch.float64)).isnan().all()


def test_the_better_a_kind_tells_damaged_images_the_more_it_counts():
    """Gaussians of equal variance, whose separation is the distance of their means."""
    normal = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 50
    shifts = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    damaged = normal.flip(0)[:2000] + shifts
    torch.testing.assert_close(separations(normal[:2000], damaged), shifts, rtol=0.05, atol=0.07)
    evidence = Evidence(4).double()
    evidence.fit(torch.cat([damaged, normal[:2000]]), [1.0, 2.0, 1.0, 1.0], torch.arange(4000) >= 2000)
    expected = shifts * torch.tensor([1.0, 2.0, 1.0, 1.0])
    torch.testing.assert_close(evidence.shares, expected / expected.sum(), rtol=0.1, atol=0.03)
    torch.testing.assert_close(evidence.location, normal[:2000].mean(0))


def test_what_tells_all_of_them_is_not_weighted_by_how_far_off_they_are():
    normal = statistics(50, 2)
    damaged = normal + torch.tensor([1e3, 1e6])
    found = separations(normal, damaged)
    torch.testing.assert_close(found[0], found[1])
    assert float(found[0]) == pytest.approx(2.904, abs=0.01)


@pytest.mark.parametrize("damaged", [statistics(9) + 100, statistics(60) - 1000, statistics(60)], ids=str)
def test_weights_stay_if_damaged_images_are_few_or_none_of_them_is_told(damaged):
    normal = statistics(60)
    evidence = Evidence(3).double()
    evidence.fit(torch.cat([normal, damaged]), [1.0, 0.5, 1.0], torch.arange(60 + len(damaged)) < 60)
    torch.testing.assert_close(evidence.shares, torch.tensor([0.4, 0.2, 0.4], dtype=torch.float64))


def test_a_damaged_image_without_a_statistic_is_refused():
    values = statistics(60)
    values[-1, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        Evidence(3).double().fit(values, [1.0, 1.0, 1.0], torch.arange(60) < 40)
