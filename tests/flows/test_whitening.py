# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from flow_helpers import check_inverse, check_log_det
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from anomalib_flowood.flows import PositionMoments, PositionWhitening, StandardNormal, Whitening

SHAPE = (3, 2, 4)


def maps(n, shape=SHAPE, seed=0):
    """Maps whose positions have means and covariances of their own."""
    generator = torch.Generator().manual_seed(seed)
    dims, height, width = shape
    noise = torch.randn(n, height * width, dims, generator=generator, dtype=torch.float64)
    mixing = torch.randn(height * width, dims, dims, generator=generator, dtype=torch.float64)
    means = 3 * torch.randn(height * width, dims, generator=generator, dtype=torch.float64)
    return (torch.einsum("npd,pde->npe", noise, mixing) + means).transpose(1, 2).unflatten(2, (height, width))


def fitted(x):
    layer = PositionWhitening([tuple(x.shape[1:])]).double()
    layer.fit(x)
    return layer


def call(module):
    return lambda x, rev=False: (lambda out: (out[0][0], out[1]))(module((x,), rev=rev))


@settings(max_examples=8)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    n=st.integers(2, 9),
)
def test_inverse_and_log_determinant(shape, n):
    x = maps(n, shape)
    module = call(fitted(x))
    check_inverse(module, x[:2], tolerance=1e-8)
    check_log_det(module, x[:2])


@pytest.mark.parametrize(("n", "count"), [(2, 3), (20, 38)])  # 3 numbers at a position; twice 19
def test_with_a_standard_normal_each_position_has_a_gaussian_of_its_own(n, count):
    x, new = maps(n), maps(4, seed=1)
    layer = fitted(x)
    vectors = x.flatten(2)
    means = vectors.mean(0).T
    scatters = [(part - part.mean(0)).T @ (part - part.mean(0)) for part in vectors.unbind(2)]
    shared = torch.stack(scatters).mean(0) / (n - 1)
    w, _ = layer.transform(new, rev=False)
    found = StandardNormal().elementwise(w).sum(1) + layer.log_dets
    for place, scatter in enumerate(scatters):
        covariance = (scatter + count * (shared + shift(means, place))) / (n - 1 + count)
        gaussian = MultivariateNormal(means[place], covariance)
        expected = gaussian.log_prob(new.flatten(2)[:, :, place])
        torch.testing.assert_close(found.flatten(1)[:, place], expected, rtol=1e-4, atol=1e-4)


def shift(means, place):
    """What a shift by about a position adds, one position after the other."""
    row, column = divmod(place, SHAPE[2])
    total, weights = torch.zeros(SHAPE[0], SHAPE[0]).double(), 0.0
    for other, mean in enumerate(means):
        rows, columns = (there - here for there, here in zip(divmod(other, SHAPE[2]), (row, column), strict=True))
        if max(abs(rows), abs(columns)) <= 2:
            weight = math.exp(-0.5 * (rows**2 + columns**2))
            total += weight * torch.outer(mean - means[place], mean - means[place])
            weights += weight
    return total / weights


def test_a_part_that_lies_elsewhere_is_no_surprise():
    """An edge, between columns that are all alike, one position farther than in any image of the fit."""
    generator = torch.Generator().manual_seed(0)
    edge = torch.where(torch.arange(12) < 6, 0.0, 10.0).double().expand(2, 8, 12)
    x = edge + torch.randn(40, 2, 8, 12, generator=generator, dtype=torch.float64)
    layer = fitted(x)
    surprise = layer.whitened(edge.roll(1, dims=2)[None]).square().sum(1)[0]
    assert surprise[:, 6].max() < 6  # the column that it has crossed; 200 by its own variance alone
    dot = edge.clone()
    dot[:, 4, 1] = 10  # what no shift brings there
    assert layer.whitened(dot[None]).square().sum(1)[0, 4, 1] > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_without_some_maps_are_those_of_the_others(dtype):
    x = maps(30).to(dtype)
    known, held_out = PositionMoments(x), torch.tensor([3, 4, 17, 29])
    rest = known.without(PositionMoments(x[held_out], known.around))
    others = x[[number for number in range(30) if number not in held_out]]
    layer, reference = (PositionWhitening([SHAPE]).to(dtype) for _ in range(2))
    layer.fit(rest)
    reference.fit(others)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, **close)
    assert rest.count == 26
    assert known.count == 30
    layer.fit(known)
    torch.testing.assert_close(layer.whitened(x), fitted(x.double()).whitened(x.double()).to(dtype), **close)


def test_what_is_left_of_few_maps_of_which_one_is_far_off_is_exact():
    """With fewer numbers than a covariance has directions, what float32 loses of a sum is more than the ridge."""
    x = torch.randn(9, 32, 2, 2, generator=torch.Generator().manual_seed(0))
    x[0] *= 5
    everything, held_out = PositionMoments(x), torch.tensor([0])
    layer, reference = PositionWhitening([(32, 2, 2)]), PositionWhitening([(32, 2, 2)]).double()
    layer.fit(everything.without(PositionMoments(x[held_out], everything.around)))
    reference.fit(x[1:].double())
    torch.testing.assert_close(layer.whitened(x).double(), reference.whitened(x.double()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [1, 5])
def test_maps_may_lie_in_memory_in_any_way(n):
    layer, x = fitted(maps(20)), maps(n, seed=1)
    expected = layer.whitened(x)
    for other in (x.contiguous(memory_format=torch.channels_last), x.repeat(1, 1, 1, 2)[..., : x.shape[3]]):
        torch.testing.assert_close(layer.whitened(other), expected)
    torch.testing.assert_close(call(layer)(expected, rev=True)[0], x)


def test_two_images_are_enough():
    x = maps(2)
    assert fitted(x).transform(x, rev=False)[0].isfinite().all()


def test_before_a_fit_it_is_the_identity():
    x = maps(3)
    w, log_det = PositionWhitening([SHAPE]).double().transform(x, rev=False)
    assert torch.equal(w, x)
    assert torch.equal(log_det, torch.zeros(3).double())


def test_maps_in_half_precision_fit_a_model_in_single():
    x = maps(20).half()
    layer = PositionWhitening([SHAPE])
    layer.fit(x)
    whitened = layer.transform(x.float(), rev=False)[0].flatten(2)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(3, 8), rtol=0, atol=1e-3)


