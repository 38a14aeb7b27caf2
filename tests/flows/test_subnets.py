# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_flowood.flows import SUBNETS, Highway, ResNet, WeightNormConv2d, subnet_constructor


@pytest.mark.parametrize("name", SUBNETS)
def test_keeps_the_spatial_size_starts_at_zero_and_pickles(name):
    constructor = pickle.loads(pickle.dumps(subnet_constructor(name, hidden_channels=5, bottleneck_dim=2, size=(3, 4))))
    y = constructor(2, 6)(torch.randn(7, 2, 3, 4))
    assert y.shape == (7, 6, 3, 4)
    assert torch.equal(y, torch.zeros_like(y))


FULLY_CONNECTED = [name for name, subnet in SUBNETS.items() if subnet.fully_connected]
BOTTLENECKS = [name for name, subnet in SUBNETS.items() if subnet.squeezes]


def test_kinds():
    assert sorted(FULLY_CONNECTED) == ["bottleneck", "mlp"]
    assert sorted(BOTTLENECKS) == ["bottleneck", "conv_bottleneck"]


@pytest.mark.parametrize("name", FULLY_CONNECTED)
def test_flat_vectors(name):
    assert subnet_constructor(name, hidden_channels=5, bottleneck_dim=2)(8, 16)(torch.randn(3, 8)).shape == (3, 16)


@given(size=st.tuples(st.integers(1, 11), st.integers(1, 11)), channels=st.integers(3, 4))
def test_the_convolutional_bottleneck_takes_any_size(size, channels):
    net = subnet_constructor("conv_bottleneck", hidden_channels=3, bottleneck_dim=2, size=size)(channels, 5)
    assert net(torch.randn(2, channels, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_the_bottleneck_lets_only_its_numbers_pass(name):
    net = subnet_constructor(name, hidden_channels=9, bottleneck_dim=2, size=(4, 4))(1, 2).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(16, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v.reshape(1, 1, 4, 4)).flatten(), x)
    assert int(torch.linalg.matrix_rank(jacobian)) <= 2


@pytest.mark.parametrize(("name", "kwargs"), [*((name, {}) for name in SUBNETS), ("resnet", {"batch_norm": True})])
def test_every_weight_learns(name, kwargs):
    net = subnet_constructor(name, hidden_channels=4, bottleneck_dim=2, size=(6, 5), num_blocks=3, **kwargs)(2, 4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    (net(torch.randn(8, 2, 6, 5)) ** 2).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in net.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_weight_normalisation_is_pytorchs(bias):
    ours = WeightNormConv2d(3, 4, 3, bias=bias)
    theirs = torch.nn.Conv2d(3, 4, 3, padding=1, bias=bias)
    x = torch.randn(2, 3, 5, 6)
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if name != "gain"})
    torch.testing.assert_close(ours(x), theirs(x))  # starts as the plain convolution

    theirs = torch.nn.utils.parametrizations.weight_norm(theirs)
    with torch.no_grad():
        ours.gain.copy_(torch.randn(4, 1, 1, 1))
        ours.weight.mul_(3)
        theirs.parametrizations.weight.original0.copy_(ours.gain)
    torch.testing.assert_close(ours(x), theirs(x))


def test_blocks_are_counted():
    for name, kind in (("resnet", ResNet), ("highway", Highway)):
        net = subnet_constructor(name, hidden_channels=4, bottleneck_dim=2, size=(4, 4), num_blocks=3)(1, 2)
        assert isinstance(net, kind)
        assert len(net.blocks) == 3


def test_a_highways_gates_choose_between_a_block_and_its_input():
    net = Highway(2, 3, hidden_channels=4, num_blocks=2)
    x = torch.randn(2, 2, 5, 5)
    torch.nn.init.normal_(net.head.weight)
    with torch.no_grad():
        for block in net.blocks:
            block.bias[4:] = -1e3  # gates shut
    torch.testing.assert_close(net(x), net.head(net.stem(x)))
    with torch.no_grad():
        net.blocks[1].bias[4:] = 1e3  # and open
    torch.testing.assert_close(net(x), net.head(net.blocks[1](net.stem(x))[:, :4]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "bottelneck"}, "Unknown subnet 'bottelneck'. Did you mean 'bottleneck'"),
        ({"name": "mlp", "hidden_channels": 0}, "hidden_channels must be at least 1, got 0"),
        ({"name": "resnet"}, "'resnet' is convolutional and needs images"),
        ({"name": "highway"}, "'highway' is convolutional and needs images"),
        ({"name": "conv_bottleneck"}, "'conv_bottleneck' is convolutional and needs images"),
        ({"name": "resnet", "size": (4, 4), "num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"name": "mlp", "batch_norm": True}, "Only subnet 'resnet' has batch normalisation"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        subnet_constructor(**{"hidden_channels": 4, "bottleneck_dim": 2, **kwargs})


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_a_squeeze_that_squeezes_nothing_is_refused(name):
    with pytest.raises(ValueError, match="bottleneck_dim=16 squeezes nothing: the network's input has 16 values"):
        subnet_constructor(name, hidden_channels=4, bottleneck_dim=16, size=(4, 4))(1, 2)
