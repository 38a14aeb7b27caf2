# SPDX-License-Identifier: Apache-2.0
"""An image may be unlike any other where none of its positions is: by the mean over it."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from anomalib_flowood.models.components.folds import folds
from anomalib_flowood.models.feature_map_flow.mean_features import MeanFeatures
from anomalib_flowood.models.feature_map_flow.training_rows import TrainingRows

DIMS = 6


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIMS, DIMS, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, DIMS, dtype=torch.float64, generator=generator) @ mixing + 3


def fitted(points: torch.Tensor) -> MeanFeatures:
    means = MeanFeatures(DIMS).double()
    means.fit(points)
    return means


def test_it_is_minus_log_p_of_a_gaussian_with_a_full_covariance():
    points, new = drawn(4000), drawn(20, seed=1)
    covariance = (points - points.mean(0)).T @ (points - points.mean(0)) / len(points)
    expected = -MultivariateNormal(points.mean(0), covariance).log_prob(new) / DIMS
    torch.testing.assert_close(fitted(points)(new), expected, rtol=0.02, atol=0.02)  # hardly shrunk: there are many


@pytest.mark.parametrize("copies", [1, 2])
def test_training_images_are_scored_by_fits_to_others(copies):
    points = drawn(30 * copies)
    unseen = MeanFeatures(DIMS).double().fit(points, TrainingRows(30, copies))
    expected = [fitted(points[rest])(points[part[::copies]]) for rest, part in folds(len(points), copies)]
    torch.testing.assert_close(unseen, torch.cat(expected))
    assert len(unseen) == 30


def test_forgetting_leaves_the_standard_normal_distribution():
    means = fitted(drawn(10))
    means.forget()
    new = drawn(5, seed=1)
    torch.testing.assert_close(means(new), MeanFeatures(DIMS).double()(new))
    assert means.state_dict().keys() == MeanFeatures(DIMS).state_dict().keys()


def test_no_images_have_no_score():
    assert fitted(drawn(10))(drawn(0)).shape == (0,)
