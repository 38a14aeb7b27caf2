# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import Case, compile_model, lowered_layers, pixel_flow, randomise_flow

from anomalib_flowood import PixelFlow
from anomalib_flowood.flows import (
    ARCHITECTURES,
    LOGIT_ALPHA,
    MASKS,
    SUBNETS,
    Density,
    QuadrantCoupling,
    StandardNormal,
    dequantization_noise,
)
from anomalib_flowood.models.pixel_flow import PixelFlowModel

SMALL = {"coupling_layers": 4, "hidden_channels": 16, "bottleneck_dim": 3}


@pytest.fixture
def model() -> PixelFlowModel:
    torch.manual_seed(0)
    model = PixelFlowModel((7, 6), 3, **SMALL)
    randomise_flow(model)
    return model.eval()


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 9), place=st.integers(0, 8))
def test_a_score_does_not_depend_on_the_batch(n, place):
    torch.manual_seed(0)
    model = PixelFlowModel((7, 6), 3, **SMALL).eval()
    randomise_flow(model)
    images = torch.rand(n, 3, 7, 6)
    place %= n
    together, alone = model(images).pred_score[place], model(images[place : place + 1]).pred_score[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_evaluation_is_deterministic_and_training_is_noisy(model):
    images = torch.rand(4, 3, 7, 6)
    assert torch.equal(model.log_prob(images), model.log_prob(images))
    assert not torch.equal(model.log_prob(images, noisy=True), model.log_prob(images, noisy=True))


def test_the_score_is_the_density_at_the_centres_of_the_bins(model):
    images = torch.rand(4, 3, 7, 6)
    centres = (torch.round(images * 255) + 0.5) / 256
    log_prob = model.density((centres,)).log_prob
    torch.testing.assert_close(model.log_prob(images), log_prob)
    torch.testing.assert_close(model(images).pred_score, -log_prob / model.dims)


def test_bits_per_dimension_are_a_mean_over_noise_that_is_the_same_for_every_image(model):
    images, few = torch.rand(6, 3, 7, 6), torch.tensor([4, 1])
    bits = model.bits_per_dim(images)
    levels = torch.round(images * 255)
    nats = [-model.density(((levels + noise) / 256,)).log_prob for noise in dequantization_noise((3, 7, 6))]
    assert len(nats) == 4
    torch.testing.assert_close(bits, sum(nats) / 4 / model.dims / math.log(2) + 8)
    torch.testing.assert_close(model.bits_per_dim(images[few]), bits[few])
    assert torch.equal(model.bits_per_dim(images), bits)
    assert not torch.equal(model.bits_per_dim(images, seed=1), bits)
    # As many draws as it takes come to the mean over independent noise, image by image.
    expected = -sum(model.log_prob(images, noisy=True) for _ in range(2000)) / 2000 / model.dims / math.log(2) + 8
    torch.testing.assert_close(model.bits_per_dim(images, draws=64), expected, atol=0.02, rtol=0)


def test_a_flow_may_not_save_bits_by_peaks_at_the_centres_of_the_bins():
    """The density that has all its mass within a tenth of a bin around the centres."""
    model = PixelFlowModel((4, 4), 1, **SMALL)

    def peaks(inputs, flow=None):
        offset = (256 * inputs[0]).frac() - 0.5
        nll = 0.5 * (offset / 0.02).square().flatten(1).sum(1)
        return Density((-nll,), (nll[:, None],), StandardNormal())

    model.density = peaks
    images = torch.rand(3, 1, 4, 4)
    centre = -model.log_prob(images) / model.dims / math.log(2) + 8
    # E[(u - 1/2)²] = 1/12.
    expected = centre + 0.5 / 0.02**2 / 12 / math.log(2)
    torch.testing.assert_close(model.bits_per_dim(images, draws=4096), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("mask", MASKS)
def test_samples_are_images_and_repeatable(mask):
    model = PixelFlowModel((6, 6), 3, mask=mask, **SMALL)
    randomise_flow(model)
    draw = lambda t: model.sample(5, temperature=t, generator=torch.Generator().manual_seed(1))
    images = draw(1.0)
    assert images.shape == (5, 3, 6, 6)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, draw(1.0))
    assert draw(0.1).var(0).mean() < images.var(0).mean()


@pytest.mark.parametrize("alpha", [0.05, 0.25])
def test_the_density_reaches_beyond_black_and_white_and_samples_do_not(alpha):
    model = PixelFlowModel((6, 6), 3, logit_alpha=alpha, **SMALL)
    randomise_flow(model)
    draw = lambda function: function(200, 3.0, torch.Generator().manual_seed(1))
    drawn, samples = draw(model.draw), draw(model.sample)
    assert torch.equal(samples, drawn.clamp(0, 1))
    assert ((drawn < 0) | (drawn > 1)).any()
    low, high = -alpha / (1 - 2 * alpha), (1 - alpha) / (1 - 2 * alpha)
    assert drawn.min() == pytest.approx(low, abs=0.05)
    assert drawn.max() == pytest.approx(high, abs=0.05)


def test_sampling_inverts_the_flow(model):
    z = 0.5 * torch.randn(3, 3, 7, 6)
    x, _ = model.flow(z, rev=True)
    torch.testing.assert_close(model.flow(x)[0], z, rtol=1e-3, atol=1e-3)


CONVOLUTIONAL = {
    "realnvp": {"architecture": "realnvp", "coupling_layers": 2, "hidden_channels": 4, "num_blocks": 1},
    "realnvp with batch norm": {
        "architecture": "realnvp", "coupling_layers": 2, "hidden_channels": 4, "num_blocks": 1, "batch_norm": True,
    },
    "realnvp with a bottleneck": {
        "architecture": "realnvp", "coupling_layers": 2, "hidden_channels": 4, "subnet": "conv_bottleneck",
    },
    "glow": {"architecture": "glow", "coupling_layers": 2, "hidden_channels": 4, "num_blocks": 1},
    "cycle with a convolutional bottleneck": {"subnet": "conv_bottleneck", "coupling_layers": 4, "hidden_channels": 4},
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_training_step_a_likelihood_and_samples_of_every_architecture(name, channels):
    torch.manual_seed(0)
    model = PixelFlowModel((8, 12), channels, **CONVOLUTIONAL[name])
    optimizer = torch.optim.Adam(model.flow.parameters(), lr=1e-3)
    images = torch.rand(6, channels, 8, 12)
    losses = []
    for _ in range(8):
        loss = -model.log_prob(images, noisy=True).mean() / model.dims
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        bits = model.bits_per_dim(images)
        assert torch.isfinite(bits).all()
        torch.testing.assert_close(model.bits_per_dim(images[:1]), bits[:1])
    samples = model.sample(5, generator=torch.Generator().manual_seed(1))
    assert samples.shape == (5, channels, 8, 12)
    assert torch.isfinite(samples).all()
    assert samples.std() > 0


def test_samples_in_training_leave_the_running_statistics_alone():
    model = PixelFlowModel((8, 8), 1, **CONVOLUTIONAL["realnvp with batch norm"])
    randomise_flow(model)
    model.log_prob(torch.rand(6, 1, 8, 8))
    before = [buffer.clone() for buffer in model.flow.buffers()]
    draw = lambda: model.sample(4, generator=torch.Generator().manual_seed(0))
    samples = draw()
    assert model.flow.training
    assert all(torch.equal(old, new) for old, new in zip(before, model.flow.buffers(), strict=True))
    model.eval()
    assert torch.equal(draw(), samples)
    assert not model.flow.training


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_architecture_trains_is_saved_and_exported(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is the extra anomalib-flowood[export]")
    pytest.importorskip("openvino", reason="OpenVINO export is the extra anomalib-flowood[export]")
    case = Case(tmp_path, pixel_flow(max_epochs=1, **CONVOLUTIONAL[name]))
    images = torch.rand(5, 3, 20, 17)
    with torch.no_grad():
        scores = case.detector(images).pred_score

        torch.load(case.checkpoint, weights_only=True)
        again = PixelFlow.load_from_checkpoint(case.checkpoint)
        assert torch.equal(again.eval()(images).pred_score, scores)

        exported = torch.load(case.export("torch"), weights_only=False)["model"]
        assert torch.equal(exported(images).pred_score, scores)

    session = onnxruntime.InferenceSession(str(case.export("onnx")))
    (score,) = session.run(["pred_score"], {"input": images.numpy()})
    np.testing.assert_allclose(score, scores, rtol=1e-4)
    assert not lowered_layers(compile_model(case.export("openvino"), "bf16"))


def test_grey_images_come_as_one_channel_or_as_three():
    model = PixelFlowModel((6, 6), 1, **SMALL)
    randomise_flow(model)
    grey = torch.randint(0, 256, (4, 1, 6, 6)) / 255
    torch.testing.assert_close(model.log_prob(grey), model.log_prob(grey.expand(-1, 3, -1, -1)))


def test_runs_in_float64(model):
    images = torch.rand(2, 3, 7, 6, dtype=torch.float64)
    exact = model.double().log_prob(images)
    torch.testing.assert_close(model.float().log_prob(images.float()).double(), exact, rtol=1e-4, atol=1e-2)


def test_constant_images_have_a_finite_score(model):
    for value in (0.0, 0.5, 1.0):
        assert torch.isfinite(model(torch.full((1, 3, 7, 6), value)).pred_score).all()


def test_an_overflow_is_the_most_anomalous_score(model):
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.mul_(1e30)
    images = torch.rand(2, 3, 7, 6)
    assert model.density(model.inputs(images)).log_prob.isnan().all()
    assert model(images).pred_score.tolist() == [math.inf, math.inf]
    assert model.log_prob(images).tolist() == [-math.inf, -math.inf]
    assert model.bits_per_dim(images).tolist() == [math.inf, math.inf]
    images[1, 0, 0, 0] = math.nan  # what is broken is no overflow
    for function in (model, model.log_prob, model.bits_per_dim):
        with pytest.raises(ValueError, match=r"Images \[1\] of this batch have NaN"):
            function(images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((3, 3, 7, 6), float("nan")), r"Images \[0, 1, 2\] of this batch have NaN or infinite pixels"),
        (torch.full((1, 3, 7, 6), 2.0), r"must lie in \[0, 1\], got values from 2 to 2"),
        (torch.zeros(1, 3, 8, 8), r"Expected images of shape \(N, 3, 7, 6\), got \(1, 3, 8, 8\)"),
        (torch.zeros(1, 1, 7, 6), r"Expected images of shape \(N, 3, 7, 6\)"),
    ],
)
def test_images_that_cannot_be_scored(model, images, message):
    with pytest.raises(ValueError, match=message):
        model(images)


def test_one_nan_pixel_is_found(model):
    images = torch.rand(5, 3, 7, 6)
    images[3, 1, 2, 2] = float("nan")
    with pytest.raises(ValueError, match=r"Images \[3\] of this batch"):
        model.log_prob(images)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask": "cicle"}, "Unknown mask 'cicle'. Did you mean 'cycle'"),
        ({"subnet": "resnets"}, "Unknown subnet 'resnets'. Did you mean 'resnet'"),
        ({"channels": 4}, "channels must be 1"),
        ({"bottleneck_dim": 5000}, "squeezes nothing"),
        ({"mask": "channel", "channels": 1, "image_size": (27, 27)}, "divisible by 2 to squeeze the image"),
        ({"architecture": "glow", "image_size": (30, 32)}, "divisible by 4 to squeeze the image"),
        ({"architecture": "glow", "mask": "cycle"}, "'glow' has its own masks"),
        ({"architecture": "realnvp", "subnet": "bottleneck"}, "'bottleneck' is fully connected"),
        ({"architecture": "realnvp", "scales": 0}, "scales must be at least 1"),
        ({"subnet": "mlp", "batch_norm": True}, "Only subnet 'resnet' has batch normalisation"),
        ({"subnet": "highway", "num_blocks": 0}, "num_blocks must be at least 1"),
        ({"logit_alpha": 0.5}, "logit_alpha must be above 0 and below 0.5, got 0.5"),
    ],
)
def test_bad_configurations_are_refused_when_the_model_is_built(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PixelFlow(**kwargs)


def test_defaults():
    detector = PixelFlow()
    assert detector.model.shape == (3, 32, 32)
    logit, *couplings = detector.model.flow
    assert logit.alpha == LOGIT_ALPHA
    assert [type(coupling) for coupling in couplings] == [QuadrantCoupling] * 8
    assert couplings[0].subnet.layers[0].out_features == 256
    assert couplings[0].subnet.layers[2].out_features == 5
    assert detector.visualizer is None
    assert detector(torch.rand(2, 3, 40, 50)).pred_score.shape == (2,)


def test_help_lists_what_is_registered():
    text = PixelFlow.__doc__
    assert "{" not in text
    for name in (*MASKS, *SUBNETS, *ARCHITECTURES):
        assert f"``{name}``" in text
    assert "``channel`` or ``cycle``" in text  # native forms
