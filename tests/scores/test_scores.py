# SPDX-License-Identifier: Apache-2.0
"""Scores where the answer is known: Gaussians, a uniform density, constant images, white noise."""

import copy
import math
import re

import imagecodecs
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from model_helpers import embedding_flow, feature_map_flow, pixel_flow, randomise_flow
from sklearn.exceptions import NotFittedError
from sklearn.neighbors import KernelDensity
from torch import nn
from torch.distributions import MultivariateNormal

from anomalib_flowood import flows
from anomalib_flowood.flows import Density, StandardNormal, StudentT, bits_per_dim, dequantize
from anomalib_flowood.models.embedding_flow import EmbeddingFlowModel
from anomalib_flowood.models.pixel_flow import PixelFlowModel
from anomalib_flowood.scores import (
    SCORES,
    Complexity,
    DensityOfStates,
    Ensemble,
    LatentNorm,
    LikelihoodRatio,
    LocalIntrinsicDimension,
    NegativeLogLikelihood,
    Orientation,
    Typicality,
    compressed_bits,
    perturb,
)
from anomalib_flowood.scores.complexity import pixels_of, robust_bits_per_dim
from anomalib_flowood.scores.intrinsic_dimension import local_intrinsic_dimension
from anomalib_flowood.scores.orientation import symmetries, ways_up

FITTED = [name for name, score in SCORES.items() if score.fit_images]


class LinearFlow(nn.Module):
    """z = W (x - m), so that x is Gaussian with covariance (W^T W)^-1."""

    def __init__(self, weight, mean):
        super().__init__()
        self.weight, self.mean = nn.Parameter(weight), nn.Parameter(mean)
        self.requires_grad_(False)

    def forward(self, x, rev=False):
        assert not rev
        z = (x.flatten(1) - self.mean) @ self.weight.T
        return z, torch.linalg.slogdet(self.weight)[1].expand(len(x))


class Gaussian:
    """A known Gaussian of images, (N, 1, 1, D) in float64."""

    reads_pixels = True
    parts = 2

    def __init__(self, dims=6, weight=None, mean=None):
        self.dims = dims
        weight = torch.randn(dims, dims, dtype=torch.float64) if weight is None else weight
        self.flow = LinearFlow(weight, torch.randn(dims, dtype=torch.float64) if mean is None else mean)

    def new_flow(self):
        return Gaussian(self.dims).flow

    def density(self, inputs, flow=None):
        return flows.density(flow or self.flow, StandardNormal(), inputs[0])

    @property
    def distribution(self):
        return distribution(self.flow)


def distribution(flow):
    return MultivariateNormal(flow.mean.detach(), precision_matrix=(flow.weight.T @ flow.weight).detach())


def images_of(vectors):
    return (vectors.reshape(len(vectors), 1, 1, -1),)


class Uniform(Gaussian):
    """The uniform density on the unit cube: 8 bits for each 8-bit number."""

    def density(self, inputs, flow=None):
        zeros = inputs[0].new_zeros(len(inputs[0]))
        return Density((zeros, zeros), (zeros[:, None],), StandardNormal())


class Table(Gaussian):
    """A density whose parts are the inputs."""

    reads_pixels = False
    dims = 1

    def __init__(self, parts):
        self.parts = parts

    def density(self, inputs, flow=None):
        return Density((-inputs[0]).unbind(1), inputs, StandardNormal())


def fitted(score, density, *batches):
    score = score(density).double()
    score.fit(density, batches)
    return score


# -- one evaluation ----------------------------------------------------------------------------------------------


def test_nll_is_that_of_the_gaussian_per_dimension():
    density = Gaussian()
    x = torch.randn(9, 6, dtype=torch.float64)
    score = NegativeLogLikelihood(density)(density, images_of(x))
    torch.testing.assert_close(score, -density.distribution.log_prob(x) / 6)


@pytest.mark.parametrize("build", [pixel_flow, embedding_flow, feature_map_flow])
def test_the_parts_of_a_models_density_sum_to_the_negative_log_likelihood(build):
    model = build().model.eval()
    randomise_flow(model)
    size = (12, 12) if model.reads_pixels else tuple(build().hparams["image_size"])
    with torch.no_grad():
        density = model.density(model.inputs(torch.rand(3, 3, *size)))
    assert density.parts.shape == (3, model.parts)
    torch.testing.assert_close(density.parts.sum(1), -density.log_prob)


def test_typicality_is_two_sided():
    density = Gaussian(200, torch.eye(200, dtype=torch.float64), torch.zeros(200, dtype=torch.float64))
    x = torch.randn(5000, 200, dtype=torch.float64)
    score = fitted(Typicality, density, images_of(x[:2000]), images_of(x[2000:]))
    nll = -density.distribution.log_prob(x) / 200
    torch.testing.assert_close(score.mean, nll.mean())
    # -log p is x^2 / 2 and a constant: images that are so much more, or less, likely than the mean.
    mean_square = x.square().sum(1).mean()
    direction = torch.full((200,), 200**-0.5, dtype=torch.float64)
    square = torch.stack([mean_square, mean_square - 12, mean_square + 12])
    scores = score(density, images_of(square.sqrt()[:, None] * direction))
    torch.testing.assert_close(scores, torch.tensor([0, 12, 12], dtype=torch.float64) / 2 / 200)
    # The likeliest image of all is more anomalous than any of the training images.
    assert score(density, images_of(direction[None] * 0)) > score(density, images_of(x)).max()


