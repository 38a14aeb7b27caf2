# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from anomalib_flowood import conformal
from benchmarks.false_alarms import false_alarm_rates


@pytest.mark.parametrize(("images", "alpha"), [(20, 0.05), (100, 0.05), (137, 0.3), (500, 0.01)])
def test_false_alarm_rates_over_many_splits(images, alpha):
    # Splits of one set are exchangeable too, so that the expectation is exact for it.
    values = np.random.default_rng(0).gamma(2.0, size=1000)
    rates = false_alarm_rates(values, images, alpha, splits=1000)
    expected = conformal.threshold_rank(images, alpha) / (images + 1)
    error = rates.std() / len(rates) ** 0.5
    assert abs(rates.mean() - expected) < 4 * error
    assert rates.mean() <= alpha + 4 * error


def test_false_alarm_rates_are_those_of_p_values_and_can_be_repeated():
    values = np.random.default_rng(1).normal(size=80).round(1)  # with ties
    rates = false_alarm_rates(values, 45, 0.1, splits=7, seed=3)
    assert rates.shape == (7,)
    drawn = np.random.default_rng(3).permuted(np.tile(values, (7, 1)), axis=1)
    expected = [
        (conformal.p_values(torch.from_numpy(row[:45]), torch.from_numpy(row[45:])) < 0.1).double().mean()
        for row in drawn
    ]
    np.testing.assert_allclose(rates, expected)
    np.testing.assert_array_equal(rates, false_alarm_rates(torch.from_numpy(values), 45, 0.1, 7, 3))
    with pytest.raises(ValueError, match="leaves none of 80 images"):
        false_alarm_rates(values, 80)
    with pytest.raises(ValueError, match="at least 20"):
        false_alarm_rates(values, 19)
    with pytest.raises(ValueError, match="1 of 80 scores are NaN"):
        false_alarm_rates(np.where(np.arange(80) == 5, np.nan, values), 45)
