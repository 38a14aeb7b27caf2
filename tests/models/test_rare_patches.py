# SPDX-License-Identifier: Apache-2.0
"""Patches that are rarest for their place: by definition, pair by pair."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_flowood.models.feature_map_flow.rare_patches import RarePatches

DIMS, SIZE = 3, (4, 9)


def maps(count=6, seed=0, size=SIZE):
    return torch.randn(count, DIMS, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distances(some, seed=1):
    """Distances to a memory bank, about as large as those between positions."""
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(len(some), *some.shape[2:], dtype=torch.float64, generator=generator)


def rare(some, far, step=2):
    """The lesser of the distances to the bank and to positions elsewhere in the image."""
    found = far.clone()
    height, width = some.shape[2:]
    for row, column in product(range(height), range(width)):
        for other_row, other_column in product(range(0, height, step), range(0, width, step)):
            if max(abs(row - other_row), abs(column - other_column)) > 2:
                own = (some[:, :, row, column] - some[:, :, other_row, other_column]).norm(dim=1)
                found[:, row, column] = torch.minimum(found[:, row, column], own)
    return found


def fitted(some, far):
    patches = RarePatches(tuple(some.shape[2:])).double()
    return patches, patches.fit(some, far)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 4), seed=st.integers(0, 99), size=st.sampled_from([(1, 1), (3, 3), SIZE, (7, 6)]))
def test_it_is_the_distance_from_bank_and_image_above_the_usual_one(count, seed, size):
    normal = maps(size=size)
    patches, _ = fitted(normal, distances(normal))
    expected = rare(normal, distances(normal)).mean(0)
    torch.testing.assert_close(patches.usual, expected)
    new = maps(count, seed, size)
    found = patches(new, distances(new, seed))
    torch.testing.assert_close(found, rare(new, distances(new, seed)) - expected)


def test_images_that_set_what_is_usual_leave_themselves_out():
    some = maps(5)
    _, found = fitted(some, distances(some))
    own = rare(some, distances(some))
    for place in range(5):
        others = torch.cat([own[:place], own[place + 1 :]])
        torch.testing.assert_close(found[place], own[place] - others.mean(0))


def test_what_is_usual_is_so_without_damaged_copies():
    """A copy's is the mean over images other than its own."""
    some = maps(5)
    patches = RarePatches(SIZE).double()
    found = patches.fit(some, distances(some), torch.tensor([0, 1, 2, 1, 2]))
    own = rare(some, distances(some))
    torch.testing.assert_close(patches.usual, own[:3].mean(0))
    torch.testing.assert_close(found[3], own[3] - own[[0, 2]].mean(0))
    torch.testing.assert_close(found[4], own[4] - own[[0, 1]].mean(0))
    torch.testing.assert_close(found[:3], fitted(some[:3], distances(some)[:3])[1])


def test_what_is_rare_in_the_same_place_of_every_image_is_usual():
    """An edge, or a label: it stands out only where it does not belong."""
    some = 0.1 * maps(30)
    far = torch.full((30, *SIZE), 0.2, dtype=torch.float64)
    some[:, 0, 1, 5] += 10
    far[:, 1, 5] = 10
    patches, _ = fitted(some, far)
    assert float(patches(some, far).max()) < 0.5
    moved, far_moved = some[:1].roll(-4, 3), far[:1].roll(-4, 2)
    assert int(patches(moved, far_moved).argmax()) == SIZE[1] + 1
    assert float(patches(moved, far_moved).max()) > 5


def test_a_content_that_no_bank_holds_is_normal_where_it_is_repeated():
    size = (9, 12)
    some = 0.1 * maps(20, size=size)
    patches, _ = fitted(some, torch.full((20, *size), 0.3, dtype=torch.float64))
    new = 0.1 * maps(1, 1, size)
    new[:, :, :, 4:] += 20  # a texture of its own, on most of the image
    far = torch.full((1, *size), 0.3, dtype=torch.float64)
    far[:, :, 4:] = 30
    assert float(patches(new, far).max()) < 2
    once = new.clone()
    once[0, 0, 7, 8] += 20
    assert int(patches(once, far).argmax()) == 7 * 12 + 8
    assert float(patches(once, far).max()) > 15


def test_copies_are_at_no_distance_of_rounding():
    """An export, which rounds otherwise, would differ by it."""
    some = torch.randn(2, 64, 1, 1, generator=torch.Generator().manual_seed(0)).expand(2, 64, *SIZE).clone() * 4
    far = torch.full((2, *SIZE), 50.0)
    patches = RarePatches(SIZE)
    single, exact = patches(some, far).double(), patches.double()(some.double(), far.double())
    assert float(exact.max()) < 0.01 * float(some.square().sum(1).sqrt().mean())
    torch.testing.assert_close(single, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("size", "step", "compared"), [((28, 28), 2, 196), ((40, 40), 2, 400), ((63, 63), 3, 441), ((100, 80), 3, 918)]
)
def test_large_maps_are_compared_with_fewer_of_their_positions(size, step, compared):
    patches = RarePatches(size)
    assert patches.step == step
    assert patches.near.shape == (compared, size[0] * size[1])


def test_each_kind_has_its_usual():
    first, second = maps(), 3 * maps(seed=2)
    (one, _), (other, _) = fitted(first, distances(first)), fitted(second, distances(second))
    both = RarePatches(SIZE).double()
    both.join([one.fit_state(), other.fit_state()])
    new, kinds = maps(3, 4), torch.tensor([1, 0, 1])
    far = distances(new)
    expected = torch.stack([part(new, far)[row] for row, part in enumerate((other, one, other))])
    torch.testing.assert_close(both(new, far, kinds), expected)
    again = RarePatches(SIZE).double()
    again.load_state_dict(both.state_dict())
    assert torch.equal(again(new, far, kinds), both(new, far, kinds))
    both.forget()
    torch.testing.assert_close(both(new, far), rare(new, far))