@pytest.mark.parametrize("dims", [3, 50, 800])
def test_the_latent_shell_has_a_radius_of_the_square_root_of_the_dimension(dims):
    density = Gaussian(dims, torch.eye(dims, dtype=torch.float64), torch.zeros(dims, dtype=torch.float64))
    x = torch.randn(2000, dims, dtype=torch.float64)
    score = fitted(LatentNorm, density, images_of(x))
    # The mean of the chi distribution, which is sqrt(d) but for 1 / (4 sqrt(d)); its deviation is below sqrt(1/2).
    expected = math.sqrt(2) * math.exp(math.lgamma((dims + 1) / 2) - math.lgamma(dims / 2))
    assert float(score.mean) == pytest.approx(expected, abs=5 * math.sqrt(0.5 / 2000))
    assert expected == pytest.approx(math.sqrt(dims), abs=0.3 / math.sqrt(dims))
    origin, typical, far = score(density, images_of(torch.stack([0 * x[0], x[0] / x[0].norm() * expected, 2 * x[0]])))
    assert origin == pytest.approx(float(score.mean))  # the likeliest point is not on the shell
    assert typical < 0.1 < min(origin, far)


def small_embedding_model(score):
    kwargs = {"pre_trained": False, "image_size": (32, 32), "subspace_dim": 6, "hidden_channels": 8}
    kwargs |= {"modes": 3, "coupling_layers": 6}
    model = EmbeddingFlowModel("test_efficientnet", layers=[], score=score, **kwargs).double().eval()
    model.base.centres.copy_(5 * torch.randn(3, 6).repeat(8, 1))
    randomise_flow(model)
    return model


def test_latent_norm_takes_the_nearest_mean_of_a_mixture():
    model = small_embedding_model("latent_norm")
    inputs = (5 * torch.randn(20, 6, dtype=torch.float64), torch.zeros(20, dtype=torch.float64))
    with torch.no_grad():
        distances = torch.cdist(model.flow(inputs[0])[0], model.base.centres)
        assert len(distances.argmin(1).unique()) == 3
        model.scorer.fit(model, [inputs])
        nearest = distances.min(1).values
        torch.testing.assert_close(model.scorer(model, inputs), (nearest - nearest.mean()).abs())


# -- compression -------------------------------------------------------------------------------------------------


def shortest(image):
    """The bits of the shorter of the two files, each of which must give the image back."""
    array = np.array(image.movedim(0, -1).squeeze(-1).numpy(), order="C")
    files = imagecodecs.png_encode(array, level=9), imagecodecs.jpegxl_encode(array, lossless=True)
    assert np.array_equal(imagecodecs.png_decode(files[0]), array)
    assert np.array_equal(imagecodecs.jpegxl_decode(files[1]), array)
    return 8 * min(len(file) for file in files)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 5, 9), (1, 1, 7), (3, 7, 1), (3, 1, 1)])
def test_compressed_bits_are_those_of_the_shorter_file_in_the_order_of_the_images(shape):
    # From smooth to noisy, so that no two are alike and threads end out of order.
    ramp = torch.linspace(20, 200, math.prod(shape)).reshape(shape)
    images = torch.stack([(ramp + 3 * k * torch.randn(shape)).clamp(0, 255).byte() for k in range(12)])
    expected = [shortest(image) for image in images]
    assert compressed_bits(images).tolist() == expected
    assert compressed_bits(images.flip(0)).tolist() == expected[::-1]


def test_both_compressors_win_somewhere():
    # Few colours in runs suit JPEG-XL, and its header is the longer one.
    texture = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    noise, smooth = (np.ascontiguousarray(image.movedim(0, -1).numpy()) for image in (texture, ramp))
    lengths = lambda array: (
        len(imagecodecs.png_encode(array, level=9)),
        len(imagecodecs.jpegxl_encode(array, lossless=True)),
    )
    assert lengths(noise)[0] < lengths(noise)[1]
    assert lengths(smooth)[0] > lengths(smooth)[1]
    assert compressed_bits(torch.stack([texture, ramp])).tolist() == [8 * min(lengths(a)) for a in (noise, smooth)]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_constant_image_costs_next_to_nothing_and_white_noise_eight_bits_a_number(channels):
    constant = torch.full((2, channels, 64, 64), 7, dtype=torch.uint8)
    numbers = channels * 64 * 64
    assert (compressed_bits(constant) < 0.1 * numbers).all()
    noise = torch.randint(0, 256, (4, channels, 64, 64), dtype=torch.uint8)
    bits = compressed_bits(noise)
    # Less than one in 2^63 images has a file that is shorter by 64 bits: there are not more such files.
    assert (bits > 8 * numbers - 64).all()
    assert (bits < 8.5 * numbers).all()


def test_no_images_have_no_bits():
    assert compressed_bits(torch.zeros(0, 3, 8, 8, dtype=torch.uint8)).shape == (0,)


PIXELS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=4, max_dims=4, max_side=4))


