# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from flow_helpers import check_inverse, randomise, shares

from anomalib_flowood.flows import (
    MASKS,
    SCALES,
    GaussianMixture,
    SideBySide,
    StandardNormal,
    StudentT,
    density,
    independent,
    map_flow,
    vector_flow,
)


def couplings(dims=2, layers=3):
    return randomise(vector_flow(dims, coupling_layers=layers, hidden_channels=5))


def some_mixture():
    base = GaussianMixture(2, modes=2, clusterings=1).double()
    base.centres.copy_(torch.tensor([[-2.0, 0.0], [1.0, 3.0]]))
    return base


@pytest.mark.parametrize("base", [StandardNormal(), StudentT(6.0), some_mixture()])
def test_a_density_integrates_to_one(base):
    axis = torch.linspace(-30, 30, 801, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        found = density(couplings(), base, x)
    assert float(found.log_prob.exp().sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=2e-2)


@pytest.mark.parametrize("rest", [None, torch.arange(4.0).double()])
def test_parts_sum_to_minus_log_p(rest):
    x, flow = torch.randn(4, 2, dtype=torch.float64), couplings()
    found = density(flow, StandardNormal(), x, rest)
    z, log_det = flow(x)
    expected = StandardNormal().log_prob(z) + log_det + (0 if rest is None else rest)
    torch.testing.assert_close(found.log_prob, expected)
    assert found.parts.shape == (4, 2 if rest is None else 3)
    torch.testing.assert_close(found.radius, z.norm(dim=1))


def test_without_transforms_it_is_the_base():
    x = torch.randn(4, 2, dtype=torch.float64)
    found = density(vector_flow(2, coupling_layers=0), some_mixture(), x)
    torch.testing.assert_close(found.log_prob, some_mixture().log_prob(x))
    torch.testing.assert_close(found.parts[:, 1], torch.zeros(4).double())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("base", [StandardNormal(), StudentT(6.0)])
def test_shares_sum_to_minus_log_p(mask, scale, base):
    sizes = {"coupling_layers": 5, "hidden_channels": 6, "bottleneck_dim": 2}
    flow = randomise(map_flow((3, 5, 4), mask=mask, scale=scale, **sizes))
    x = torch.randn(3, 3, 5, 4, dtype=torch.float64)
    split = shares(flow, base, x)
    assert split.shape == x.shape
    torch.testing.assert_close(split.flatten(1).sum(1), -density(flow, base, x).log_prob)


def test_flows_side_by_side_are_independent():
    shapes = [(3, 4, 5), (4, 3, 2)]
    flow = SideBySide(map_flow(shape, coupling_layers=4, hidden_channels=6, bottleneck_dim=2) for shape in shapes)
    randomise(flow)
    x = [torch.randn(6, *shape, dtype=torch.float64) for shape in shapes]
    base = StandardNormal()
    each = [density(side, base, part) for side, part in zip(flow.flows, x, strict=True)]
    both = independent(each)
    torch.testing.assert_close(both.log_prob, each[0].log_prob + each[1].log_prob)
    torch.testing.assert_close(both.radius, torch.stack([part.radius for part in each]).norm(dim=0))
    z, log_det = flow(x)
    torch.testing.assert_close(sum(map(base.log_prob, z)) + log_det, both.log_prob)
    back, log_det_back = flow(z, rev=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_det_back, -log_det)


def test_a_single_flow_is_called_as_any_other():
    flow = randomise(SideBySide([map_flow((3, 4, 5), coupling_layers=4, hidden_channels=6, bottleneck_dim=2)]))
    check_inverse(flow, torch.randn(2, 3, 4, 5, dtype=torch.float64))
