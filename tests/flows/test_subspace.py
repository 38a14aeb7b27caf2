# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.distributions import MultivariateNormal

from anomalib_flowood.flows import PrincipalSubspace, StandardNormal


def points(n=300, dims=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dims, dtype=torch.float64, generator=generator)
    turn = torch.linalg.qr(torch.randn(dims, dims, dtype=torch.float64, generator=generator))[0]
    return (x * torch.linspace(3, 0.2, dims, dtype=torch.float64)) @ turn + 5


def fitted(k=3, **kwargs):
    x = points(**kwargs)
    subspace = PrincipalSubspace(x.shape[1], k).double()
    subspace.fit(x, solver="full")
    return subspace, x


@pytest.mark.parametrize("k", [1, 3, 7])
def test_with_a_standard_normal_it_is_probabilistic_pca(k):
    subspace, x = fitted(k)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(x.T))
    tail = eigenvalues[: 7 - k].mean() if k < 7 else torch.tensor(1.0)
    kept = vectors[:, 7 - k :]
    covariance = kept @ torch.diag(eigenvalues[7 - k :]) @ kept.T + tail * (torch.eye(7) - kept @ kept.T)
    w, rest = subspace(x)
    assert w.shape == (300, k)
    found = StandardNormal().log_prob(w) + rest
    expected = MultivariateNormal(x.mean(0), (covariance + covariance.T) / 2).log_prob(x)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(w.var(0), torch.ones(k).double())


def test_with_all_directions_nothing_is_left_over_not_even_rounding():
    x = (torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 8)) + 1
    subspace = PrincipalSubspace(8, 8)
    subspace.fit(x)
    _, rest = subspace(x)
    assert len(rest.unique()) == 1
    _, rest = subspace(x.T.reshape(1, 8, 20, 25))
    assert len(rest.unique()) == 1


def test_maps_are_their_positions():
    subspace, _ = fitted()
    maps = points(2 * 4 * 5, seed=3).reshape(2, 4, 5, 7)
    w, rest = subspace(maps.permute(0, 3, 1, 2))
    assert w.shape == (2, 3, 4, 5)
    assert rest.shape == (2, 4, 5)
    expected_w, expected_rest = subspace(maps.flatten(0, 2))
    torch.testing.assert_close(w.permute(0, 2, 3, 1).flatten(0, 2), expected_w)
    torch.testing.assert_close(rest.flatten(), expected_rest)


def test_the_density_follows_a_change_of_variables():
    """By autograd: x to the coordinates and the scaled residual."""
    subspace, x = fitted()
    basis = torch.linalg.svd(subspace.components)[2][3:]

    def latent(point):
        w, _ = subspace(point[None])
        return torch.cat([w[0], (point - subspace.mean) @ basis.T / subspace.tail_variance.sqrt()])

    for point in x[:3]:
        z = latent(point)
        volume = torch.linalg.slogdet(torch.autograd.functional.jacobian(latent, point))[1]
        expected = StandardNormal().log_prob(z[None])[0] + volume
        w, rest = subspace(point[None])
        torch.testing.assert_close((StandardNormal().log_prob(w) + rest)[0], expected)


def test_it_follows_to_and_loads_what_it_saved():
    subspace, x = fitted()
    fresh = PrincipalSubspace(7, 3)
    fresh.load_state_dict(subspace.state_dict())
    w, rest = fresh(x.float())
    assert w.dtype == rest.dtype == torch.float32
    expected_w, expected_rest = subspace(x)
    torch.testing.assert_close(w, expected_w.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rest, expected_rest.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (points(3), "3 principal directions need more than 3 images, got 3: give more images, at least 4"),
        (torch.ones(50, 7), "^Many training images are the same, or constant: of 50 images only 1 differ"),
        (
            points(3).repeat(20, 1),
            "of 60 images only 3 differ, and vary in 2 .*subspace_dim=3. Give more varied images.$",
        ),
        (
            points(50)[:, :2] @ torch.ones(2, 7).double(),
            "50 images vary in 1 directions only, .*: set subspace_dim lower",
        ),
    ],
)
def test_too_few_points_and_too_few_directions(x, message):
    with pytest.raises(ValueError, match=message):
        PrincipalSubspace(7, 3).fit(x, what="images")


def test_points_in_the_subspace_have_a_finite_density():
    x = points(50)[:, :3] @ torch.randn(3, 7, dtype=torch.float64)
    subspace = PrincipalSubspace(7, 3).double()
    subspace.fit(x)
    assert torch.isfinite(subspace(x)[1]).all()
