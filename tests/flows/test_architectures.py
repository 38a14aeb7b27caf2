# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest
import torch
from flow_helpers import check_inverse, check_log_det, randomise

from anomalib_flowood.flows import MASKS, pixel_flow, standard_normal_log_prob, vector_flow

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
def test_vector_flow_inverse_and_log_determinant(subnet):
    flow = randomise(vector_flow(7, subnet=subnet, **SMALL))
    x = torch.randn(3, 7, dtype=torch.float64)
    check_inverse(flow, x, tolerance=1e-7)
    check_log_det(flow, x)


def test_every_value_is_changed_by_some_layer():
    flow = randomise(vector_flow(7, **SMALL))
    x = torch.randn(1, 7, dtype=torch.float64)
    assert (flow(x)[0] != x).all()


def test_density_on_vectors_integrates_to_one():
    flow = randomise(vector_flow(2, **SMALL), scale=0.5)
    axis = torch.linspace(-12, 12, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    z, log_det = flow(grid)
    total = torch.exp(standard_normal_log_prob(z) + log_det).sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_density_on_pixels_integrates_to_one_over_the_cube():
    # The whole chain on two pixels, logit included; its tails end at the cube's faces.
    flow = randomise(pixel_flow((1, 1, 2), mask="checkerboard", subnet="mlp", **SMALL), scale=0.5)
    n = 1000
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    grid = torch.cartesian_prod(axis, axis).reshape(-1, 1, 1, 2)
    z, log_det = flow(grid)
    # The logit keeps 5 % off both ends, so that latents beyond it are no image: count them, too.
    reached = torch.exp(standard_normal_log_prob(z) + log_det).mean()
    z = torch.randn(400_000, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, _ = flow(z, rev=True)
    inside = ((x > 0) & (x < 1)).flatten(1).all(1).double().mean()
    assert reached.item() == pytest.approx(inside.item(), abs=3e-3)
    assert inside.item() > 0.5


def test_a_fresh_flow_is_the_logit():
    flow, x = pixel_flow((1, 4, 4), **SMALL), torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(flow(x)[0], torch.logit((2 * x - 1) * 0.9 / 2 + 0.5))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask": "cylce"}, "Did you mean 'cycle'"),
        ({"mask": "channel", "shape": (1, 5, 4)}, "even height and width to squeeze"),
        ({"coupling_layers": 0}, "coupling_layers must be at least 1"),
        ({"bottleneck_dim": 4}, "bottleneck_dim=4 squeezes nothing"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pixel_flow(**{"shape": (1, 4, 4), **kwargs})


def test_flows_import_without_anomalib_and_lightning():
    code = (
        "import sys, anomalib_flowood.flows\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in {'anomalib', 'lightning', 'pytorch_lightning'}]\n"
        "sys.exit(f'loaded: {bad[:5]}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
