# SPDX-License-Identifier: Apache-2.0
import math
import pickle
from itertools import combinations

import pytest
import torch
from flow_helpers import check_inverse, check_log_det, randomise, shares
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_flowood.flows import (
    CONTEXTS,
    SCALES,
    AffineCoupling,
    StandardNormal,
    StudentT,
    density,
    draw_positions,
    encode_places,
    position_flow,
    quadrants,
)
from anomalib_flowood.flows.position_couplings import split_by_digit

SHAPE = (5, 3, 4)

contexts = pytest.mark.parametrize("context", CONTEXTS)


def fresh(shape=SHAPE, context="none", **kwargs):
    return position_flow(
        shape, context=context, **{"coupling_layers": 8, "hidden_channels": 7, "bottleneck_dim": 3, **kwargs}
    )


def flow_of(shape=SHAPE, context="none", **kwargs):
    return randomise(fresh(shape, context, **kwargs))


def maps(shape=SHAPE, n=2, seed=0):
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class UnderACondition:
    """A flow, its condition held fast."""

    def __init__(self, flow, x):
        self.flow, self.condition = flow, flow.condition(x)

    def __call__(self, x, rev=False):
        condition = self.condition
        return self.flow(x, c=None if condition is None else [condition[: len(x)]], rev=rev)


@contexts
@settings(max_examples=8)
@given(
    shape=st.tuples(st.integers(2, 5), st.integers(2, 4), st.integers(2, 4)),
    layers=st.integers(1, 9),
    scale=st.sampled_from(SCALES),
    subnet=st.sampled_from(["mlp", "bottleneck"]),
    seed=st.integers(0, 99),
)
def test_inverse_and_log_determinant(context, shape, layers, scale, subnet, seed):
    sizes = {"coupling_layers": layers, "bottleneck_dim": 1, "scale": scale, "subnet": subnet}
    x = maps(shape, n=1, seed=seed)
    flow = UnderACondition(flow_of(shape, context, **sizes), x)
    check_inverse(flow, x)
    check_log_det(flow, x)


@contexts
def test_it_shifts_alone_by_default_and_keeps_volumes(context):
    x = maps()
    flow = flow_of(context=context)
    z, log_det = flow(x)
    assert all(coupling.scale is None for coupling in flow)
    assert torch.equal(log_det, torch.zeros(2).double())
    assert (z != x).all()


@contexts
def test_inverse_in_single_precision(context):
    flow, x = fresh((16, 6, 7), context, hidden_channels=32), maps((16, 6, 7)).float()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    flow = UnderACondition(flow, x)
    z, _ = flow(x)
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(flow(z, rev=True)[0], x, rtol=0, atol=1e-4)


@contexts
@pytest.mark.parametrize("scale", SCALES)
def test_a_fresh_flow_is_the_identity(context, scale):
    x = torch.randn(2, *SHAPE)
    z, log_det = fresh(context=context, scale=scale)(x)
    assert torch.equal(z, x)
    assert torch.equal(log_det, torch.zeros(2))


@contexts
def test_without_couplings_too(context):
    x = maps()
    assert torch.equal(fresh(context=context, coupling_layers=0)(x)[0], x)


