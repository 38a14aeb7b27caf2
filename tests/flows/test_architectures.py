# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest
import torch
from flow_helpers import check_inverse, check_log_det, randomise

from anomalib_flowood.flows import (
    ARCHITECTURES,
    LOGIT_ALPHA,
    MASKS,
    SCALES,
    ActNorm,
    AffineCoupling,
    ChannelCoupling,
    MaskedCoupling,
    QuadrantCoupling,
    StandardNormal,
    map_flow,
    pixel_flow,
    vector_flow,
)

MULTI_SCALE = ("realnvp", "glow")
TINY = {"coupling_layers": 2, "hidden_channels": 3, "bottleneck_dim": 2, "num_blocks": 1}
SMALL = {"coupling_layers": 5, "hidden_channels": 5, "bottleneck_dim": 2}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 5, 3)])
def test_pixel_flow_inverse_and_log_determinant(mask, native, shape):
    flow = randomise(pixel_flow(shape, mask=mask, native=native, **SMALL))
    x = torch.rand(2, *shape, dtype=torch.float64)
    check_inverse(flow, x, tolerance=1e-7)
    check_log_det(flow, x)


@pytest.mark.parametrize("subnet", ["mlp", "bottleneck"])
@pytest.mark.parametrize("scale", SCALES)
def test_vector_flow_inverse_and_log_determinant(subnet, scale):
    flow = randomise(vector_flow(7, subnet=subnet, scale=scale, **SMALL))
    x = torch.randn(3, 7, dtype=torch.float64)
    check_inverse(flow, x, tolerance=1e-7)
    check_log_det(flow, x)


