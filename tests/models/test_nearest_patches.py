# SPDX-License-Identifier: Apache-2.0
"""Distances to the nearest normal position: those of every pair, whatever is in memory at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_flowood.models.feature_map_flow import coreset, nearest_patches
from anomalib_flowood.models.feature_map_flow.coreset import farthest_first
from anomalib_flowood.models.feature_map_flow.nearest_patches import NearestPatches
from anomalib_flowood.models.feature_map_flow.training_rows import TrainingRows

DIMS = 3


def maps(count=6, seed=0, size=(2, 4)):
    return torch.randn(count, DIMS, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def points(some):
    return some.permute(0, 2, 3, 1).reshape(-1, DIMS)


def least(some):
    """The least distance that is told from none."""
    return 1e-5**0.5 * some.square().sum(1).sqrt()


def nearest(some, bank):
    found = torch.cdist(points(some), bank).amin(1).reshape(len(some), *some.shape[2:])
    return torch.maximum(found, least(some))


def fitted(some, size=100, scored=(0, 2), training=None):
    patches = NearestPatches(DIMS, size).double()
    return patches, patches.fit(some, torch.tensor(scored), training)


@settings(max_examples=30)
@given(
    size=st.integers(1, 60),
    count=st.integers(0, 5),
    seed=st.integers(0, 99),
    at_once=st.sampled_from([1, 50, 10**6]),
    part=st.sampled_from([1, 7, 128]),
)
def test_distances_are_those_to_the_nearest_of_the_bank(size, count, seed, at_once, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest_patches, "_DISTANCES", at_once)
        patch.setattr(nearest_patches, "_PART", part)
        patches, _ = fitted(maps(), size)
        assert patches.bank.shape == (min(size, 48), DIMS)
        new = maps(count, seed)
        torch.testing.assert_close(patches(new), nearest(new, patches.bank), atol=1e-7, rtol=1e-7)


def test_normal_positions_are_near_wherever_they_are():
    some = maps()
    patches, _ = fitted(some)
    turned = some.flip(2, 3)
    torch.testing.assert_close(patches(turned), least(turned))
    assert {tuple(row) for row in patches.bank.tolist()} == {tuple(row) for row in points(some).tolist()}


@pytest.mark.parametrize("copies", [1, 2])
def test_images_that_set_the_scale_leave_themselves_out(copies):
    some = maps(8)
    scored = (0, 4, 6)
    patches, distances = fitted(some, scored=scored, training=TrainingRows(8 // copies, copies))
    for row, found in zip(scored, distances, strict=True):
        image = row // copies
        others = torch.cat([some[: image * copies], some[(image + 1) * copies :]])
        torch.testing.assert_close(found, nearest(some[row][None], points(others))[0], atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(patches.location, distances.mean())
    torch.testing.assert_close(patches.spread, distances.std())
    scaled = patches.standardise(distances)
    assert abs(scaled.mean()) < 1e-9
    assert scaled.std() == pytest.approx(1)


def test_a_damaged_copy_is_compared_with_other_images_and_fitted_to_by_none():
    some, damaged = maps(8), maps(2, 1)
    training = TrainingRows(8, 1, torch.tensor([2, 5]))
    patches, distances = fitted(torch.cat([some, damaged]), scored=(2, 8, 5, 9), training=training)
    alone, of_images = fitted(some, scored=(2, 5))
    assert torch.equal(patches.bank, alone.bank)
    torch.testing.assert_close(distances[::2], of_images)
    for image, copy, found in zip((2, 5), damaged, distances[1::2], strict=True):
        others = torch.cat([some[:image], some[image + 1 :]])
        torch.testing.assert_close(found, nearest(copy[None], points(others))[0], atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(patches.location, alone.location)
    torch.testing.assert_close(patches.spread, alone.spread)


def test_an_image_that_fills_the_bank_is_compared_with_all_others():
    some = maps(3)
    some[1] *= 1e3
    patches, distances = fitted(some, size=5, scored=(0, 1, 2))
    assert (patches.bank.norm(dim=1) > 100).all()
    others = points(some[[0, 2]])
    torch.testing.assert_close(distances[1], nearest(some[1][None], others)[0])
    assert distances.isfinite().all()


def test_what_is_in_the_bank_is_at_no_distance_of_rounding():
    """An export, which rounds otherwise, differed by it, and was refused."""
    some = 4 * torch.randn(20, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    layer = NearestPatches(64, 1000)
    layer.fit(some, torch.tensor([0]))
    single, exact = layer(some).double(), layer.double()(some.double())
    assert float(exact.max()) < 0.01 * float(some.square().sum(1).sqrt().mean())
    torch.testing.assert_close(single, exact, rtol=1e-5, atol=0)


def test_what_lies_between_two_kinds_of_content_is_far_from_both():
    """The mean of all positions, the most normal place to a Gaussian."""
    either = torch.randint(0, 2, (40, 1, 2, 4), generator=torch.Generator().manual_seed(0)) * 8.0 - 4
    normal = torch.cat([either, either * 0], dim=1) + 0.1 * maps(40)[:, :2].float()
    patches = NearestPatches(2, 20)
    seen = patches.fit(normal, torch.arange(20))
    between = patches(normal.mean((0, 2, 3), keepdim=True).expand(1, -1, 2, 4))
    assert between.min() > 5 * seen.max()


def test_before_a_fit_and_when_forgotten_it_is_the_distance_to_the_mean():
    some = maps()
    expected = some.norm(dim=1)
    torch.testing.assert_close(NearestPatches(DIMS, 9).double()(some), expected)
    patches, _ = fitted(some)
    patches.forget()
    torch.testing.assert_close(patches(some), expected)
    torch.testing.assert_close(patches.standardise(expected), expected)


def test_the_bank_comes_with_a_state():
    some = maps()
    patches, _ = fitted(some, 20)
    again = NearestPatches(DIMS, 20).double()
    again.load_state_dict(patches.state_dict())
    new = maps(2, 1)
    assert torch.equal(again(new), patches(new))
    assert torch.equal(again.standardise(again(new)), patches.standardise(patches(new)))


@pytest.mark.parametrize("part", [7, 128])
def test_each_kind_has_a_bank_of_its_own(part, monkeypatch):
    """Of another number of positions, one by one and side by side, as a graph computes them."""
    monkeypatch.setattr(nearest_patches, "_PART", part)
    first, second = maps(6), 5 + maps(2, 1)
    (one, _), (other, _) = fitted(first, 40), fitted(second, 40, scored=(0, 1))
    assert len(other.bank) < len(one.bank)
    both = NearestPatches(DIMS, 40).double()
    both.join([one.fit_state(), other.fit_state()])
    new, kinds = maps(3, 2), torch.tensor([1, 0, 1])
    expected = torch.cat([other(new[:1]), one(new[1:2]), other(new[2:])])
    torch.testing.assert_close(both(new, kinds), expected)
    torch.testing.assert_close(both._nearest(new, both.bank[kinds]), expected)
    scaled = torch.cat(
        [other.standardise(expected[:1]), one.standardise(expected[1:2]), other.standardise(expected[2:])]
    )
    torch.testing.assert_close(both.standardise(expected, kinds), scaled)


def test_the_same_positions_are_kept_in_half_precision():
    some = maps(20).half()
    whole, _ = fitted(some, 30)
    again, _ = fitted(some.double(), 30)
    assert torch.equal(whole.bank, again.bank)


@pytest.mark.parametrize("at_once", [1, 7, 50, 1000])
def test_a_coreset_is_the_same_however_many_are_looked_at(at_once, monkeypatch):
    monkeypatch.setattr(coreset, "DISTANCES", 90)
    some = torch.randn(300, 12, dtype=torch.float64)
    expected = [5]
    while len(expected) < 60:
        expected.append(int(torch.cdist(some, some[expected]).amin(1).argmax()))
    assert farthest_first(some, 60, 5, at_once) == expected
