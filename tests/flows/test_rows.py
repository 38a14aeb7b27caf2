# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from anomalib_flowood.flows import Computed, GaussianMixture, Moments, ShrunkGaussian, draw, in_turn
from anomalib_flowood.flows.fitted import principal_directions
from anomalib_flowood.flows.rows import AT_ONCE, take


@pytest.mark.parametrize("n", [5, 12, 13, 300])
def test_moments_are_those_of_all_points_whatever_the_batches(n):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(n, 12, generator=generator).double() * torch.linspace(3, 0.1, 12) + 1000
    moments = Moments()
    for part in points.split([0, 2, 1, n - 3]):
        moments.add(part)
    assert moments.count == n
    np.testing.assert_allclose(moments.mean, points.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(points.T, bias=True), rtol=1e-9, atol=1e-9)
    reference = PCA(svd_solver="full").fit(points.numpy())
    variances, directions = moments.principal_directions(3)
    np.testing.assert_allclose(variances, reference.explained_variance_[:3] * (n - 1) / n, rtol=1e-9)
    np.testing.assert_allclose(np.abs(directions @ reference.components_[:3].T), np.eye(3), atol=1e-7)


def test_some_are_drawn_always_the_same_and_in_order():
    assert draw(7, 10).tolist() == list(range(7))
    for count in (1000, 2**24 + 1):  # of which the second is not shuffled
        drawn = draw(count, 100)
        assert torch.equal(drawn, draw(count, 100))
        assert bool((drawn.diff() > 0).all())
        assert 98 <= len(drawn) <= 100
        assert 0 <= drawn[0] < 0.1 * count < 0.9 * count < drawn[-1] < count


class Watched(Computed):
    """Rows that note how many were asked for at once."""

    most = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        self.most = max(self.most, len(found))
        return found


def test_fits_look_at_some_rows_at_a_time_and_find_the_same():
    x = torch.randn(6 * AT_ONCE, 8, generator=torch.Generator().manual_seed(0)).double()
    x[::2] += 5
    rows = Watched(lambda parts: parts[0] * 2, [x])
    assert torch.equal(torch.cat([*in_turn(rows)]), 2 * x)
    assert torch.equal(take(rows, torch.arange(0, len(x), 2)), 2 * x[::2])
    together, apart = GaussianMixture(8, 4, 2).double(), GaussianMixture(8, 4, 2).double()
    torch.testing.assert_close(apart.fit(rows), together.fit(2 * x))
    torch.testing.assert_close(apart.state_dict(), together.state_dict())
    assert rows.most == AT_ONCE
    moments = Moments()
    for part in in_turn(rows):
        moments.add(part)
    for known in (moments, Moments(2 * x[:8])):  # so few are kept as they are
        torch.testing.assert_close(known.variances, known.covariance.diagonal())
    together, apart = ShrunkGaussian(8, 2).double(), ShrunkGaussian(8, 2).double()
    together.fit(2 * x)
    apart.fit(moments)
    torch.testing.assert_close(apart.log_prob(x), together.log_prob(x))


def test_every_point_counts_in_a_mixture_however_many_there_are():
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(30_000, 2, generator=generator).double()
    x[torch.randperm(len(x), generator=generator)[:10_001]] += 3
    base = GaussianMixture(2, 2, 1).double()
    covariance = base.fit(x)
    assert sorted(base.log_weights.exp().tolist()) == pytest.approx([10_001 / 30_000, 19_999 / 30_000], abs=1e-12)
    kinds = torch.stack([x[x[:, 0] > 1.5].mean(0), x[x[:, 0] < 1.5].mean(0)])
    torch.testing.assert_close(base.centres[base.centres[:, 0].argsort(descending=True)], kinds)
    torch.testing.assert_close(covariance, 0.01 * torch.eye(2).double(), atol=3e-4, rtol=0)


@pytest.mark.parametrize("points", [4, 40])
def test_directions_lie_in_memory_as_a_checkpoint_holds_them(points):
    some = torch.randn(points, 9, dtype=torch.float64)
    _, directions = principal_directions(some - some.mean(0))
    assert directions.is_contiguous()