@pytest.mark.parametrize("mask", MASKS)
def test_additive_flows_keep_volumes(mask):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for flow, values in (
        (map_flow((3, 4, 5), mask=mask, scale="none", **SMALL), x),
        (vector_flow(5, scale="none", **SMALL), x[:, 0, 0]),
    ):
        randomise(flow)
        assert torch.equal(flow(values)[1], torch.zeros(2).double())
        check_inverse(flow, values)
        check_log_det(flow, values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_additive_couplings_leave_scaling_of_pixels_to_other_layers(architecture):
    flow = randomise(pixel_flow((3, 4, 4), architecture=architecture, scale="none", **TINY))
    assert all(m.scale is None for m in flow.modules() if isinstance(m, AffineCoupling))
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    _, logit = flow[0]((x,))
    _, log_det = flow(x)
    torch.testing.assert_close(log_det - logit, (log_det - logit)[:1].expand(2))  # a constant
    check_inverse(flow, x, tolerance=1e-7)
    check_log_det(flow, x)


def test_an_unknown_scale_is_refused_even_without_couplings():
    for build in (lambda: vector_flow(4, coupling_layers=0, scale="exp"), lambda: pixel_flow((1, 4, 4), scale="exp")):
        with pytest.raises(ValueError, match="Unknown scale 'exp'. Known: none, tanh"):
            build()
    with pytest.raises(ValueError, match="Unknown scale 'exp'"):
        map_flow((2, 4, 4), coupling_layers=0, scale="exp")


def test_every_value_is_changed_by_some_layer():
    flow = randomise(vector_flow(7, **SMALL))
    x = torch.randn(1, 7, dtype=torch.float64)
    assert (flow(x)[0] != x).all()


def test_density_on_vectors_integrates_to_one():
    flow = randomise(vector_flow(2, **SMALL), scale=0.5)
    axis = torch.linspace(-12, 12, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    z, log_det = flow(grid)
    total = torch.exp(StandardNormal().log_prob(z) + log_det).sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_density_on_pixels_integrates_to_one_over_the_cube():
    # The whole chain on two pixels, logit included; its tails end at the cube's faces.
    flow = randomise(pixel_flow((1, 1, 2), mask="checkerboard", subnet="mlp", **SMALL), scale=0.5)
    n = 1000
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    grid = torch.cartesian_prod(axis, axis).reshape(-1, 1, 1, 2)
    z, log_det = flow(grid)
    # The logit keeps alpha off both ends, so that latents beyond it are no image: count them, too.
    reached = torch.exp(StandardNormal().log_prob(z) + log_det).mean()
    z = torch.randn(400_000, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, _ = flow(z, rev=True)
    inside = ((x > 0) & (x < 1)).flatten(1).all(1).double().mean()
    assert reached.item() == pytest.approx(inside.item(), abs=3e-3)
    assert inside.item() > 0.5


def test_a_fresh_flow_is_the_logit():
    flow, x = pixel_flow((1, 4, 4), **SMALL), torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(flow(x)[0], torch.logit(LOGIT_ALPHA + (1 - 2 * LOGIT_ALPHA) * x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask": "cylce"}, "Did you mean 'cycle'"),
        ({"mask": "channel", "shape": (1, 5, 4)}, "divisible by 2 to squeeze the image.*choose another mask"),
        ({"coupling_layers": 0}, "coupling_layers must be at least 1"),
        ({"bottleneck_dim": 4}, "bottleneck_dim=4 squeezes nothing"),
        # The zero-masked network sees 16 values, but only the 4 of its quadrant tell it anything.
        ({"bottleneck_dim": 4, "native": False}, "bottleneck_dim=4 squeezes nothing: the network's input has 4"),
        ({"bottleneck_dim": 6, "shape": (1, 5, 6)}, "bottleneck_dim=6 squeezes nothing: the network's input has 6"),
        ({"architecture": "real_nvp"}, "Unknown architecture 'real_nvp'. Did you mean 'realnvp'"),
        ({"scales": 0}, "scales must be at least 1, got 0"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"batch_norm": True}, "Only subnet 'resnet' has batch normalisation: leave batch_norm out"),
        ({"architecture": "glow", "mask": "cycle"}, "'glow' has its own masks: leave mask out, or choose architecture"),
        ({"architecture": "realnvp", "mask": "horizontal"}, "'realnvp' has its own masks"),
        ({"architecture": "glow", "mask": "cylce"}, "Did you mean 'cycle'"),
        ({"architecture": "glow", "subnet": "mlp"}, "'mlp' is fully connected.*choose subnet .*'resnet' or 'highway'"),
        ({"architecture": "realnvp", "subnet": "bottleneck"}, "'bottleneck' is fully connected"),
        ({"architecture": "realnvp", "subnet": "resnets"}, "Did you mean 'resnet'"),
        ({"architecture": "glow", "shape": (1, 6, 8)}, r"scales=2 needs .* divisible by 4.*lower scales.* to 8 x 8"),
        ({"architecture": "realnvp", "shape": (3, 7, 8)}, r"scales=2 needs .* divisible by 2 .*lower scales"),
        ({"architecture": "realnvp", "shape": (3, 12, 28), "scales": 4}, r"divisible by 8 .* to 16 x 32"),
        ({"architecture": "realnvp", "shape": (3, 2, 2)}, "'checkerboard' leaves nothing to change.*at least 2 pixels"),
        ({"architecture": "realnvp", "coupling_layers": 1}, "coupling_layers of at least 2, got 1"),
        ({"architecture": "glow", "coupling_layers": 0}, "coupling_layers must be at least 1"),
        (
            {"architecture": "realnvp", "subnet": "conv_bottleneck", "bottleneck_dim": 8},
            "bottleneck_dim=8 squeezes nothing: the network's input has 8 values",
        ),
    ],
)
def test_configurations_that_make_no_sense_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pixel_flow(**{"shape": (1, 4, 4), **kwargs})


@pytest.mark.parametrize("architecture", MULTI_SCALE)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("subnet", ["resnet", "highway", "conv_bottleneck"])
def test_multi_scale_inverse_and_log_determinant(architecture, channels, native, subnet):
    flow = pixel_flow((channels, 4, 4), architecture=architecture, native=native, subnet=subnet, **TINY)
    randomise(flow).eval()
    x = torch.rand(2, channels, 4, 4, dtype=torch.float64)
    assert flow(x)[0].shape == x.shape
    check_inverse(flow, x, tolerance=1e-7)
    check_log_det(flow, x)


@pytest.mark.parametrize("architecture", MULTI_SCALE)
@pytest.mark.parametrize(("shape", "scales"), [((1, 12, 20), 1), ((3, 8, 12), 2), ((1, 16, 16), 3)])
def test_multi_scale_inverse_in_single_precision(architecture, shape, scales):
    torch.manual_seed(0)
    flow = pixel_flow(shape, architecture=architecture, scales=scales, hidden_channels=8)
    x = 0.02 + 0.96 * torch.rand(4, *shape)
    flow(x)  # starts ActNorm
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    z, log_det = flow(x)
    assert (z - torch.logit(LOGIT_ALPHA + (1 - 2 * LOGIT_ALPHA) * x)).abs().max() > 0.1
    back, log_det_back = flow(z, rev=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("architecture", "mask"), [*((name, None) for name in ARCHITECTURES), *(("single_scale", mask) for mask in MASKS)]
)
def test_latents_have_the_shape_of_the_image(architecture, mask):
    flow = pixel_flow((1, 8, 12), architecture=architecture, mask=mask, **{**TINY, "coupling_layers": 4})
    assert flow.shapes[-1] == flow(torch.rand(2, 1, 8, 12))[0].shape[1:] == (1, 8, 12)


def kinds(flow):
    """Couplings as the papers list them: mask and shape."""
    names = {MaskedCoupling: "checkerboard", ChannelCoupling: "channel", QuadrantCoupling: "cycle"}
    return [(names[type(m)], m.shape) for m in flow.modules() if isinstance(m, AffineCoupling)]


def test_realnvp_is_the_papers():
    flow = pixel_flow((3, 8, 8), architecture="realnvp", scales=3, hidden_channels=4)
    assert kinds(flow) == [
        *[("checkerboard", (3, 8, 8))] * 3,
        *[("channel", (12, 4, 4))] * 3,
        *[("checkerboard", (6, 4, 4))] * 3,
        *[("channel", (24, 2, 2))] * 3,
        *[("checkerboard", (12, 2, 2))] * 4,
    ]
    widths = [m.subnet.skips[0].out_channels for m in flow.modules() if isinstance(m, AffineCoupling)]
    assert widths == [*[4] * 3, *[8] * 6, *[16] * 7]


def test_glow_is_the_papers():
    flow = pixel_flow((1, 8, 8), architecture="glow", hidden_channels=4, coupling_layers=3)
    assert kinds(flow) == [*[("channel", (4, 4, 4))] * 3, *[("channel", (8, 2, 2))] * 3]
    steps = [type(m).__name__ for m in flow.modules() if isinstance(m, AffineCoupling) or "1x1" in type(m).__name__]
    assert steps == ["InvertibleConv1x1", "ChannelCoupling"] * 6
    assert sum(isinstance(m, ActNorm) for m in flow.modules()) == 6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_couplings_are_found_in_the_order_in_which_they_are_applied(architecture):
    flow = pixel_flow((1, 8, 8), architecture=architecture, **{**TINY, "coupling_layers": 3})
    couplings, applied = [m for m in flow.modules() if isinstance(m, AffineCoupling)], []
    for coupling in couplings:
        coupling.register_forward_hook(lambda module, *_: applied.append(module))
    flow(torch.rand(2, 1, 8, 8))
    assert applied == couplings


def test_realnvp_changes_every_value():
    flow = randomise(pixel_flow((3, 8, 8), architecture="realnvp", **TINY))
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert (flow(x)[0] != flow[0]((x,))[0][0]).all()


def test_batch_normalisation_is_exact_in_evaluation():
    flow = pixel_flow((1, 4, 4), architecture="realnvp", batch_norm=True, **TINY)
    randomise(flow)
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    before = [buffer.clone() for buffer in flow.buffers()]
    flow(x)
    assert any(not torch.equal(old, new) for old, new in zip(before, flow.buffers(), strict=True))
    flow.eval()
    check_inverse(flow, x[:2], tolerance=1e-7)
    check_log_det(flow, x[:2])
    torch.testing.assert_close(flow(x)[0][:1], flow(x[:1])[0])


@pytest.mark.parametrize("architecture", MULTI_SCALE)
def test_state_and_pickle_round_trip(architecture):
    kwargs = {"architecture": architecture, **TINY, "subnet": "resnet", "batch_norm": True}
    flow, other = pixel_flow((1, 8, 8), **kwargs), pixel_flow((1, 8, 8), **kwargs)
    flow(torch.rand(4, 1, 8, 8))
    other.load_state_dict(flow.state_dict())
    x = torch.rand(3, 1, 8, 8)
    expected = flow.eval()(x)
    for again in (other.eval(), pickle.loads(pickle.dumps(flow))):
        for value, wanted in zip(again(x), expected, strict=True):
            assert torch.equal(value, wanted)
