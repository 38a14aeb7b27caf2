# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.mixture import GaussianMixture as SklearnMixture

from anomalib_flowood.flows import GaussianMixture, StandardNormal, StudentT


def latents(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixture(dims=3, modes=4, clusterings=2):
    """Means and shares of its own, all different."""
    base = GaussianMixture(dims, modes, clusterings).double()
    base.centres.copy_(3 * latents(modes * clusterings, dims, seed=1))
    base.log_weights.copy_(latents(modes * clusterings, seed=2).log_softmax(0))
    return base


BASES = {"standard normal": StandardNormal, "student": lambda: StudentT(4.0), "mixture": mixture}


@pytest.mark.parametrize("shape", [(5, 7), (5, 2, 3, 4), (0, 7)])
@pytest.mark.parametrize(("base", "expected"), [(StandardNormal(), stats.norm()), (StudentT(4.0), stats.t(4.0))])
def test_independent_bases_agree_with_scipy(base, expected, shape):
    z = latents(*shape)
    values = expected.logpdf(z.numpy())
    # torch takes the degrees of freedom in single precision
    np.testing.assert_allclose(base.elementwise(z).numpy(), values, rtol=1e-7)
    np.testing.assert_allclose(base.log_prob(z).numpy(), values.sum(axis=tuple(range(1, len(shape)))), rtol=1e-7)
    np.testing.assert_allclose(base.radius(z).numpy(), np.linalg.norm(z.flatten(1).numpy(), axis=1), rtol=1e-12)


def test_the_mixture_agrees_with_sklearn():
    base, z = mixture(), latents(50, 3)
    reference = SklearnMixture(len(base.centres), covariance_type="tied")
    reference.means_, reference.weights_ = base.centres.numpy(), base.log_weights.exp().numpy()
    reference.covariances_ = reference.precisions_cholesky_ = np.eye(3)
    np.testing.assert_allclose(base.log_prob(z).numpy(), reference.score_samples(z.numpy()), rtol=1e-10)
    nearest = torch.cdist(z, base.centres).amin(1)
    torch.testing.assert_close(base.radius(z), nearest)


@pytest.mark.parametrize("name", BASES)
def test_bases_integrate_to_one(name):
    axis = torch.linspace(-60, 60, 1201, dtype=torch.float64)
    if name == "mixture":
        base, axis = mixture(dims=2), axis[::2]
        z = torch.cartesian_prod(axis, axis)
        volume = float(axis[1] - axis[0]) ** 2
    else:
        base, z, volume = BASES[name](), axis[:, None], float(axis[1] - axis[0])
    assert float(base.log_prob(z).exp().sum() * volume) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_bases_follow_to_and_load_what_they_saved(name):
    base = BASES[name]()
    fresh = GaussianMixture(3, 4, 2) if name == "mixture" else BASES[name]()
    fresh.load_state_dict(base.state_dict())
    z = latents(6, 3).float()
    found = fresh.float().log_prob(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, base.double().log_prob(z.double()).float())


def test_a_fitted_mixture_is_a_tied_gaussian_mixture_where_its_points_are():
    kinds = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 30.0]], dtype=torch.float64)
    spread = torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    points = torch.cat([kind + latents(200, 2, seed=seed) @ spread.T for seed, kind in enumerate(kinds)])
    base = GaussianMixture(2, modes=8, clusterings=4).double()
    covariance = base.fit(points)
    whole = spread @ spread.T  # of a kind, of which some are found in several parts
    assert 0.2 < float(covariance.trace() / whole.trace()) < 1.1
    assert float(torch.cdist(kinds, base.centres).amin(1).max()) < 2
    # Where the covariance is the identity, the density is that of the tied mixture, but for the volume.
    before = base.centres.clone()
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    base.transform(whiten)
    reference = SklearnMixture(len(before), covariance_type="tied")
    reference.means_, reference.weights_ = before.numpy(), base.log_weights.exp().numpy()
    reference.precisions_cholesky_ = whiten.numpy()
    found = base.log_prob(points @ whiten) + torch.linalg.slogdet(whiten)[1]
    np.testing.assert_allclose(found.numpy(), reference.score_samples(points.numpy()), rtol=1e-9)


def test_few_points_have_few_modes_and_share_slots():
    base = GaussianMixture(3, modes=50, clusterings=1).double()
    base.fit(latents(35, 3))
    assert len(base.centres.unique(dim=0)) == 3  # one for ten points
    assert float(base.log_weights.exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize("wrong", [{"dims": 0}, {"modes": 0}, {"clusterings": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1"):
        GaussianMixture(**{"dims": 2, **wrong})
    with pytest.raises(ValueError, match="degrees must be above 0"):
        StudentT(0.0)
    with pytest.raises(ValueError, match="there are none"):
        GaussianMixture(2).fit(torch.zeros(0, 2))
