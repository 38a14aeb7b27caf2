# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from pretend_device import pretend_device

from anomalib_flowood.features import Descriptors
from anomalib_flowood.features import descriptors as module


def maps(n=20, channels=6, height=4, width=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 5, channels)[:, None, None]
    return (torch.randn(n, channels, height, width, generator=generator) * scale + 1).to(dtype)


def fitted(dtype=torch.float64, **kwargs) -> Descriptors:
    descriptors = Descriptors(6, "blocks.2").to(dtype)
    descriptors.fit(maps(dtype=dtype, **kwargs))
    return descriptors


def by_formula(layer):
    """Every position's descriptor, before scaling, in NumPy: ``(N, C, h, w)`` to ``(N, h, w, 2 C)``."""
    vectors = layer.numpy().transpose(0, 2, 3, 1)
    directions = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    around = np.empty_like(directions)
    for row in range(vectors.shape[1]):
        for column in range(vectors.shape[2]):
            near = directions[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            around[:, row, column] = near.mean((1, 2))
    return np.concatenate([vectors, around], axis=-1)


def test_descriptors_are_what_their_formula_says():
    descriptors = fitted()
    expected = by_formula(maps())
    totals = expected.reshape(-1, 2, 6).var(axis=0).sum(axis=1)
    np.testing.assert_allclose(descriptors.scale, (totals**-0.5).repeat(6))
    fresh = maps(3, seed=1)
    np.testing.assert_allclose(
        descriptors(fresh).permute(0, 2, 3, 1), by_formula(fresh) * (totals**-0.5).repeat(6), atol=1e-12
    )


def test_a_fit_gives_the_descriptors_that_it_looked_at():
    descriptors = Descriptors(6, "blocks.2").double()
    drawn = descriptors.fit(maps())
    assert (drawn.shape, drawn.dtype) == ((20 * 4 * 5, 12), torch.float64)
    torch.testing.assert_close(drawn, descriptors(maps()).permute(0, 2, 3, 1).flatten(0, 2))
    halves = drawn.unflatten(1, (2, 6)).var(0, correction=0).sum(1)
    torch.testing.assert_close(halves, torch.ones(2).double())


def test_a_fit_looks_at_so_many_positions_and_at_none_twice(monkeypatch):
    monkeypatch.setattr(module, "_FIT_POSITIONS", 37)
    monkeypatch.setattr(module, "_CHUNK", 3)
    descriptors = Descriptors(6, "blocks.2").double()
    drawn = descriptors.fit(maps())
    everything = descriptors(maps()).permute(0, 2, 3, 1).flatten(0, 2)
    found = torch.cdist(drawn, everything).argmin(1)
    assert len(drawn) == len(found.unique()) == 37
    torch.testing.assert_close(drawn, everything[found])
    again = Descriptors(6, "blocks.2").double()
    assert torch.equal(again.fit(maps()), drawn)


def test_a_descriptor_does_not_depend_on_the_other_images():
    descriptors, layer = fitted(), maps(5)
    alone = torch.cat([descriptors(layer[[row]]) for row in range(5)])
    torch.testing.assert_close(descriptors(layer), alone)


def test_any_precision_and_device_of_maps_is_brought_to_the_modules():
    descriptors, layer = fitted(torch.float32), maps(dtype=torch.float32)
    here = descriptors(layer)
    assert descriptors(layer.half()).dtype == here.dtype == torch.float32
    torch.testing.assert_close(descriptors(layer.half()), here, rtol=0, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(descriptors(layer), here)
    with pretend_device() as device:
        descriptors.to(device)
        drawn = descriptors.fit(layer)  # in main memory
        assert drawn.device.type == "cpu"
        assert descriptors.scale.device.type == device.type
        there = descriptors(layer)
        assert there.device.type == device.type
        torch.testing.assert_close(there.cpu(), here)


def test_what_is_fitted_is_in_the_state():
    fresh = Descriptors(6, "blocks.2").double()
    assert torch.equal(fresh.scale, torch.ones(12).double())
    fresh.load_state_dict(fitted().state_dict())
    assert torch.equal(fresh(maps()), fitted()(maps()))


def test_maps_that_do_not_vary_are_refused():
    with pytest.raises(ValueError, match="The features of layer blocks.2 do not vary: are the training images all"):
        Descriptors(6, "blocks.2").fit(torch.ones(9, 6, 4, 5))
    longer = torch.ones(9, 6, 4, 5) * torch.rand(9, 1, 4, 5)
    with pytest.raises(ValueError, match="The directions of the features of layer blocks.2 do not vary"):
        Descriptors(6, "blocks.2").fit(longer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_refused(value):
    layer = maps()
    layer[3, 2, 1, 1] = value
    with pytest.raises(ValueError, match="The maps of layer blocks.2 hold NaN or infinite values"):
        Descriptors(6, "blocks.2").double().fit(layer)
