# SPDX-License-Identifier: Apache-2.0
import math
from functools import partial

import pytest
import torch
from flow_helpers import check_inverse, check_log_det
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from anomalib_flowood.flows import (
    Logit,
    bits_per_dim,
    dequantization_noise,
    dequantize,
    pixel_flow,
)


def logit(x, rev=False, **settings):
    (y,), log_det = Logit([x.shape[1:]], **settings).double()((x,), rev=rev)
    return y, log_det


@given(seed=st.integers(0, 1000), alpha=st.floats(1e-3, 0.499))
def test_logit_inverse_and_log_determinant(seed, alpha):
    x = torch.rand(2, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    check_inverse(partial(logit, alpha=alpha), x)
    check_log_det(partial(logit, alpha=alpha), x)


def test_logit_with_the_literatures_alpha_is_its_formula():
    x = torch.linspace(0, 1, 11, dtype=torch.float64)[None]
    alpha = torch.tensor(0.05).double()  # as a flow keeps it, in single precision
    torch.testing.assert_close(logit(x, alpha=0.05)[0], torch.logit((2 * x - 1) * (1 - 2 * alpha) / 2 + 0.5))
    assert (1 - 2 * alpha).item() == pytest.approx(0.9, abs=1e-8)


@pytest.mark.parametrize("alpha", [0, 0.5, -0.1, math.nan])
def test_an_alpha_that_makes_no_sense_is_refused(alpha):
    with pytest.raises(ValueError, match=r"logit_alpha must be above 0 and below 0\.5"):
        Logit([(1, 2, 2)], alpha=alpha)


def test_alpha_is_loaded_with_the_weights():
    saved, loaded = pixel_flow((1, 4, 4), logit_alpha=0.1, bottleneck_dim=2), pixel_flow((1, 4, 4), bottleneck_dim=2)
    x = torch.rand(2, 1, 4, 4)
    loaded.load_state_dict(saved.state_dict())
    torch.testing.assert_close(loaded(x), saved(x))


@given(level=st.integers(0, 255), noise=st.floats(0, 0.999))
def test_dequantisation_keeps_a_level_inside_of_its_bin(level, noise):
    image = torch.full((1, 1, 1, 1), level / 255, dtype=torch.float64)
    x = dequantize(image, torch.full_like(image, noise)).item()
    assert level / 256 <= x < (level + 1) / 256
    assert dequantize(image).item() == (level + 0.5) / 256


def test_bits_per_dim_of_known_densities():
    # Uniform over the cube: every 8-bit image costs 8 bits a pixel.
    assert bits_per_dim(torch.zeros(3), dims=784).tolist() == [8, 8, 8]
    # A density of 256 per dimension puts all its mass on one level: 0 bits.
    assert bits_per_dim(torch.tensor([784 * math.log(256)]), dims=784).item() == pytest.approx(0, abs=1e-5)
    assert bits_per_dim(torch.tensor([-math.log(2)]), dims=1, levels=1).item() == pytest.approx(1)


@pytest.mark.parametrize("draws", [1, 4])
def test_noise_is_uniform_seeded_and_in_every_part_of_the_bin(draws):
    noise = dequantization_noise((3, 40, 50), draws)
    assert noise.shape == (draws, 3, 40, 50)
    assert noise.min() >= 0
    assert noise.max() <= 1
    assert torch.equal(noise, dequantization_noise((3, 40, 50), draws))
    assert not torch.equal(noise, dequantization_noise((3, 40, 50), draws, seed=1))
    for draw in noise:
        assert kstest(draw.flatten().numpy(), "uniform").pvalue > 0.01
    # At every position the draws fall into different parts of as many.
    assert torch.equal((noise * draws).floor().sort(0).values[:, 0, 0, 0], torch.arange(draws).float())
    assert ((noise * draws).floor().sort(0).values == torch.arange(draws)[:, None, None, None]).float().mean() > 0.9999
    # Neighbours know nothing of each other.
    assert abs(torch.corrcoef(torch.stack([noise[0, 0, :, :-1].flatten(), noise[0, 0, :, 1:].flatten()]))[0, 1]) < 0.1
