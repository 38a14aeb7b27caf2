# SPDX-License-Identifier: Apache-2.0
"""What is fitted to several kinds of samples computes each one as the fit to its kind alone does."""

from copy import deepcopy

import pytest
import torch
from flow_helpers import check_inverse, check_log_det
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_flowood.flows import GaussianMixture, PositionWhitening, ShrunkGaussian, Whitening
from anomalib_flowood.scores import Evidence

SHAPE = (2, 4, 4)
LAYERS = {
    "positions": lambda: PositionWhitening([SHAPE]),
    "layout": lambda: Whitening([SHAPE], 5),
    "layout of blocks": lambda: Whitening([SHAPE], 5, block=2),
    "no layout": lambda: Whitening([SHAPE], 0),
}
COUNTS = (12, 5, 40)
"""Samples of each kind: they give layouts of 5, 2 and 5 directions."""


def samples(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    values = torch.randn(count, 32, generator=generator, dtype=torch.float64) @ mixing + seed
    return values.unflatten(1, SHAPE)


def fitted(name):
    """A layer for each kind, and one that holds them all."""
    layer = LAYERS[name]().double()
    alone, fits = [], []
    for seed, count in enumerate(COUNTS):
        layer.fit(samples(count, seed))
        alone.append(deepcopy(layer))
        fits.append(layer.fit_state())
    layer.join(fits)
    return layer, alone


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("exported", [False, True])
@settings(max_examples=10)
@given(kind=st.lists(st.integers(0, 2), min_size=0, max_size=6))
def test_each_sample_is_transformed_by_the_fit_to_its_kind(name, exported, kind):
    layer, alone = fitted(name)
    x, kinds = samples(len(kind), seed=9), torch.tensor(kind, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        if exported:  # the formulas of a graph, which has no loop over kinds
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        z, log_det = layer.transform(x, rev=False, kind=kinds)
    assert z.shape == x.shape
    for place, number in enumerate(kind):
        expected, expected_log_det = alone[number].transform(x[place : place + 1], rev=False)
        torch.testing.assert_close(z[place], expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(log_det[place], expected_log_det[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_and_log_determinant(name):
    layer, _ = fitted(name)

    def of(kinds):
        def call(x, rev=False):
            return layer.transform(x, rev, kinds if len(x) == len(kinds) else kinds[:1])

        return call

    check_inverse(of(torch.tensor([2, 0, 1, 2])), samples(4, seed=7), tolerance=1e-8)
    for number in range(3):
        check_log_det(of(torch.tensor([number])), samples(1, seed=7))


@pytest.mark.parametrize("name", LAYERS)
def test_kinds_are_saved_and_forgotten(name):
    layer, alone = fitted(name)
    loaded = LAYERS[name]().double()
    loaded.load_state_dict(layer.state_dict())
    x, kinds = samples(3, seed=5), torch.tensor([0, 1, 2])
    torch.testing.assert_close(loaded.whitened(x, kinds), layer.whitened(x, kinds), rtol=0, atol=0)
    loaded.load_state_dict(alone[1].state_dict())
    torch.testing.assert_close(loaded.whitened(x), alone[1].whitened(x), rtol=0, atol=0)
    layer.forget()
    torch.testing.assert_close(layer.whitened(x), x, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["positions", "layout"])
def test_what_is_of_another_shape_is_refused(name):
    layer, _ = fitted(name)
    other = {"positions": PositionWhitening([(3, 4, 4)]), "layout": Whitening([(3, 4, 4)], 5)}[name]
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(layer.state_dict())


def test_evidence_is_in_units_of_the_spread_of_its_kind_and_counts_as_in_that():
    evidence, values = Evidence(2).double(), torch.rand(30, 2, dtype=torch.float64) + 1
    fits, expected = [], []
    for factor, weights in ((1.0, [1.0, 1.0]), (10.0, [1.0, 0.5])):
        evidence.fit(factor * values, weights)
        fits.append(evidence.fit_state())
        expected.append(evidence(factor * values))
    assert not torch.allclose(*expected)
    evidence.join(fits)
    for factor, number in ((1.0, 0), (10.0, 1)):
        kinds = torch.full((30,), number)
        torch.testing.assert_close(evidence(factor * values, kinds), expected[number])
        torch.testing.assert_close(evidence.parts(factor * values, kinds).sum(1), expected[number])


DIMS = 30
SIZES = (50, 8, 20)
"""Points of each kind: the first ones vary in all directions, the others in 7 and in 19."""


def densities():
    """A Gaussian and a mixture of several kinds, and those of each kind alone."""
    gaussian, mixture = ShrunkGaussian(DIMS, 10).double(), GaussianMixture(10, 3, 2).double()
    alone, fits = [], []
    for seed, count in enumerate(SIZES):
        points = samples(count, seed).flatten(1)[:, :DIMS]
        gaussian.fit(points, noise=0.5)
        mixture.fit(gaussian(points)[0])
        alone.append((deepcopy(gaussian), deepcopy(mixture)))
        fits.append((gaussian.fit_state(), mixture.fit_state()))
    for module, of_kinds in zip((gaussian, mixture), zip(*fits, strict=True), strict=True):
        module.join(of_kinds)
    return gaussian, mixture, alone


@pytest.mark.parametrize("exported", [False, True])
def test_the_density_of_each_point_is_that_of_its_kind(exported, monkeypatch):
    """To the directions that other kinds have more of, some of the same variance as all the rest are added."""
    gaussian, mixture, alone = densities()
    assert gaussian.components.shape == (3, DIMS, DIMS)
    turns = gaussian.components @ gaussian.components.mT
    torch.testing.assert_close(turns, torch.eye(DIMS).double().expand(3, -1, -1))
    kinds = torch.tensor([1, 0, 2, 2, 1])
    points = samples(5, seed=8).flatten(1)[:, :DIMS]
    if exported:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    leading, rest = gaussian(points, kinds)
    log_prob, radius = mixture.log_prob(leading, kinds), mixture.of(kinds).radius(leading)
    nearest, whole = mixture.nearest(leading, kinds), gaussian.log_prob(points, kinds)
    standard, outside = gaussian.standardised(points, kinds)
    monkeypatch.undo()
    torch.testing.assert_close(mixture.of(kinds).log_prob(leading), log_prob)
    for place, number in enumerate(kinds.tolist()):
        own, own_mixture = alone[number]
        one = points[place : place + 1]
        expected, expected_rest = own(one)
        torch.testing.assert_close(leading[place], expected[0])
        torch.testing.assert_close(rest[place], expected_rest[0])
        torch.testing.assert_close(whole[place], own.log_prob(one)[0])
        torch.testing.assert_close(log_prob[place], own_mixture.log_prob(expected)[0])
        torch.testing.assert_close(radius[place], own_mixture.radius(expected)[0])
        torch.testing.assert_close(nearest[place], own_mixture.nearest(expected)[0])
        known, beyond = own.standardised(one)
        torch.testing.assert_close(standard[place, : known.shape[1]], known[0])
        assert standard[place, max(10, known.shape[1]) :].isnan().all()  # 10 are always there
        there = standard[place, known.shape[1] :].square().nansum()
        torch.testing.assert_close(there + outside[place], beyond[0])


def test_densities_of_several_kinds_are_saved_and_fitted_anew():
    gaussian, mixture, alone = densities()
    kinds, points = torch.tensor([2, 0]), samples(2, seed=8).flatten(1)[:, :DIMS]
    other, other_mixture = ShrunkGaussian(DIMS, 10).double(), GaussianMixture(10, 3, 2).double()
    other.load_state_dict(gaussian.state_dict())
    other_mixture.load_state_dict(mixture.state_dict())
    leading = other(points, kinds)[0]
    assert torch.equal(leading, gaussian(points, kinds)[0])
    assert torch.equal(other_mixture.log_prob(leading, kinds), mixture.log_prob(leading, kinds))
    points = samples(SIZES[1], 1).flatten(1)[:, :DIMS]
    other.fit(points, noise=0.5)
    other_mixture.fit(other(points)[0])
    assert torch.equal(other.log_prob(points), alone[1][0].log_prob(points))
    assert torch.equal(other_mixture.centres, alone[1][1].centres)
    with pytest.raises(RuntimeError, match="size mismatch"):
        GaussianMixture(9, 3, 2).load_state_dict(mixture.state_dict())
