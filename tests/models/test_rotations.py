# SPDX-License-Identifier: Apache-2.0
"""Which turns leave normal images normal is found in their features alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_flowood.models.components import rotations


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    """Images of a bright corner, in noise."""
    images = 0.5 * torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    images[:, :, :8, :8] += 2
    return images


def lying(images: torch.Tensor, quarters: tuple[int, ...]) -> torch.Tensor:
    """Each image turned by one of some angles, in turn."""
    return torch.stack([image.rot90(quarters[number % len(quarters)], (1, 2)) for number, image in enumerate(images)])


def seen(images: torch.Tensor, turns: int) -> tuple[torch.Tensor, ...]:
    """What a backbone might give: pooled features, and a map."""
    parts = [(image.mean((2, 3)), image.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)))
             for image in rotations.turned(images, turns)]  # fmt: skip
    return rotations.together(parts)


@given(count=st.integers(1, 4), turns=st.sampled_from([1, 2, 4]), kept=st.sampled_from([1, 2, 4]))
def test_copies_of_an_image_come_one_after_the_other(count, turns, kept):
    images = torch.randn(count, 3, 5, 5)
    whole = rotations.together([(turned, turned.mean((2, 3))) for turned in rotations.turned(images, turns)])
    assert all(len(part) == turns * count for part in whole)
    for number, image in enumerate(images):
        for place, quarters in enumerate(rotations.QUARTERS[:turns]):
            assert torch.equal(whole[0][number * turns + place], image.rot90(quarters, (1, 2)))
    if kept <= turns:
        fewer = rotations.first_turns(whole, turns, kept)
        assert torch.equal(fewer[0], rotations.together([(x,) for x in rotations.turned(images, kept)])[0])
        torch.testing.assert_close(fewer[1], fewer[0].mean((2, 3)))


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_maps_keep_the_layout_that_the_backbone_gives_them(turns):
    """Otherwise they are stored with channels first, and fits of maps take longer."""
    images = torch.randn(3, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    maps = [(turned.contiguous(memory_format=torch.channels_last),) for turned in rotations.turned(images, turns)]
    whole = rotations.together(maps)
    for kept in (1, 2, 4)[: [1, 2, 4].index(turns) + 1]:
        (part,) = rotations.first_turns(whole, turns, kept)
        assert part.is_contiguous(memory_format=torch.channels_last)
    if turns == 1:
        assert whole[0].data_ptr() == images.data_ptr()  # what is not turned is not copied


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_the_kept_rotations_are_a_group(turns):
    kept = set(rotations.QUARTERS[:turns])
    assert {(one + other) % 4 for one in kept for other in kept} == kept


@pytest.mark.parametrize(("quarters", "want"), [((0,), 1), ((0, 2), 2), ((0, 1, 2, 3), 4), ((0, 1), 1)])
def test_turns_fit_where_images_lie_so(quarters, want):
    """Lying upright or by a quarter is no reason for half a turn, without which quarters are no group."""
    features = seen(lying(drawn(40), quarters), 4)
    found, aurocs = rotations.turns_that_fit(features, 4)
    assert found == want
    assert aurocs[0] == 0.5
    for place, turn in enumerate(rotations.QUARTERS[1:], 1):
        if all((turn + lie) % 4 in quarters for lie in quarters):
            assert aurocs[place] < rotations.LIMIT
        elif not any((turn + lie) % 4 in quarters for lie in quarters):
            assert aurocs[place] > 0.95


def test_halves_alone_are_tried_of_images_that_are_not_square():
    images = lying(drawn(30), (0, 2))[..., 2:14]
    features = rotations.together([(turned,) for turned in rotations.turned(images, 2)])
    assert rotations.turns_that_fit(features, 2)[0] == 2


@pytest.mark.parametrize("count", [2, 3])
def test_two_images_are_enough_to_tell(count):
    assert rotations.turns_that_fit(seen(drawn(count), 4), 4)[0] == 1


def test_features_that_never_vary_are_no_hindrance():
    features = seen(lying(drawn(20), (0, 1, 2, 3)), 4)
    constant = torch.full((80, 2), 1e4)
    assert rotations.turns_that_fit((*features, constant), 4) == rotations.turns_that_fit(features, 4)


def test_half_precision_tells_the_same():
    features = seen(lying(drawn(20), (0, 2)), 4)
    found, aurocs = rotations.turns_that_fit(tuple(part.half() for part in features), 4)
    whole, exact = rotations.turns_that_fit(features, 4)
    assert found == whole
    assert aurocs == pytest.approx(exact, abs=0.02)