# Noise of more than 16 bits may round up to the next level in float32.
@settings(deadline=None)
@given(pixels=PIXELS, noise=st.none() | st.floats(0, 1 - 2**-16, width=32))
def test_the_pixels_are_those_that_were_dequantised(pixels, noise):
    images = torch.from_numpy(pixels)
    as_floats = images / 255
    x = dequantize(as_floats, None if noise is None else torch.full_like(as_floats, noise))
    assert torch.equal(pixels_of((x,)), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_complexity_compares_the_flows_robust_bits_with_the_compressors(channels):
    density = Gaussian(16 * channels)
    images = torch.randint(0, 256, (5, channels, 4, 4), dtype=torch.uint8)
    x = dequantize(images / 255).double()
    z, log_det = density.flow(x)
    nats = -scipy.stats.t(100).logpdf(z).sum(1) - log_det.numpy()
    compressed = compressed_bits(images).double() / density.dims
    beyond = torch.from_numpy(nats) / math.log(2) / density.dims + 8 - compressed
    found = Complexity(density).statistics(density, (x,))
    # PyTorch's distribution has its constant in single precision.
    torch.testing.assert_close(found, torch.stack([beyond, compressed], 1), rtol=1e-5, atol=1e-5)


def smooth_images(count, channels, size=16):
    """Ramps with a little noise, of which a compressor makes a third."""
    slopes = 0.2 + 0.6 * torch.rand(count, channels, 1, 1)
    ramps = slopes * torch.linspace(0, 1, size).expand(count, channels, size, size)
    return dequantize(ramps + 0.01 * torch.rand(ramps.shape)).double()


NOISES = {
    "uniform": torch.rand_like,
    "normal": lambda x: (0.5 + 0.15 * torch.randn_like(x)).clamp(0, 1),
    "added": lambda x: (x + 0.2 * torch.randn_like(x)).clamp(0, 1),
}


@pytest.mark.parametrize("score", [Complexity, Orientation])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_not_normal_however_many_bits_the_compressor_takes(noise, channels, score):
    training = smooth_images(100, channels)
    dims = training[0].numel()
    # So wide that all images are about as likely: a flow that gives them all more bits than a compressor does.
    density = Gaussian(dims, torch.eye(dims, dtype=torch.float64), torch.zeros(dims, dtype=torch.float64))
    x = dequantize(NOISES[noise](smooth_images(20, channels)))
    beyond = [Complexity(density).statistics(density, (images,))[:, 0] for images in (training, x)]
    assert beyond[1].max() < beyond[0].min()  # by the difference alone noise is the most normal of all
    score = fitted(score, density, (training,))
    assert score(density, (x,)).min() > score(density, (training,)).max()


@given(
    rows=hnp.arrays(np.float64, (4, 3), elements=st.floats(-20, 20)),
    more=hnp.arrays(np.float64, (4, 3), elements=st.floats(0, 20)),
)
def test_more_evidence_never_makes_an_image_less_anomalous(rows, more):
    score = Orientation(Gaussian()).double()
    score.fit_statistics(torch.linspace(-3, 3, 100, dtype=torch.float64)[:, None] ** 3 + torch.arange(3.0))
    rows, more = torch.from_numpy(rows), torch.from_numpy(more)
    assert (score.combine(rows + more) >= score.combine(rows)).all()
    assert torch.equal(score.combine(rows), torch.stack([score.combine(row[None]) for row in rows])[:, 0])


def test_a_test_that_finds_nothing_changes_nothing():
    rows = torch.randn(1000, 2, dtype=torch.float64)
    score = Complexity(Gaussian()).double()
    score.fit_statistics(rows)
    difference = torch.linspace(1.7, 9, 50, dtype=torch.float64)  # beyond the 95 % quantile
    usual = torch.stack([difference, torch.zeros(50)], 1)
    first = (difference - score.threshold[0]) / score.scale[0] - math.log(0.05)
    torch.testing.assert_close(score.combine(usual), first)


def test_a_fit_of_an_earlier_version_with_fewer_tests_is_left_behind():
    model = random_pixel_model("orientation")
    model.scorer.fit(model, [model.inputs(torch.rand(20, 1, 5, 4))])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("threshold", "scale"):
        before[f"scorer.{name}"] = before[f"scorer.{name}"][:2]
    again = random_pixel_model("orientation")
    again.load_state_dict(before)
    assert not again.scorer.ready
    assert again.scorer.threshold.shape == (3,)


# -- several flows -----------------------------------------------------------------------------------------------


def test_no_pixel_is_replaced_at_rate_zero_and_each_at_rate_one():
    x = torch.full((20, 3, 16, 16), 0.25)
    assert torch.equal(perturb(x, 0), x)
    noise = perturb(x, 1).flatten().sort().values
    # Kolmogorov's distance from the uniform distribution; 2.5 / sqrt(n) is exceeded once in 100,000 times.
    n = len(noise)
    assert float((noise - torch.linspace(0, 1, n)).abs().max()) < 2.5 / math.sqrt(n)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_so_many_pixels_are_replaced_with_all_their_channels(rate):
    x = torch.full((20, 3, 16, 16), 0.25)
    changed = perturb(x, rate) != x
    assert torch.equal(changed.any(1), changed.all(1))
    pixels = changed[:, 0]
    share = float(pixels.float().mean())
    assert share == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / pixels.numel()))
    assert len(pixels.flatten(1).unique(dim=0)) == 20  # other places in each image


def test_the_likelihood_ratio_of_equal_flows_is_zero():
    density = Gaussian()
    score = LikelihoodRatio(density)
    x = images_of(torch.randn(5, 6, dtype=torch.float64))
    assert (score(density, x) != 0).all()  # another flow, at first
    score.background.load_state_dict(density.flow.state_dict())
    assert (score(density, x) == 0).all()


