# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import OAS
from torch.distributions import MultivariateNormal

from anomalib_flowood.flows import ShrunkGaussian, StandardNormal


def points(n, dims=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dims, dtype=torch.float64, generator=generator)
    turn = torch.linalg.qr(torch.randn(dims, dims, dtype=torch.float64, generator=generator))[0]
    return (x * torch.linspace(3, 0.2, dims, dtype=torch.float64)) @ turn + 5


def fitted(x, directions=0, noise=0.0):
    gaussian = ShrunkGaussian(x.shape[1], directions).double()
    gaussian.fit(x, noise=noise)
    return gaussian


def covariance(gaussian):
    u, tail = gaussian.components, gaussian.tail_variance
    return u.T @ torch.diag(gaussian.variances - tail) @ u + tail * torch.eye(u.shape[1]).to(u)


@given(n=st.integers(2, 40), dims=st.integers(2, 12), share=st.floats(0, 1), noise=st.sampled_from([0.0, 2.0]))
def test_it_is_the_gaussian_of_scikit_learn_with_few_points_and_with_many(n, dims, share, noise):
    x, others = points(n, dims), points(9, dims, seed=1)
    gaussian = fitted(x, round(share * dims), noise)
    theirs = torch.from_numpy(OAS().fit(x.numpy()).covariance_)
    theirs += noise * torch.eye(dims)
    torch.testing.assert_close(covariance(gaussian), theirs)
    expected = MultivariateNormal(x.mean(0), theirs).log_prob(others)
    torch.testing.assert_close(gaussian.log_prob(others), expected)
    leading, rest = gaussian(others)
    assert leading.shape == (9, gaussian.directions)
    torch.testing.assert_close(StandardNormal().log_prob(leading) + rest, expected)


def test_of_the_coordinates_the_leading_ones_vary_most():
    x = points(30, dims=60)
    gaussian = fitted(x, 45)  # more than 30 points can tell
    assert gaussian.components.shape == (45, 60)
    torch.testing.assert_close(gaussian.components @ gaussian.components.T, torch.eye(45).double())
    assert (gaussian.variances.diff() <= 1e-12).all()


def test_it_follows_to_and_loads_as_many_directions_as_it_saved():
    x = points(12, dims=20)
    gaussian = fitted(x)
    fresh = ShrunkGaussian(20)
    fresh.load_state_dict(gaussian.state_dict())
    assert fresh.components.shape == (11, 20)
    found = fresh.log_prob(x.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gaussian.log_prob(x).float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("x", "message"),
    [(points(1), "at least 2 images, got 1"), (torch.full((5, 7), 0.3), "The 5 images are all alike, or constant")],
)
def test_what_has_no_covariance_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        ShrunkGaussian(7).fit(x, what="images")


def test_points_in_few_directions_have_a_finite_density():
    x = points(500, 3) @ torch.randn(3, 9, dtype=torch.float64)
    assert torch.isfinite(fitted(x).log_prob(points(5, 9))).all()


def test_more_directions_than_dimensions_are_refused():
    with pytest.raises(ValueError, match="directions must lie between 0 and the 7 dimensions of a point, got 8"):
        ShrunkGaussian(7, 8)


def test_noise_below_zero_is_refused():
    with pytest.raises(ValueError, match="noise must be at least 0, got -0.1"):
        fitted(points(9), noise=-0.1)


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_the_covariance_of_all_points_along_the_leading_directions_changes_nothing(noise):
    x = points(30)
    gaussian = fitted(x, 3, noise)
    before, leading = gaussian.log_prob(x), gaussian.coordinates(x)
    matrix = gaussian.turn(torch.cov(leading.T, correction=0), noise=noise)
    torch.testing.assert_close(gaussian.log_prob(x), before)
    torch.testing.assert_close(leading @ matrix, gaussian(x)[0])
