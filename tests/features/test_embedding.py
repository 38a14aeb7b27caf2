# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from model_helpers import BACKBONE
from pretend_device import pretend_device

from anomalib_flowood.features import Embedding
from anomalib_flowood.features.embedding import Layout, _to_grid
from anomalib_flowood.flows import in_turn

SIZE = (64, 96)


def made(layers=(1, 2), dtype=torch.float64, map_dims=5, fit=True) -> Embedding:
    torch.manual_seed(1)
    embedding = Embedding(BACKBONE, layers, SIZE, pre_trained=False, map_dims=map_dims).to(dtype)
    if fit:
        embedding.fit(features_of(embedding, 40))
    return embedding


def features_of(embedding, n, seed=3):
    images = torch.rand(n, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return embedding.extract(images.to(next(embedding.parameters()).dtype))


def by_formula(fitted_on, features, dims):
    """What the class says, in NumPy."""
    parts = [features[0].numpy()]
    for training, layer in zip(fitted_on[1:], features[1:], strict=True):
        vectors = training.numpy().transpose(0, 2, 3, 1).reshape(-1, training.shape[1])
        variances, directions = np.linalg.eigh(np.cov(vectors.T))
        variances, directions = variances[::-1][:dims], directions.T[::-1][:dims]
        centred = layer.numpy().transpose(0, 2, 3, 1) - vectors.mean(0)
        layout = (centred @ directions.T) / variances**0.25
        parts.append(layout.transpose(0, 3, 1, 2).reshape(len(layer), -1))
    parts = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    return np.concatenate(parts, axis=1) / len(parts) ** 0.5


@pytest.mark.parametrize("layers", [(), (2,), (1, 2)])
def test_embeddings_are_what_their_formula_says(layers):
    embedding = made(layers)
    fitted_on, features = features_of(embedding, 40), features_of(embedding, 6, seed=4)
    ours, expected = embedding(features).numpy(), by_formula(fitted_on, features, 5)
    assert ours.shape == expected.shape == (6, embedding.dims)
    # The sign of a principal direction is nobody's choice.
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1)


def test_an_embedding_does_not_depend_on_the_other_images():
    embedding = made()
    features = features_of(embedding, 7)
    together = embedding(features)
    alone = torch.cat([embedding(tuple(part[[row]] for part in features)) for row in range(7)])
    torch.testing.assert_close(together, alone)
    repeated = tuple(part.repeat(80, *[1] * (part.ndim - 1)) for part in features)
    torch.testing.assert_close(
        torch.cat([*in_turn(embedding.of_stored(repeated), 100)]),
        together.repeat(80, 1),
    )


def test_any_feature_precision_and_device_is_brought_to_the_modules():
    embedding = made(dtype=torch.float32)
    features = features_of(embedding, 4)
    here = embedding(features)
    assert here.dtype == torch.float32
    halves = tuple(part.half() for part in features)
    assert embedding(halves).dtype == torch.float32
    torch.testing.assert_close(embedding(halves), here, rtol=0, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedding(features), here)
    with pretend_device() as device:
        embedding.to(device)
        assert all(t.device.type == device.type for t in (*embedding.parameters(), *embedding.buffers()))
        there = embedding(features)
        embedding.fit(features)  # in main memory
        assert there.device.type == device.type
        torch.testing.assert_close(there.cpu(), here)


def test_what_is_fitted_is_in_the_state():
    embedding, fresh = made(), made(fit=False)
    features = features_of(embedding, 4)
    assert not torch.equal(fresh(features), embedding(features))
    state = embedding.state_dict()
    assert {f"layouts.{number}.{name}" for number in range(2) for name in ("mean", "directions")} <= state.keys()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(features), embedding(features))


def test_the_backbone_stays_frozen():
    embedding = made().train()
    assert embedding.training
    assert not embedding.network.training
    assert not any(parameter.requires_grad for parameter in embedding.parameters())


def test_the_layout_knows_where_things_are_and_pooled_features_do_not():
    embedding = made((2,))
    pooled, layer = features_of(embedding, 20)
    one, turned = embedding((pooled, layer)), embedding((pooled, layer.flip(3)))
    width = pooled.shape[1]
    assert torch.equal(one[:, :width], turned[:, :width])
    layout = one[:, width:].unflatten(1, (-1, *layer.shape[2:]))
    torch.testing.assert_close(layout.flip(3).flatten(1), turned[:, width:])


def test_maps_of_few_directions_leave_the_others_empty():
    layout = Layout(6, 4)
    basis = torch.linalg.qr(torch.randn(6, 6))[0][:2]
    layout.fit(torch.einsum("nkhw,kc->nchw", torch.randn(30, 2, 3, 3) * torch.tensor([3.0, 1.0])[:, None, None], basis))
    projected = layout(torch.einsum("nkhw,kc->nchw", torch.randn(50, 2, 3, 3), basis))
    assert projected.isfinite().all()
    assert projected[:, 2:].abs().max() < 1e-3 * projected[:, :2].abs().max()
    constant = Layout(6, 4)
    constant.fit(torch.ones(5, 6, 3, 3))
    assert constant(torch.ones(5, 6, 3, 3)).abs().max() == 0
    few = Layout(6, 4)
    few.fit(torch.randn(1, 6, 1, 2))  # two vectors have one direction
    assert (few.directions.norm(dim=1) > 0).sum() <= 2


@pytest.mark.parametrize(("length", "pooled"), [(3, 3), (7, 7), (10, 10), (11, 5), (14, 7), (28, 7), (56, 7)])
def test_maps_are_pooled_to_a_grid(length, pooled):
    assert _to_grid(torch.rand(1, 2, length, length)).shape[2:] == (pooled, pooled)


def test_no_directions_are_refused():
    with pytest.raises(ValueError, match="map_dims must be at least 1, got 0"):
        Embedding(BACKBONE, map_dims=0, pre_trained=False)
