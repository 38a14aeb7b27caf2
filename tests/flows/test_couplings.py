# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import FrEIA.framework as ff
import pytest
import torch
from flow_helpers import check_inverse, check_log_det, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anomalib_flowood.flows import (
    MASKS,
    SCALES,
    ChannelCoupling,
    CouplingMask,
    MaskedCoupling,
    QuadrantCoupling,
    coupling_mask,
    quadrants,
    subnet_constructor,
)

SHAPE = (2, 5, 4)
NATIVE = {f"native {name}": family.native for name, family in MASKS.items() if family.native}
FORMS = [*MASKS, *NATIVE]


def coupling(form, shape=SHAPE, layer=0, subnet="bottleneck", scale="tanh"):
    return randomise(fresh_coupling(form, shape, layer, subnet, scale))


def fresh_coupling(form, shape=SHAPE, layer=0, subnet="bottleneck", scale="tanh"):
    kind = NATIVE.get(form, MaskedCoupling)
    size = kind.subnet_size(shape)
    constructor = subnet_constructor(subnet, hidden_channels=12, bottleneck_dim=3, size=size)
    if form in NATIVE:
        return kind([shape], layer=layer, subnet_constructor=constructor, scale=scale)
    mask = coupling_mask(form, shape, layer)
    return MaskedCoupling([shape], mask=mask, subnet_constructor=constructor, scale=scale)


def mask_of(form, shape=SHAPE, layer=0):
    return coupling_mask(form.removeprefix("native "), shape, layer)


def call(module):
    """FrEIA's convention without the tuples."""
    return lambda x, rev=False: (lambda out: (out[0][0], out[1]))(module((x,), rev=rev))


forms = pytest.mark.parametrize("form", FORMS)
scales = pytest.mark.parametrize("scale", SCALES)
shapes = st.tuples(st.integers(2, 3), st.integers(3, 6), st.integers(3, 6))


def test_the_native_forms_that_there_are():
    assert {"native channel": ChannelCoupling, "native cycle": QuadrantCoupling} == NATIVE


@forms
@settings(max_examples=6)
@given(
    shape=shapes,
    layer=st.integers(0, 7),
    subnet=st.sampled_from(["bottleneck", "mlp", "resnet"]),
    scale=st.sampled_from(SCALES),
    seed=st.integers(0, 99),
)
def test_inverse_and_log_determinant(form, shape, layer, subnet, scale, seed):
    module = call(coupling(form, shape, layer, subnet, scale))
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    check_inverse(module, x)
    check_log_det(module, x)


@forms
@settings(max_examples=6)
@given(shape=shapes, layer=st.integers(0, 7), seed=st.integers(0, 99))
def test_without_a_scale_couplings_keep_volumes(form, shape, layer, seed):
    additive = coupling(form, shape, layer, scale="none")
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y, log_det = call(additive)(x)
    assert torch.equal(log_det, torch.zeros(2).double())
    # What is changed is shifted, whatever it is.
    change = mask_of(form, shape, layer).change
    moved, _ = call(additive)(x + change)
    torch.testing.assert_close(moved, y + change)
    assert torch.equal(y[:, ~change], x[:, ~change])


@forms
def test_a_log_scale_of_zero_is_no_scale(form):
    affine, additive = coupling(form), coupling(form, scale="none")
    affine.scale.data.zero_()
    shifts = {
        name: value.chunk(2)[1] if value.shape != additive.subnet.state_dict()[name].shape else value
        for name, value in affine.subnet.state_dict().items()
    }
    additive.subnet.load_state_dict(shifts)
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(call(additive)(x)[0], call(affine)(x)[0])