def test_the_likelihood_ratio_is_higher_for_what_the_background_likes_better():
    density = Gaussian(4, torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    score = LikelihoodRatio(density)
    background = Gaussian(4, torch.eye(4, dtype=torch.float64), -torch.ones(4, dtype=torch.float64))
    score.background.load_state_dict(background.flow.state_dict())
    x = torch.stack([-torch.ones(4), torch.zeros(4), torch.ones(4)]).double()
    scores = score(density, images_of(x))
    expected = (background.distribution.log_prob(x) - density.distribution.log_prob(x)) / 4
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(scores, torch.tensor([2.0, 0, -2], dtype=torch.float64))


@pytest.mark.parametrize("score", [LikelihoodRatio, Ensemble])
def test_the_training_loss_trains_the_scores_flows_alone(score):
    density = Gaussian()
    score = score(density)
    for flow in (density.flow, *score.flows):
        flow.requires_grad_(True)
    loss = score.training_loss(density, images_of(torch.rand(50, 6, dtype=torch.float64)))
    loss.backward()
    assert all(parameter.grad is None for parameter in density.flow.parameters())
    assert all(float(parameter.grad.norm()) > 0 for flow in score.flows for parameter in flow.parameters())
    trained = {id(parameter) for flow in score.flows for parameter in flow.parameters()}
    assert trained == {id(parameter) for parameter in score.parameters()}


def test_the_background_sees_perturbed_images(monkeypatch):
    density = Gaussian()
    score = LikelihoodRatio(density)
    x = torch.rand(400, 6, dtype=torch.float64)
    monkeypatch.setattr(LikelihoodRatio, "rate", 0.0)
    expected = -distribution(score.background).log_prob(x).mean() / 6
    torch.testing.assert_close(score.training_loss(density, images_of(x)).detach(), expected)
    monkeypatch.setattr(LikelihoodRatio, "rate", 0.5)
    assert float(score.training_loss(density, images_of(x))) != pytest.approx(float(expected), rel=1e-3)


def test_the_ensembles_loss_is_the_sum_over_its_members():
    density = Gaussian()
    score = Ensemble(density)
    x = torch.rand(50, 6, dtype=torch.float64)
    expected = sum(-distribution(flow).log_prob(x).mean() / 6 for flow in score.members)
    torch.testing.assert_close(score.training_loss(density, images_of(x)).detach(), expected)


def test_an_ensemble_of_equal_flows_gives_the_likelihood():
    density = Gaussian()
    score = Ensemble(density)
    for member in score.members:
        member.load_state_dict(density.flow.state_dict())
    x = images_of(torch.randn(5, 6, dtype=torch.float64))
    torch.testing.assert_close(score(density, x), NegativeLogLikelihood(density)(density, x))


def test_the_ensemble_is_waic_over_five_flows():
    density = Gaussian()
    score = Ensemble(density)
    x = torch.randn(7, 6, dtype=torch.float64)
    log_probs = np.stack([distribution(flow).log_prob(x).numpy() for flow in (density.flow, *score.members)])
    assert len(log_probs) == 5
    expected = -(log_probs.mean(0) - log_probs.var(0)) / 6
    np.testing.assert_allclose(score(density, images_of(x)).detach(), expected)


def test_disagreement_is_anomalous():
    # Four flows, in pairs on either side of the detector's, have the same mean log p at the centre as at x.
    density = Gaussian(2, torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    score = Ensemble(density)
    for member, shift in zip(score.members, (-1, -1, 1, 1), strict=True):
        other = Gaussian(2, torch.eye(2, dtype=torch.float64), torch.tensor([shift, 0.0], dtype=torch.float64))
        member.load_state_dict(other.flow.state_dict())
    x = torch.tensor([[0.0, 3.0], [3.0, 0.0]], dtype=torch.float64)
    log_probs = torch.stack([distribution(flow).log_prob(x) for flow in (density.flow, *score.members)])
    assert log_probs.mean(0)[0] == pytest.approx(float(log_probs.mean(0)[1]))
    agreed, disputed = score(density, images_of(x))
    variances = log_probs.var(0, correction=0)
    torch.testing.assert_close(disputed - agreed, (variances[1] - variances[0]) / 2)
    assert disputed > agreed + 1


# -- orientation -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(pixels=PIXELS)
def test_symmetries_are_the_group_of_the_rectangle(pixels):
    x = torch.from_numpy(pixels).double()
    copies = symmetries(x)
    square = x.shape[2] == x.shape[3]
    assert copies.shape == (8 if square else 4, *x.shape)
    assert torch.equal(copies[0], x)
    as_set = lambda images: {tuple(copy.flatten().tolist()) for copy in images}
    wanted = {(x.rot90(turn, (2, 3)), x.rot90(turn, (2, 3)).flip(2)) for turn in (range(4) if square else (0, 2))}
    assert as_set(copies) == as_set(image for pair in wanted for image in pair)
    for one in copies:  # turned or mirrored, an image has the same copies
        assert as_set(symmetries(one)) == as_set(copies)


def test_an_image_without_symmetry_has_eight_different_copies():
    assert len(symmetries(torch.arange(9.0).reshape(1, 1, 3, 3)).unique(dim=0)) == 8
    assert len(symmetries(torch.arange(6.0).reshape(1, 1, 2, 3)).unique(dim=0)) == 4


def test_robust_bits_are_those_of_students_base():
    model = random_pixel_model().double()
    (x,) = model.inputs(torch.rand(6, 1, 5, 4, dtype=torch.float64))
    with torch.no_grad():
        z, log_det = model.flow(x)
        bits = robust_bits_per_dim(model, x, StudentT(10.0))
    log_prob = scipy.stats.t(10).logpdf(z.numpy()).reshape(6, -1).sum(1) + log_det.numpy()
    np.testing.assert_allclose(bits, 8 - log_prob / 20 / math.log(2))


def test_one_latent_far_out_weighs_less():
    density = Gaussian(6, torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
    x = torch.zeros(2, 6, dtype=torch.float64)
    x[1, 3] = 30
    (x,) = images_of(x)
    plain, robust = NegativeLogLikelihood(density)(density, (x,)), robust_bits_per_dim(density, x, StudentT(10.0))
    assert plain[1] - plain[0] == pytest.approx(30**2 / 2 / 6)
    assert robust[1] - robust[0] == pytest.approx(5.5 * math.log1p(30**2 / 10) / 6 / math.log(2))


def one_way_up(image, width=0.1):
    """A density of images near this one."""
    dims = image.numel()
    return Gaussian(dims, torch.eye(dims, dtype=torch.float64) / width, image.flatten().double())


def test_an_image_the_right_way_up_is_likelier_than_its_copies_by_what_turning_it_back_gains():
    image = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    density = one_way_up(image)
    images = symmetries(image)[:, 0]
    bits = robust_bits_per_dim(density, images, StudentT(10.0))
    itself, orientation = ways_up(density, images)
    assert torch.equal(itself, bits)
    assert bits.argmin() == 0
    assert orientation[0] == pytest.approx(float(bits[0] - bits[1:].min()))
    torch.testing.assert_close(orientation[1:], bits[1:] - bits[0])


def test_an_image_that_looks_the_same_whichever_way_up_says_nothing_of_it():
    image = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    same = symmetries(image).mean(0)
    orientation = ways_up(one_way_up(image), same)[1]
    torch.testing.assert_close(orientation, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-9)


def test_each_test_alone_makes_an_image_anomalous():
    image = torch.linspace(0.2, 0.8, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    density = one_way_up(image, 0.02)
    training = image + 0.02 * torch.randn(500, 1, 4, 4, dtype=torch.float64)
    score = fitted(Orientation, density, (training,))
    usual = score(density, (training,))
    turned = score(density, (training.rot90(1, (2, 3)),))
    assert turned.min() > usual.max()
    # Four standard deviations off in every pixel: unlikely, but more so any other way up.
    off = image + 0.08 * (torch.arange(16).reshape(1, 1, 4, 4) % 2 * 2 - 1)
    assert ways_up(density, off)[1] < 0
    assert score(density, (off,)) > usual.max()


def test_the_statistics_are_the_bits_beyond_a_compressor_the_way_up_and_the_compressors():
    model = random_pixel_model("orientation").double()
    inputs = model.inputs(torch.rand(6, 1, 5, 4, dtype=torch.float64))
    with torch.no_grad():
        bits, wrong_way = ways_up(model, inputs[0])
        rows = model.scorer.statistics(model, inputs)
    compressed = compressed_bits(pixels_of(inputs)) / 20
    torch.testing.assert_close(rows, torch.stack([bits - compressed, wrong_way, compressed.double()], 1))


def test_the_score_is_minus_the_log_of_the_smallest_weighted_p_value():
    rows = -torch.log(torch.rand(200_000, 3, dtype=torch.float64))  # exponential: -log p is the value itself
    rows[:, 1] = 3 + 2 * rows[:, 1]
    score = Orientation(Gaussian()).double()
    score.fit_statistics(rows)
    values = [[4.0, 3.0, 0.0], [0.0, 3 + 2 * 6.0, 8.0], [7.0, 3 + 2 * 5.0, 1.0], [3.0, 3.0, 11.0]]
    expected = torch.tensor([4.0, 6.0, 7.0, 11 + math.log(0.1)]).double()  # the third test has a tenth of the weight
    torch.testing.assert_close(score.combine(torch.tensor(values).double()), expected, rtol=0.05, atol=0)


def test_training_images_that_are_all_alike_have_a_tail():
    density = one_way_up(torch.rand(1, 1, 4, 4))
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    score = fitted(Orientation, density, (x.expand(5, 1, 4, 4),))
    same, other = score(density, (x,)), score(density, (1 - x,))
    assert torch.isfinite(torch.stack([same, other])).all()
    assert same != other


class OverflowAt(nn.Module):
    """Overflows where the first pixel is bright."""

    def forward(self, x):
        z = x.flatten(1)
        return torch.where(z[:, :1] > 0.9, torch.inf, z), torch.zeros(len(x), dtype=x.dtype)


def test_an_overflow_of_a_copy_is_a_copy_that_is_unlikely_and_an_image_of_its_own_is_anomalous():
    density = Gaussian(12)
    density.flow = OverflowAt()
    x = torch.full((3, 1, 4, 3), 0.5, dtype=torch.float64)
    x[0, 0, 3, 2] = 1.0  # at the end, and first once turned
    x[1, 0, ::3, ::2] = torch.tensor([[0.5, 1.0], [1.0, 1.0]])  # first in every copy
    x[2, 0, 0, 0] = 1.0
    bits, orientation = ways_up(density, x)
    assert torch.isfinite(torch.stack([bits[:2], orientation[:2]])).all()
    assert orientation[1] < -50  # nothing is likelier than what has no copy
    assert torch.isnan(torch.stack([bits[2], orientation[2]])).all()


def test_an_overflow_to_nan_is_the_most_anomalous_and_ends_no_test():
    density = Gaussian(12)
    density.flow = OverflowAt()
    x = torch.full((2, 1, 4, 3), 0.5, dtype=torch.float64)
    x[1, 0, 0, 0] = torch.nan
    bits = robust_bits_per_dim(density, x, StudentT(10.0))
    assert torch.isfinite(bits[0])
    assert bits[1] == torch.inf


# -- local intrinsic dimension -----------------------------------------------------------------------------------


def lidl(flow, x, scale):
    """D + d log p / d log(scale), where p is the flow's Gaussian with noise; by automatic differentiation."""
    covariance = torch.linalg.inv((flow.weight.T @ flow.weight).detach())
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64, requires_grad=True)
    noisy = covariance + (2 * log_scale).exp() * torch.eye(len(covariance), dtype=torch.float64)
    log_prob = MultivariateNormal(flow.mean.detach(), noisy).log_prob(x)
    return x.shape[1] + torch.stack([torch.autograd.grad(p, log_scale, retain_graph=True)[0] for p in log_prob])


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0])
def test_the_dimension_is_the_derivative_of_a_gaussian_with_noise(scale):
    flow = Gaussian(7).flow
    x = torch.randn(6, 7, dtype=torch.float64)
    dimension = local_intrinsic_dimension(flow, images_of(x)[0], scale)
    torch.testing.assert_close(dimension, lidl(flow, x, scale), rtol=1e-6, atol=1e-6)


def test_all_directions_are_wider_than_little_noise_and_none_than_much():
    flow = Gaussian(7).flow
    x = images_of(distribution(flow).sample((5,)))[0]
    everything, nothing = torch.full((5,), 7.0, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(local_intrinsic_dimension(flow, x, 1e-5), everything, rtol=0, atol=1e-4)
    torch.testing.assert_close(local_intrinsic_dimension(flow, x, 1e5), nothing, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wide", [0, 2, 5, 8])
def test_a_gaussian_that_is_thin_in_all_but_some_directions_has_those_dimensions(wide):
    widths = torch.full((8,), 1e-3, dtype=torch.float64)
    widths[:wide] = 100
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    flow = Gaussian(8, turn / widths[:, None], torch.zeros(8, dtype=torch.float64)).flow
    x = (torch.randn(5, 8, dtype=torch.float64) * widths) @ turn
    dimension = local_intrinsic_dimension(flow, images_of(x)[0], 0.1)
    # Each direction is off by the squared ratio of width and noise, or its inverse, times 1 + z^2.
    torch.testing.assert_close(dimension, torch.full((5,), float(wide)).double(), rtol=0, atol=8 * 1e-4 * 30)


def random_pixel_model(score="nll", **kwargs):
    sizes = {"coupling_layers": 4, "hidden_channels": 16, "bottleneck_dim": 3}
    model = PixelFlowModel((5, 4), 1, score=score, **{**sizes, **kwargs})
    randomise_flow(model, scale=0.3)
    return model.eval()


@pytest.mark.parametrize("scale", [0.02, 0.1, 0.5])
def test_the_dimension_of_a_pixel_flow_is_that_of_its_generators_singular_values(scale):
    model = random_pixel_model().double()
    (x,) = model.inputs(torch.rand(6, 1, 5, 4, dtype=torch.float64))
    expected = []
    for point in x:
        z = model.flow(point[None])[0].detach()
        generate = lambda latent: model.flow(latent, rev=True)[0].flatten()
        jacobian = torch.autograd.functional.jacobian(generate, z).reshape(20, 20)
        _, widths, right = torch.linalg.svd(jacobian)
        w, s2, d2 = right @ z.flatten(), widths**2, scale**2
        expected.append((s2 / (s2 + d2)).sum() + (d2 * s2 * w**2 / (s2 + d2) ** 2).sum())
    dimension = local_intrinsic_dimension(model.flow, x, scale)
    torch.testing.assert_close(dimension, torch.stack(expected), rtol=1e-6, atol=1e-6)
    single = local_intrinsic_dimension(model.float().flow, x.float(), scale)
    torch.testing.assert_close(single.double(), dimension, rtol=1e-3, atol=1e-3)


def test_the_dimension_works_in_inference_mode():
    model = random_pixel_model()
    images = torch.rand(5, 1, 5, 4)
    expected = local_intrinsic_dimension(model.flow, model.inputs(images)[0], 0.1)
    with torch.inference_mode():
        dimension = local_intrinsic_dimension(model.flow, model.inputs(images.clone())[0], 0.1)
    torch.testing.assert_close(dimension, expected)
    assert not dimension.requires_grad


@pytest.mark.parametrize("name", SCORES)
def test_autocast_leaves_scores_alone(name):
    model = pixel_flow(architecture="glow", score=name).eval().model
    randomise_flow(model)
    images = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    model.scorer.fit(model, [model.inputs(images)])
    with torch.no_grad():
        expected = model(images).pred_score
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(images).pred_score
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_an_overflow_has_no_dimension_and_leaves_the_other_images_theirs():
    class Overflow(nn.Module):
        def forward(self, x):
            return torch.where(x > 1, x * 1e200 * 1e200, x), None

    x = torch.tensor([[0.5, 0.5], [2.0, 0.5], [0.1, 0.2]], dtype=torch.float64)
    dimension = local_intrinsic_dimension(Overflow(), x, 0.1)
    assert dimension.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(dimension[0], local_intrinsic_dimension(Overflow(), x[:1], 0.1)[0])


def test_lid_is_the_worse_of_two_one_sided_tests():
    density = Gaussian(6, 4 * torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
    training = density.distribution.sample((60,))
    score = fitted(LocalIntrinsicDimension, density, images_of(training))
    rows = lambda x: torch.stack([-density.distribution.log_prob(x), -lidl(density.flow, x, 0.1)], dim=1) / 6
    x = torch.stack([training[0], torch.full((6,), 3.0).double(), torch.zeros(6).double()])
    expected = (rows(x) - rows(training).mean(0)) / rows(training).std(0)
    torch.testing.assert_close(score(density, images_of(x)), expected.max(1).values)
    unlikely, simple = expected[1], expected[2]
    assert unlikely[0] > 3 > unlikely[1]  # far out: unlikely, not simple
    assert simple[1] > 0 > simple[0]  # the likeliest point: simple


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [1e25, 3e38])
def test_where_either_flow_overflows_nothing_is_normal(which, value):
    model = random_pixel_model("likelihood_ratio")
    with torch.no_grad():
        for parameter in model.trained_flows[which].parameters():
            parameter.fill_(value)
    assert (model(torch.rand(2, *model.shape)).pred_score == math.inf).all()


def test_training_images_that_are_all_alike_give_lid_no_scale_of_rounding():
    """A copy of them, which differs by the rounding of another batch, stays near 0."""
    density = Gaussian(6, 4 * torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
    score = LocalIntrinsicDimension(density)
    score.fit_statistics(torch.tensor([[1.5, -0.8]], dtype=torch.float64).expand(9, 2))
    assert score.combine(torch.tensor([[1.5 * (1 + 2e-7), -0.8]])).abs() < 1


# -- density of states -------------------------------------------------------------------------------------------


def kernel_density(training, test):
    """−log density of a statistic by scikit-learn, kernels at 1,000 quantiles."""
    points = np.quantile(training, (np.arange(1000) + 0.5) / 1000)
    estimate = KernelDensity(bandwidth=training.std(ddof=1) * len(training) ** -0.2).fit(points[:, None])
    return -estimate.score_samples(test[:, None])


def test_density_of_states_agrees_with_scikit_learn():
    model = random_pixel_model("density_of_states").double()
    # Three kinds of images: noise, dark noise, constants with a little noise.
    noise = torch.rand(240, 1, 5, 4, dtype=torch.float64)
    noise[80:160] *= 0.1
    noise[160:] = noise[160:, :, :1, :1] + 0.02 * noise[160:]
    training, test = noise[::2].clamp(0, 1), noise[1::2].clamp(0, 1)

    def rows(images):
        robust, wrong_way = ways_up(model, model.inputs(images)[0])
        at_centres = bits_per_dim(model.log_prob(images), model.dims)
        beyond = at_centres - compressed_bits((images * 255).round().byte()) / 20
        return torch.stack([robust, beyond, wrong_way], dim=1).numpy()

    with torch.no_grad():
        model.scorer.fit(model, [model.inputs(part) for part in training.split(50)])
        scores = model(test).pred_score
        given_rows, test_rows = rows(training), rows(test)
    floor = np.quantile(given_rows, 0.5, axis=0, method="lower")  # the good side counts as the median
    given_rows, test_rows = np.maximum(given_rows, floor), np.maximum(test_rows, floor)
    expected = sum(kernel_density(*columns) for columns in zip(given_rows.T, test_rows.T, strict=True))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [2, 60, 2500])
def test_each_statistic_has_a_density_of_its_own_and_both_sides_count(images):
    density = Table(2)
    rows = torch.randn(images, 2, dtype=torch.float64) * torch.tensor([1.0, 100.0]) + torch.tensor([0.0, 7.0])
    score = fitted(DensityOfStates, density, (rows,))
    test = torch.tensor([[0.0, 7.0], [-6.0, 7.0], [6.0, 7.0], [0.0, -600.0]], dtype=torch.float64)
    expected = sum(kernel_density(rows[:, k].numpy(), test[:, k].numpy()) for k in range(2))
    np.testing.assert_allclose(score(density, (test,)), expected, rtol=1e-6)
    assert score(density, (test,)).argmin() == 0


def test_the_density_of_a_statistic_integrates_to_one():
    density = Table(1)
    rows = torch.randn(500, 1, dtype=torch.float64).exp()
    score = fitted(DensityOfStates, density, (rows,))
    grid = torch.linspace(-20, 60, 40_001, dtype=torch.float64)
    total = torch.trapezoid((-score(density, (grid[:, None],))).exp(), grid)
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64))


def test_a_second_fit_leaves_nothing_of_the_first():
    density = Table(2)
    score = fitted(DensityOfStates, density, (torch.rand(400, 2, dtype=torch.float64),))
    rows = 9 + torch.rand(60, 2, dtype=torch.float64)
    score.fit(density, [(rows,)])
    torch.testing.assert_close(score(density, (rows,)), fitted(DensityOfStates, density, (rows,))(density, (rows,)))


@pytest.mark.parametrize("constant", [0.0, 0.1, -1234.567])
def test_a_constant_statistic_says_nothing(constant):
    density = Table(2)
    rows = torch.rand(90, 2, dtype=torch.float64)
    rows[:, 1] = constant
    score = fitted(DensityOfStates, density, (rows,)).float()
    alone = fitted(DensityOfStates, Table(1), (rows[:, :1],))(Table(1), (rows[:, :1],))
    # Up to rounding, which differs from batch to batch.
    rounded = rows.float()
    rounded[::2, 1] *= 1 + 2**-22
    scores = score(density, (rounded,))
    torch.testing.assert_close(scores - scores[0], (alone - alone[0]).float(), rtol=0, atol=0.01)


# -- every score -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
def test_every_score_has_its_name_a_source_and_a_direction(name):
    score = SCORES[name]
    assert score.name == name
    assert re.search(r"\b(19|20)\d\d\b", score.__doc__)
    assert re.search(r"arXiv \d{4}\.\d{5}|IEE Proceedings", score.__doc__)


def build(name, density):
    return SCORES[name](density).double()


@pytest.mark.parametrize("name", FITTED)
def test_a_score_must_be_fitted_first(name):
    density = Gaussian()
    score = build(name, density)
    x = images_of(torch.rand(60, 6, dtype=torch.float64))
    assert not score.ready
    with pytest.raises(NotFittedError, match=rf"The score '{name}' has not been fitted.*`flowood score`"):
        score(density, x)
    score.fit(density, [x])
    assert score.ready
    assert torch.isfinite(score(density, x)).all()
    score.forget()
    with pytest.raises(NotFittedError):
        score(density, x)


@pytest.mark.parametrize("name", [name for name in SCORES if name not in FITTED])
def test_what_has_nothing_to_fit_is_ready_and_stays_so(name):
    density = Gaussian()
    score = build(name, density)
    score.fit(density, [])
    score.forget()
    assert score.ready
    assert score(density, images_of(torch.rand(3, 6, dtype=torch.float64))).shape == (3,)


@pytest.mark.parametrize("name", FITTED)
def test_broken_and_missing_training_images_are_refused(name):
    density = Gaussian()
    score = build(name, density)
    with pytest.raises(ValueError, match=rf"score '{name}'.*2 training images.*got 0"):
        score.fit(density, [])
    x = torch.rand(8, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"score '{name}'.*2 training images.*got 1"):
        score.fit(density, [images_of(x[:1])])
    with torch.no_grad():
        density.flow.weight[0, 0] = math.inf
    message = rf"8 of 8 training images have a NaN or infinite statistic, so the score '{name}' cannot be fitted"
    with pytest.raises(ValueError, match=message):
        score.fit(density, [images_of(x[:4]), images_of(x[4:])])
    assert not score.ready


def test_the_broken_training_images_are_counted():
    density = Table(2)
    rows = torch.rand(8, 2, dtype=torch.float64)
    rows[2:5, 0] = torch.tensor([math.nan, math.inf, -math.inf])
    with pytest.raises(ValueError, match="3 of 8 training images have a NaN or infinite statistic"):
        fitted(DensityOfStates, density, (rows,))


@pytest.mark.parametrize("name", FITTED)
def test_a_copy_and_a_checkpoint_score_the_same(name):
    density = Gaussian()
    x = images_of(torch.rand(80, 6, dtype=torch.float64))
    score = build(name, density)
    score.fit(density, [x])
    again = build(name, density)
    again.load_state_dict(score.state_dict())
    for other in (again, copy.deepcopy(score)):
        assert other.ready
        assert torch.equal(other(density, x), score(density, x))


@pytest.mark.parametrize("name", FITTED)
def test_a_checkpoint_without_the_score_loads_and_leaves_it_to_be_fitted(name):
    model = PixelFlowModel((5, 4), 1, coupling_layers=4, hidden_channels=16, bottleneck_dim=3, score=name)
    model.load_state_dict(random_pixel_model().state_dict())
    assert not model.scorer.ready


@pytest.mark.parametrize("name", ["likelihood_ratio", "ensemble"])
def test_a_checkpoint_without_the_scores_flows_does_not_load(name):
    model = PixelFlowModel((5, 4), 1, coupling_layers=4, hidden_channels=16, bottleneck_dim=3, score=name)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(random_pixel_model().state_dict())


@pytest.mark.parametrize("build_detector", [pixel_flow, embedding_flow])
def test_an_unknown_score_is_refused_with_the_nearest_name(build_detector):
    with pytest.raises(ValueError, match="Unknown score 'typical'. Did you mean 'typicality'"):
        build_detector(score="typical")


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if score.pixels_only])
def test_scores_of_pixels_are_refused_on_embeddings(name):
    with pytest.raises(ValueError, match=rf"Score '{name}' works on a flow of pixels alone \(PixelFlow\)"):
        embedding_flow(score=name)


@pytest.mark.parametrize("images", [3, 10, 100])
def test_a_score_is_fitted_on_so_many_images_and_no_more(images, monkeypatch):
    monkeypatch.setattr(Typicality, "fit_images", images)
    detector = pixel_flow(score="typicality")
    randomise_flow(detector.model)
    pixels = torch.rand(24, 1, 12, 12)
    seen = []

    class Batch:
        def __init__(self, image):
            self.image = image
            seen.append(len(image))

        def to(self, device, **kwargs):
            return self

    detector.train()
    detector.fit_score(Batch(part) for part in pixels.split(4))
    assert detector.model.training
    used = min(images, 24)
    assert sum(seen) == 4 * math.ceil(used / 4)
    with torch.no_grad():
        expected = -detector.eval().model.log_prob(pixels[:used]).mean() / 144
    torch.testing.assert_close(detector.model.scorer.mean, expected)