@contexts
@pytest.mark.parametrize("layer", range(8))
def test_a_layer_changes_its_part_alone(context, layer):
    flow, x = flow_of(context=context), maps()
    y, s = flow[layer].couple(x, condition=flow.condition(x))
    channels = torch.zeros(SHAPE, dtype=torch.bool)
    channels[split_by_digit(SHAPE[0], layer // 4 if context == "quadrant" else layer)[1]] = True
    places = torch.ones(SHAPE, dtype=torch.bool)
    if context == "quadrant":
        rows, columns = quadrants(*SHAPE[1:])[(layer + 1) % 4]
        places[:] = False
        places[:, rows, columns] = True
    assert torch.equal((y != x).any(0), channels & places)
    assert torch.equal(flow[layer].spread(torch.ones_like(s))[0].bool(), channels & places)


@contexts
def test_what_a_position_depends_on(context):
    """Its own numbers, and of other positions no more than the context tells."""
    flow, x = flow_of((4, 4, 4), context, coupling_layers=1), maps((4, 4, 4), n=1)
    given = flow.condition(x)

    def changed(where):
        moved = x.clone()
        moved[(..., *where)] += 1
        return (flow(moved, c=None if given is None else [given])[0] != flow(x)[0]).any(1)[0]

    before, after, beside = (0, 1), (1, 2), (3, 3)  # the first layer reads the top left, and changes the top right
    for place in (before, after, beside):
        expected = torch.zeros(4, 4, dtype=torch.bool)
        expected[place] = True
        if context == "quadrant" and place == before:
            expected[:2, 2:] = True
        assert torch.equal(changed(place), expected)


@contexts
def test_a_density_with_the_place_in_it(context):
    """The same vector at two places has two densities."""
    flow = flow_of(context=context)
    share = shares(flow, StandardNormal(), torch.ones(1, *SHAPE).double()).sum(1).flatten()
    assert share.unique().numel() == share.numel()


def test_with_a_mean_the_density_knows_the_image():
    flow, x = flow_of(context="mean"), maps(n=2)
    x[1, :, 0, 0] = x[0, :, 0, 0]
    z, _ = flow(x)
    assert (z[0, :, 0, 0] != z[1, :, 0, 0]).any()
    z, _ = flow_of(context="none")(x)
    torch.testing.assert_close(z[0, :, 0, 0], z[1, :, 0, 0])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("base", [StandardNormal(), StudentT(6.0)])
@contexts
def test_shares_sum_to_minus_log_p(context, base, scale):
    flow, x = flow_of(context=context, scale=scale), maps(n=3)
    split = shares(flow, base, x)
    assert split.shape == x.shape
    given = flow.condition(x)
    torch.testing.assert_close(split.flatten(1).sum(1), -density(flow, base, x, condition=given).log_prob)
    torch.testing.assert_close(split, shares(flow, base, x, given))


@pytest.mark.parametrize("context", ["none", "mean"])
@pytest.mark.parametrize("scale", SCALES)
def test_positions_on_their_own_are_those_of_maps(context, scale):
    flow, x = flow_of(context=context, scale=scale), maps(n=3)
    vectors, places, images = draw_positions(x, 50, torch.Generator().manual_seed(0))
    given = flow.condition(x)
    given = None if given is None else given[images]
    z, log_det = flow.at(vectors, places, given)
    whole = flow(x)[0].flatten(2)
    torch.testing.assert_close(z, whole[images, :, places])
    each = shares(flow, StandardNormal(), x).sum(1).flatten(1)
    torch.testing.assert_close(-StandardNormal().log_prob(z) - log_det, each[images, places])
    back, log_det_back = flow.at(z, places, given, rev=True)
    torch.testing.assert_close(back, vectors)
    torch.testing.assert_close(log_det_back, -log_det)


def test_drawn_positions():
    x = maps(n=3)
    vectors, places, images = draw_positions(x, 500, torch.Generator().manual_seed(0))
    assert torch.equal(vectors, x.flatten(2)[images, :, places])
    assert set(images.tolist()) == {0, 1, 2}
    assert set(places.tolist()) == set(range(12))


def test_the_density_of_a_position_integrates_to_one():
    flow = randomise(position_flow((2, 2, 3), coupling_layers=4, hidden_channels=5), scale=0.5)
    axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        for place in (0, 5):
            z, log_det = flow.at(grid, torch.full((len(grid),), place))
            total = (StandardNormal().log_prob(z) + log_det).exp().sum() * (axis[1] - axis[0]) ** 2
            assert total.item() == pytest.approx(1, abs=1e-3)


def test_training_learns_what_belongs_where():
    """Two kinds of vectors, one on each side of the map: likely at home, unlikely on the other side."""
    torch.manual_seed(0)
    centres = torch.cat([torch.full((2, 4, 2), -2.0), torch.full((2, 4, 2), 2.0)], dim=2)
    flow = position_flow((2, 4, 4), coupling_layers=4, hidden_channels=16)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(60):
        vectors, places, _ = draw_positions(centres + 0.5 * torch.randn(16, 2, 4, 4), 256)
        z, log_det = flow.at(vectors, places)
        loss = -(StandardNormal().log_prob(z) + log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        home, away = (shares(flow, StandardNormal(), x[None]).sum() for x in (centres, centres.flip(2)))
    assert home / 16 < 2.2 < 4 < away / 16


@pytest.mark.parametrize("dims", range(2, 70))
def test_any_two_numbers_are_apart_in_some_layer(dims):
    layers = [split_by_digit(dims, layer) for layer in range(2 * (dims - 1).bit_length())]
    for fed, changed in layers:
        assert min(len(fed), len(changed)) > 0
        assert sorted([*fed.tolist(), *changed.tolist()]) == list(range(dims))
    halves = [set(fed.tolist()) for fed, _ in layers]
    assert all(any((a in half) != (b in half) for half in halves) for a, b in combinations(range(dims), 2))
    for even, odd in zip(layers[::2], layers[1::2], strict=True):
        assert torch.equal(even[0], odd[1])


def test_places_are_told_apart():
    places = encode_places(14, 9)
    assert places.shape == (126, 16)
    assert torch.cdist(places, places).fill_diagonal_(1).min() > 0.1
    assert places.abs().max() <= 1
    # The first column of sines is half a period over the rows.
    torch.testing.assert_close(places[::9, 0], torch.sin(math.pi * (torch.arange(14) + 0.5) / 14))


@contexts
def test_state_and_pickle_round_trip(context):
    flow, other, x = flow_of(context=context), fresh(context=context).double(), maps()
    other.load_state_dict(flow.state_dict())
    assert not any("places" in name or "order" in name for name in flow.state_dict())
    for again in (other, pickle.loads(pickle.dumps(flow))):
        assert torch.equal(again(x)[0], flow(x)[0])


@contexts
def test_moves_to_another_device(context):
    z, log_det = fresh(context=context).to("meta")(torch.empty(2, *SHAPE, device="meta"))
    assert z.device.type == log_det.device.type == "meta"


def test_exports_to_onnx_with_any_number_of_images(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is the extra anomalib-flowood[export]")

    class Shares(torch.nn.Module):
        def __init__(self):
            super().__init__()
            flows = [flow_of(context=context, coupling_layers=1).float() for context in CONTEXTS]
            self.flows = torch.nn.ModuleList(flows)

        def forward(self, x):
            return torch.stack([shares(flow, StandardNormal(), x) for flow in self.flows])

    module = Shares().eval()
    path = tmp_path / "flow.onnx"
    batch = {"x": {0: torch.export.Dim("n", min=1, max=64)}}
    torch.onnx.export(module, (torch.randn(3, *SHAPE),), str(path), dynamo=True, verbose=False, dynamic_shapes=batch)
    x = torch.randn(5, *SHAPE)
    session = onnxruntime.InferenceSession(str(path))
    (exported,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(exported), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"context": "quadrants"}, "Unknown context 'quadrants'. Did you mean 'quadrant'"),
        ({"scale": "exp", "coupling_layers": 0}, "Unknown scale 'exp'"),
        ({"coupling_layers": -1}, "coupling_layers must be at least 0, got -1"),
        ({"hidden_channels": 0}, "hidden_channels must be at least 1, got 0"),
        ({"subnet": "resnet"}, "'resnet' is convolutional"),
        ({"shape": (1, 4, 4)}, r"at least 2 channels, got the shape \(1, 4, 4\)"),
        ({"shape": (4, 1, 4), "context": "quadrant"}, "at least 2 x 2 positions"),
        ({"context": "quadrant", "bottleneck_dim": 10}, "bottleneck_dim=10 squeezes nothing: .* has 10 values"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fresh(**kwargs)


def test_what_a_flow_is_not_told_it_asks_for():
    x = maps()
    vectors, places, _ = draw_positions(x, 4)
    with pytest.raises(ValueError, match=r"inverse .* needs c=\[condition\]"):
        flow_of(context="mean")(x, rev=True)
    with pytest.raises(ValueError, match="needs whole maps"):
        flow_of(context="quadrant").at(vectors, places)
    with pytest.raises(ValueError, match="'mean' positions have a condition"):
        flow_of(context="mean").at(vectors, places)
    with pytest.raises(ValueError, match="'none' positions have no condition"):
        flow_of().at(vectors, places, vectors)


def test_couplings_are_couplings_like_others():
    assert all(isinstance(coupling, AffineCoupling) for coupling in fresh(context="quadrant"))
