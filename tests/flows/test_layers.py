# SPDX-License-Identifier: Apache-2.0
import io
import pickle

import pytest
import torch
from flow_helpers import check_inverse, check_log_det, randomise
from hypothesis import given
from hypothesis import strategies as st

from anomalib_flowood.flows import (
    ActNorm,
    ChannelCoupling,
    FactorOut,
    InvertibleConv1x1,
    Squeeze,
    Unsqueeze,
    Whitening,
    subnet_constructor,
)

SHAPE = (3, 4, 6)


def call(module):
    """FrEIA's convention without the tuples; the log-determinant as a vector."""

    def flow(x, rev=False):
        (y,), log_det = module((x,), rev=rev)
        return y, log_det + torch.zeros(len(x), dtype=x.dtype)

    return flow


def image(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def saved(module):
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def factor_out(shape):
    net = subnet_constructor("mlp", hidden_channels=5, bottleneck_dim=1, size=shape[1:])
    return FactorOut([shape], fill=lambda inner: inner.append(ChannelCoupling, layer=0, subnet_constructor=net))


def whitening(shape, directions=3, **arguments):
    layer = Whitening([shape], directions, **arguments).double()
    scale = torch.linspace(0.3, 3, shape[-1], dtype=torch.float64)
    layer.fit(image(40, *shape, seed=5) * scale + 2)
    return layer


# -- all of them -----------------------------------------------------------------------------------------------------

LAYERS = {
    "squeeze": lambda: Squeeze([(4, 4, 6)]),
    "unsqueeze": lambda: Unsqueeze([(4, 4, 6)]),
    "factor out": lambda: factor_out((4, 4, 6)),
    "actnorm": lambda: ActNorm([(4, 4, 6)]).eval(),
    "whitening": lambda: whitening((4, 4, 6)),
    "whitening of vectors": lambda: whitening((5,), directions=2),
    "whitening of blocks": lambda: whitening((4, 4, 6), block=2),
    "1x1 convolution": lambda: InvertibleConv1x1([(4, 4, 6)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_log_determinant_and_shape(name):
    module = randomise(LAYERS[name]())
    x = image(2, *module.shape)
    check_inverse(call(module), x)
    check_log_det(call(module), x)
    assert module.output_dims([module.shape]) == [call(module)(x)[0].shape[1:]]


@pytest.mark.parametrize("name", LAYERS)
def test_pickles(name):
    module = randomise(LAYERS[name]())
    again = pickle.loads(pickle.dumps(module))
    x = image(2, *module.shape)
    assert torch.equal(call(again)(x)[0], call(module)(x)[0])


@pytest.mark.parametrize("layer", [Squeeze, Unsqueeze, ActNorm, InvertibleConv1x1])
def test_what_is_no_image_is_refused(layer):
    with pytest.raises(ValueError, match=rf"{layer.__name__} takes one image \(C, H, W\)"):
        layer([(12,)])
    with pytest.raises(ValueError, match=f"{layer.__name__} takes one input and no condition"):
        layer([(4, 4, 4)], dims_c=[(2,)])


# -- squeeze ---------------------------------------------------------------------------------------------------------


def test_squeeze_makes_a_block_of_four_pixels_into_channels_in_reading_order():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    y, log_det = call(Squeeze([(1, 4, 4)]))(x)
    assert y[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert y[0, :, 1, 1].tolist() == [10, 11, 14, 15]
    assert log_det.tolist() == [0]
    assert torch.equal(call(Unsqueeze([(4, 2, 2)]))(y)[0], x)


def test_shapes_that_do_not_squeeze():
    with pytest.raises(ValueError, match=r"even height and width, got the shape \(1, 4, 5\)"):
        Squeeze([(1, 4, 5)])
    with pytest.raises(ValueError, match=r"multiple of 4 channels, got the shape \(6, 4, 4\)"):
        Unsqueeze([(6, 4, 4)])


# -- factoring out ---------------------------------------------------------------------------------------------------


def test_the_half_that_is_factored_out_is_left_alone_and_alters_nothing():
    module = randomise(factor_out((5, 4, 6)))
    x = image(2, 5, 4, 6)
    y, log_det = call(module)(x)
    inner, inner_log_det = module.inner(x[:, :2])
    assert torch.equal(y[:, 2:], x[:, 2:])
    assert torch.equal(y[:, :2], inner)
    assert torch.equal(log_det, inner_log_det)


def test_inner_flows_that_do_not_fit():
    with pytest.raises(ValueError, match=r"turns \(1, 4, 6\) into \(4, 2, 3\); it must keep the shape"):
        FactorOut([SHAPE], fill=lambda inner: inner.append(Squeeze))
    with pytest.raises(ValueError, match="at least 2 channels"):
        FactorOut([(1, 4, 6)], fill=lambda inner: None)


# -- actnorm ---------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), shift=st.floats(-50, 50), scale=st.floats(0.01, 50), n=st.integers(1, 5))
def test_actnorm_standardises_its_first_batch_even_of_one_image(seed, shift, scale, n):
    module = ActNorm([SHAPE]).double()
    y, log_det = call(module)(shift + scale * image(n, *SHAPE, seed=seed))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(3).double())
    torch.testing.assert_close(log_det, (24 * module.log_scale.sum()).expand(n))


def test_actnorm_starts_once():
    module = ActNorm([SHAPE]).double()
    call(module)(image(4, *SHAPE))
    x = 5 + 3 * image(4, *SHAPE, seed=1)
    assert call(module)(x)[0].mean() > 3


@pytest.mark.parametrize("constant", [torch.zeros(2, *SHAPE), torch.full((1, *SHAPE), 7.0)])
def test_actnorm_only_shifts_a_constant_channel(constant):
    constant[:, 0] = torch.randn(constant[:, 0].shape)
    module = ActNorm([SHAPE])
    y, log_det = call(module)(constant)
    assert torch.equal(y[:, 1:], torch.zeros_like(y[:, 1:]))
    assert torch.isfinite(log_det).all()
    torch.testing.assert_close(call(module)(y, rev=True)[0], constant)


def test_actnorm_starts_on_a_single_value_per_channel():
    module = ActNorm([(2, 1, 1)])
    assert call(module)(torch.tensor([3.0, -2.0]).reshape(1, 2, 1, 1))[0].flatten().tolist() == [0, 0]


def test_actnorm_does_not_start_in_evaluation_nor_in_reverse():
    module, x = ActNorm([SHAPE]), torch.randn(4, *SHAPE) * 3 + 1
    assert torch.equal(call(module.eval())(x)[0], x)
    assert torch.equal(call(module.train())(x, rev=True)[0], x)
    assert not module.initialized
    call(module)(x)
    assert module.initialized


def test_a_checkpoint_remembers_whether_actnorm_has_started():
    started, fresh, x = ActNorm([SHAPE]), ActNorm([SHAPE]), torch.randn(4, *SHAPE) * 3 + 1
    never = saved(fresh)
    y, _ = call(started)(x)
    fresh.load_state_dict(saved(started))
    other = torch.randn(4, *SHAPE)
    assert torch.equal(call(fresh)(other)[0], call(started)(other)[0])

    again = ActNorm([SHAPE])
    again.load_state_dict(never)
    torch.testing.assert_close(call(again)(x)[0], y)


def test_actnorm_asks_its_device_once_whether_it_has_started(monkeypatch):
    module, x = ActNorm([SHAPE]), torch.randn(4, *SHAPE) * 3 + 1
    never = saved(module)
    expected = call(module)(x)[0]
    call(module)(x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("waits for the device"))
        assert torch.equal(call(module)(x)[0], expected)
    module.load_state_dict(never)  # and here it begins anew
    torch.testing.assert_close(call(module)(x + 7)[0], expected)


# -- invertible 1×1 convolution --------------------------------------------------------------------------------------


@given(channels=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_convolution_starts_as_a_rotation(channels, seed):
    torch.manual_seed(seed)
    module = InvertibleConv1x1([(channels, 2, 2)])
    weight = module.weight()
    torch.testing.assert_close(weight @ weight.T, torch.eye(channels), rtol=0, atol=1e-5)
    torch.testing.assert_close(call(module)(torch.randn(2, channels, 2, 2))[1], torch.zeros(2), rtol=0, atol=1e-4)


@given(channels=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_convolution_is_its_matrix_with_its_determinant(channels, seed):
    module = randomise(InvertibleConv1x1([(channels, 2, 3)]), seed=seed)
    x = image(2, channels, 2, 3, seed=seed)
    y, log_det = call(module)(x)
    torch.testing.assert_close(y, torch.einsum("ij,njhw->nihw", module.weight(), x))
    torch.testing.assert_close(log_det, (6 * torch.linalg.slogdet(module.weight())[1]).expand(2))
    check_inverse(call(module), x)


@given(seed=st.integers(0, 99))
def test_the_convolution_is_inverted_in_single_precision(seed):
    torch.manual_seed(seed)
    module, x = InvertibleConv1x1([(48, 4, 4)]), torch.randn(2, 48, 4, 4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    torch.testing.assert_close(call(module)(call(module)(x)[0], rev=True)[0], x, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_holds_the_whole_convolution():
    module, other = InvertibleConv1x1([(7, 2, 2)]), InvertibleConv1x1([(7, 2, 2)])
    assert not torch.allclose(other.weight(), module.weight())
    other.load_state_dict(saved(module))
    assert torch.equal(other.weight(), module.weight())


def test_training_keeps_the_triangles():
    module = InvertibleConv1x1([(5, 2, 2)])
    (call(module)(torch.randn(2, 5, 2, 2))[0] ** 2).sum().backward()
    assert torch.equal(module.lower.grad.triu(), torch.zeros(5, 5))
    assert torch.equal(module.upper.grad.tril(), torch.zeros(5, 5))


# -- whitening -------------------------------------------------------------------------------------------------------


def test_before_a_fit_whitening_is_the_identity():
    x = image(3, *SHAPE)
    y, log_det = call(Whitening([SHAPE], 2).double())(x)
    torch.testing.assert_close(y, x)
    assert not log_det.any()


@pytest.mark.parametrize("directions", [0, 2, 5])
def test_whitening_makes_a_gaussian_of_probabilistic_pca_standard(directions):
    x = image(60, 5, seed=1) * torch.tensor([4.0, 2.0, 1.0, 0.5, 0.2]) + 3
    layer = Whitening([(5,)], directions).double()
    layer.fit(x)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(x.T))
    rest = eigenvalues[: 5 - directions].mean() if directions < 5 else layer.rest
    kept = vectors[:, 5 - directions :]
    covariance = kept @ torch.diag(eigenvalues[5 - directions :] - rest) @ kept.T + rest * torch.eye(5)
    y, log_det = call(layer)(x)
    found = torch.distributions.Normal(0, 1).log_prob(y).sum(1) + log_det
    expected = torch.distributions.MultivariateNormal(x.mean(0), (covariance + covariance.T) / 2).log_prob(x)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)


def test_whitening_takes_one_direction_for_two_samples_and_remembers_them():
    layer = Whitening([(6,)], 4).double()
    layer.fit(image(5, 6))
    assert len(layer.directions) == 2
    fresh = Whitening([(6,)], 4).double()
    fresh.load_state_dict(saved(layer))
    assert torch.equal(call(fresh)(image(3, 6))[0], call(layer)(image(3, 6))[0])
    with pytest.raises(RuntimeError, match="size mismatch for directions"):
        Whitening([(7,)], 4).double().load_state_dict(saved(layer))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        layer.fit(image(1, 6))
    with pytest.raises(ValueError, match="directions must be at least 0"):
        Whitening([(6,)], -1)


def test_whitening_by_blocks_is_that_by_directions_which_are_constant_over_each():
    x = image(60, 2, 4, 6, seed=3).cumsum(0)
    layer = whitening((2, 4, 6), block=2)
    layer.fit(x)
    means = torch.nn.functional.avg_pool2d(x, 2).flatten(1)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(means.T))
    kept = vectors.T.flip(0)[:3].reshape(3, 2, 2, 3).repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(1) / 2
    variances = 4 * eigenvalues.flip(0)[:3]
    total = torch.cov(x.flatten(1).T).trace()
    rest = (total - variances.sum()) / (48 - 3)
    covariance = rest * torch.eye(48).double() + kept.T @ torch.diag(variances - rest) @ kept
    y, log_det = call(layer)(x)
    found = torch.distributions.Normal(0, 1).log_prob(y).flatten(1).sum(1) + log_det
    gaussian = torch.distributions.MultivariateNormal(x.mean(0).flatten(), covariance)
    torch.testing.assert_close(found, gaussian.log_prob(x.flatten(1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("shape", "block"), [((4, 4, 6), 4), ((4,), 2), ((4, 4, 6), 0)])
def test_blocks_make_up_a_map(shape, block):
    with pytest.raises(ValueError, match=f"Blocks of {block} x {block} positions do not make up"):
        Whitening([shape], 2, block=block)


def test_whitening_takes_no_more_directions_than_there_are_numbers():
    layer, x = Whitening([(3,)], 8).double(), image(40, 3)
    layer.fit(x)
    assert len(layer.directions) == 3
    y, _ = call(layer)(x)
    torch.testing.assert_close(torch.cov(y.T), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
