# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_flowood.flows import MASKS, coupling_mask, halves, pixel_flow, quadrants, register_mask

shapes = st.tuples(st.integers(2, 5), st.integers(2, 9), st.integers(2, 9))


@pytest.mark.parametrize("name", MASKS)
@given(shape=shapes, layer=st.integers(0, 11))
def test_the_two_sides_never_overlap_and_neither_is_empty(name, shape, layer):
    mask = coupling_mask(name, shape, layer)
    assert mask.feed.shape == mask.change.shape == shape
    assert not (mask.feed & mask.change).any()
    assert mask.feed.any()
    assert mask.change.any()


@given(name=st.sampled_from(["checkerboard", "channel", "horizontal"]), shape=shapes, layer=st.integers(0, 11))
def test_halves_cover_everything_and_swap(name, shape, layer):
    mask, following = coupling_mask(name, shape, layer), coupling_mask(name, shape, layer + 1)
    assert (mask.feed | mask.change).all()
    assert torch.equal(mask.feed, following.change)


@given(shape=shapes, start=st.integers(0, 7))
def test_cycle_visits_every_quadrant_once_in_four_layers(shape, start):
    layers = [coupling_mask("cycle", shape, start + i) for i in range(4)]
    assert torch.equal(sum(mask.change.int() for mask in layers), torch.ones(shape, dtype=torch.int))
    for before, after in zip(layers, [*layers[1:], layers[0]], strict=True):
        assert torch.equal(before.change, after.feed)


def test_cycle_runs_clockwise_from_the_top_left():
    first = coupling_mask("cycle", (1, 4, 4), 0)
    assert first.feed[0, :2, :2].all()
    assert first.change[0, :2, 2:].all()
    assert coupling_mask("cycle", (1, 4, 4), 1).change[0, 2:, 2:].all()


@given(height=st.integers(2, 12), width=st.integers(2, 12))
def test_quadrants_tile_the_image(height, width):
    image = torch.zeros(height, width)
    for rows, columns in quadrants(height, width):
        image[rows, columns] += 1
    assert torch.equal(image, torch.ones(height, width))


def test_masks_as_the_papers_draw_them():
    assert coupling_mask("checkerboard", (1, 2, 3), 0).feed.int().tolist() == [[[1, 0, 1], [0, 1, 0]]]
    assert coupling_mask("horizontal", (1, 3, 2), 0).feed.int().tolist() == [[[1, 1], [0, 0], [0, 0]]]
    assert coupling_mask("channel", (4,), 0).feed.int().tolist() == [1, 1, 0, 0]


def test_a_registered_mask_is_known_everywhere(monkeypatch):
    def vertical(shape, layer):
        return halves((torch.arange(shape[2]) < shape[2] // 2).expand(shape), layer)

    with pytest.raises(ValueError, match="Unknown mask 'vertical'"):
        coupling_mask("vertical", (1, 4, 4), 0)
    monkeypatch.setitem(MASKS, "vertical", None)  # so that it is taken out again
    register_mask("vertical", needs="a width of at least 2")(vertical)

    flow = pixel_flow((1, 4, 4), mask="vertical", coupling_layers=2, hidden_channels=4, bottleneck_dim=2)
    assert torch.equal(flow[1].feed, coupling_mask("vertical", (1, 4, 4), 0).feed.float())
    with pytest.raises(ValueError, match="'vertical' leaves nothing to change.*: it needs a width of at least 2"):
        coupling_mask("vertical", (1, 4, 1), 0)
    with pytest.raises(ValueError, match="Known: .*vertical"):
        coupling_mask("x", (1, 4, 4), 0)
    register_mask("vertical", needs="a width of at least 2")(vertical)  # imported again
    vertical.__module__ = "another"
    with pytest.raises(ValueError, match="There is a mask 'vertical' already, of test_masks: choose another name"):
        register_mask("vertical", needs="")(vertical)


def test_unknown_mask_offers_the_nearest_name():
    with pytest.raises(ValueError, match="Unknown mask 'checkerbord'. Did you mean 'checkerboard'"):
        coupling_mask("checkerbord", (1, 4, 4), 0)


@pytest.mark.parametrize(
    ("name", "shape", "need"),
    [
        ("channel", (1, 4, 4), "at least 2 channels"),
        ("horizontal", (1, 1, 4), "a height of at least 2"),
        ("cycle", (1, 1, 4), "a height and a width of at least 2"),
        ("checkerboard", (1, 1, 1), "at least 2 pixels"),
    ],
)
def test_a_mask_that_changes_nothing_is_refused(name, shape, need):
    with pytest.raises(ValueError, match=need):
        coupling_mask(name, shape, 0)


def test_image_masks_refuse_vectors():
    with pytest.raises(ValueError, match=r"defined on images \(C, H, W\)"):
        coupling_mask("cycle", (16,), 0)