def test_state_round_trip():
    x = maps(9)
    layer, other = fitted(x), PositionWhitening([SHAPE]).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.transform(x, rev=False)[0], layer.transform(x, rev=False)[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PositionWhitening([(4,)]), "takes one map"),
        (lambda: PositionWhitening([SHAPE], dims_c=[(2,)]), "no condition"),
        (lambda: fitted(maps(1)), "at least 2 images, got 1"),
        (lambda: fitted(torch.ones(5, *SHAPE).double()), "all the same"),
        (lambda: fitted(torch.full((5, *SHAPE), torch.nan).double()), "NaN or infinite"),
    ],
)
def test_what_cannot_be_whitened_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("block", [1, 2])
def test_samples_that_may_be_overwritten_give_the_same(block):
    samples = torch.randn(20, 3, 4, 6, generator=torch.Generator().manual_seed(0)) + 2
    taken = samples.clone()
    whitenings = [Whitening([(3, 4, 6)], 5, block=block) for _ in range(2)]
    for whitening, overwrite in zip(whitenings, (False, True), strict=True):
        assert torch.equal(taken, samples)
        whitening.fit(taken, overwrite=overwrite)
    assert not torch.equal(taken, samples)
    for one, other in zip(*(whitening.buffers() for whitening in whitenings), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("different", "copies"), [(2, 1), (2, 5), (3, 2), (4, 3)])
def test_samples_that_vary_in_few_directions_leave_a_rest(different, copies):
    """Two samples, or copies of a few: with all that these vary in as directions, a new one would be a million off."""
    samples, new = torch.randn(2, different, 200, generator=torch.Generator().manual_seed(0))
    whitening = Whitening([(200,)], 64)
    whitening.fit(samples.repeat(copies, 1))
    deviations = samples - samples.mean(0)
    rank = different - 1
    assert len(whitening.directions) == rank - 1
    smallest = torch.linalg.svdvals(deviations.double())[rank - 1].square() * copies / (different * copies - 1)
    torch.testing.assert_close(whitening.rest.double(), smallest / (200 - rank + 1), rtol=1e-4, atol=0)
    assert whitening.whitened(new).square().mean() < 10


def test_many_numbers_are_summed_up_exactly():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    samples = torch.randn(100, 100_000, generator=torch.Generator().manual_seed(0))
    whitening = Whitening([(100_000,)], 0)
    whitening.fit(samples)
    torch.set_num_threads(threads)
    torch.testing.assert_close(whitening.rest.double(), samples.double().var(0).mean(), rtol=2e-5, atol=0)


def test_directions_that_span_everything_leave_nothing_to_rounding():
    samples, new = torch.randn(2, 200, 64, 1, 1, generator=torch.Generator().manual_seed(0))
    whitening = Whitening([(64, 1, 1)], 256)
    whitening.fit(samples)
    deviations = (new - samples.mean(0)).flatten(1).double()
    covariance = torch.cov(samples.flatten(1).T.double())
    expected = (deviations @ torch.linalg.inv(covariance) * deviations).sum(1)
    found = whitening.whitened(new).flatten(1).square().sum(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("copies", [2, 4, 19])
def test_maps_that_are_all_the_same_but_for_rounding_are_refused(copies, seed):
    """Also where they are what is left of others, whose sums were larger."""
    other, one = torch.randn(2, 1, 8, 6, 6, generator=torch.Generator().manual_seed(seed))
    same = one.expand(copies, -1, -1, -1)
    everything = PositionMoments(torch.cat([other, same]))
    rest = everything.without(PositionMoments(other, everything.around))
    layer = PositionWhitening([(8, 6, 6)])
    for samples in (same, rest, same.new_full((2, 8, 6, 6), torch.nan), same.new_full((2, 8, 6, 6), torch.inf)):
        with pytest.raises(ValueError, match="maps of .* are all the same: give more varied images"):
            layer.fit(samples)
    layer.fit(everything)


@settings(max_examples=30)
@given(n=st.integers(4, 40), rank=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_few_different_samples_in_single_precision_have_no_directions_of_rounding(n, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    different = torch.randn(rank + 1, 5, 3, 4, generator=generator)
    samples = different[torch.arange(n) % (rank + 1)]
    layer = Whitening([(5, 3, 4)], directions=64)
    layer.fit(samples)
    assert len(layer.directions) <= rank
    torch.testing.assert_close(layer.directions @ layer.directions.T, torch.eye(len(layer.directions)))
    map_of = lambda x: layer.double().whitened(x.reshape(1, 5, 3, 4)).flatten()
    jacobian = torch.autograd.functional.jacobian(map_of, torch.zeros(60, dtype=torch.float64))
    torch.testing.assert_close(layer.log_det, torch.linalg.slogdet(jacobian)[1], rtol=1e-3, atol=1e-2)