@forms
@scales
@pytest.mark.parametrize("layer", range(4))
def test_only_the_masked_part_changes_and_only_the_fed_part_matters(form, scale, layer):
    module = call(coupling(form, layer=layer, subnet="mlp", scale=scale))
    feed, change = mask_of(form, layer=layer)
    x = torch.randn(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    y, _ = module(x)
    assert torch.equal(y[0][~change], x[0][~change])
    assert (y[0][change] != x[0][change]).all()

    (gradient,) = torch.autograd.grad(y[0][change].sum(), x)
    assert (gradient[0][~(feed | change)] == 0).all()
    assert (gradient[0][feed] != 0).any()


def test_one_cycle_layer_depends_only_on_the_quadrant_before():
    shape = (1, 6, 6)
    parts = quadrants(6, 6)
    for layer in range(8):
        module = call(coupling("native cycle", shape, layer))
        x = torch.randn(1, *shape, dtype=torch.float64)
        y, _ = module(x)
        for number, (rows, columns) in enumerate(parts):
            moved = x.clone()
            moved[:, :, rows, columns] += 1
            y_moved, _ = module(moved)
            source, target = layer % 4, (layer + 1) % 4
            affected = {number, target} if number == source else {number}
            for other, (other_rows, other_columns) in enumerate(parts):
                same = torch.equal(y[:, :, other_rows, other_columns], y_moved[:, :, other_rows, other_columns])
                assert same == (other not in affected)


class FromMasked(nn.Module):
    """The network of the native form inside of the zero-masked form: reads one quadrant, writes the next."""

    def __init__(self, subnet: nn.Module, layer: int, height: int, width: int) -> None:
        super().__init__()
        self.subnet = subnet
        self.parts = quadrants(height, width)
        self.layer = layer

    def forward(self, x):
        rows, columns = self.parts[self.layer % 4]
        inner = self.subnet(x[:, :, rows, columns])
        out = x.new_zeros(x.shape[0], inner.shape[1], *x.shape[2:])
        rows, columns = self.parts[(self.layer + 1) % 4]
        out[:, :, rows, columns] = inner
        return out


@pytest.mark.parametrize("layer", range(4))
def test_native_and_zero_masked_cycle_agree(layer):
    shape = (2, 6, 4)
    native = coupling("native cycle", shape, layer)
    masked = MaskedCoupling(
        [shape],
        mask=coupling_mask("cycle", shape, layer),
        subnet_constructor=lambda *_: FromMasked(native.subnet, layer, *shape[1:]),
    ).double()
    masked.scale = native.scale
    x = torch.randn(3, *shape, dtype=torch.float64)
    for ours, theirs in zip(call(native)(x), call(masked)(x), strict=True):
        torch.testing.assert_close(ours, theirs)


class FromMaskedHalf(nn.Module):
    """The network of the native channel form inside of the zero-masked form: reads one half, writes the other."""

    def __init__(self, coupling: ChannelCoupling) -> None:
        super().__init__()
        self.coupling = coupling

    def forward(self, x):
        halves = x.split(self.coupling.halves, dim=1)
        raw, shift = self.coupling.subnet(halves[self.coupling.source]).chunk(2, dim=1)
        return torch.cat([self.coupling.spread(raw), self.coupling.spread(shift)], dim=1)


@pytest.mark.parametrize("layer", range(2))
@pytest.mark.parametrize("shape", [(3, 4, 5), (9,)])
def test_native_and_zero_masked_channel_agree(layer, shape):
    native = coupling("native channel", shape, layer)
    masked = MaskedCoupling(
        [shape], mask=coupling_mask("channel", shape, layer), subnet_constructor=lambda *_: FromMaskedHalf(native)
    ).double()
    masked.scale.data = native.spread(native.scale[None])[0].data
    x = torch.randn(3, *shape, dtype=torch.float64)
    for ours, theirs in zip(call(native)(x), call(masked)(x), strict=True):
        torch.testing.assert_close(ours, theirs)


@forms
@scales
def test_starts_as_the_identity(form, scale):
    x = torch.randn(2, *SHAPE)
    y, log_det = call(fresh_coupling(form, subnet="mlp", scale=scale))(x)
    torch.testing.assert_close(y, x)
    assert torch.equal(log_det, torch.zeros(2))


@forms
def test_pickles_and_copies(form):
    module = coupling(form)
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    expected, _ = call(module)(x)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(call(other)(x)[0], expected)


@forms
def test_moves_to_another_device_with_its_mask(form):
    module = coupling(form).to("meta")
    y, log_det = call(module)(torch.empty(2, *SHAPE, dtype=torch.float64, device="meta"))
    assert y.device.type == log_det.device.type == "meta"


@pytest.mark.parametrize(
    ("form", "scale"), [("checkerboard", "tanh"), *((form, scale) for form in NATIVE for scale in SCALES)]
)
def test_exports_to_onnx(form, scale, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is the extra anomalib-flowood[export]")

    class Flat(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x):
            (y,), log_det = self.module((x,))
            return y, log_det

    module = Flat(coupling(form, scale=scale).float()).eval()
    x = torch.randn(3, *SHAPE)
    path = tmp_path / "coupling.onnx"
    torch.onnx.export(module, (x,), str(path), dynamo=True, verbose=False, input_names=["x"])
    ours = module(x)
    theirs = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    for value, exported in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.from_numpy(exported), value, rtol=1e-4, atol=1e-5)


def test_fits_into_freia_graphs():
    constructor = subnet_constructor("resnet", hidden_channels=4, bottleneck_dim=2, size=SHAPE[1:])
    start = ff.InputNode(*SHAPE, name="image")
    arguments = {"mask": coupling_mask("horizontal", SHAPE, 0), "subnet_constructor": constructor}
    masked = ff.Node(start, MaskedCoupling, arguments)
    flow = randomise(ff.GraphINN([start, masked, ff.OutputNode(masked)]))
    check_inverse(flow, torch.randn(2, *SHAPE, dtype=torch.float64))


def test_bad_masks_are_refused():
    constructor = subnet_constructor("mlp", hidden_channels=4, bottleneck_dim=2, size=(4, 4))
    ones = torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="cannot both feed the network and be changed"):
        MaskedCoupling([(1, 4, 4)], mask=CouplingMask(ones, ones), subnet_constructor=constructor)
    with pytest.raises(ValueError, match="mask has the shape"):
        MaskedCoupling([(2, 4, 4)], mask=CouplingMask(ones, ~ones), subnet_constructor=constructor)
    with pytest.raises(ValueError, match="at least 2 x 2 pixels"):
        QuadrantCoupling([(1, 1, 4)], layer=0, subnet_constructor=constructor)
    with pytest.raises(ValueError, match="at least 2 channels"):
        ChannelCoupling([(1, 4, 4)], layer=0, subnet_constructor=constructor)
    with pytest.raises(ValueError, match="one input and no condition"):
        QuadrantCoupling([(1, 4, 4)], layer=0, subnet_constructor=constructor, dims_c=[(3,)])


def test_an_unknown_scale_is_refused():
    constructor = subnet_constructor("mlp", hidden_channels=4, bottleneck_dim=2)
    with pytest.raises(ValueError, match="Unknown scale 'exp'. Known: none, tanh"):
        ChannelCoupling([(4,)], layer=0, subnet_constructor=constructor, scale="exp")
