# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest
import torch

from anomalib_flowood.flows import SUBNETS, subnet_constructor


@pytest.mark.parametrize("name", SUBNETS)
def test_keeps_the_spatial_size_starts_at_zero_and_pickles(name):
    constructor = pickle.loads(pickle.dumps(subnet_constructor(name, hidden_channels=5, bottleneck_dim=2, size=(3, 4))))
    y = constructor(2, 6)(torch.randn(7, 2, 3, 4))
    assert y.shape == (7, 6, 3, 4)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("name", ["bottleneck", "mlp"])
def test_flat_vectors(name):
    assert subnet_constructor(name, hidden_channels=5, bottleneck_dim=2)(8, 16)(torch.randn(3, 8)).shape == (3, 16)


def test_the_bottleneck_lets_only_its_numbers_pass():
    net = subnet_constructor("bottleneck", hidden_channels=9, bottleneck_dim=2, size=(4, 4))(1, 2).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(16, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v.reshape(1, 1, 4, 4)).flatten(), x)
    assert int(torch.linalg.matrix_rank(jacobian)) <= 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "bottelneck"}, "Unknown subnet 'bottelneck'. Did you mean 'bottleneck'"),
        ({"name": "mlp", "hidden_channels": 0}, "hidden_channels must be at least 1, got 0"),
        ({"name": "resnet"}, "'resnet' is convolutional and needs images"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        subnet_constructor(**{"hidden_channels": 4, "bottleneck_dim": 2, **kwargs})


def test_a_squeeze_that_squeezes_nothing_is_refused():
    with pytest.raises(ValueError, match="bottleneck_dim=16 squeezes nothing: the network's input has 16 values"):
        subnet_constructor("bottleneck", hidden_channels=4, bottleneck_dim=16, size=(4, 4))(1, 2)
