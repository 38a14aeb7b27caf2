# SPDX-License-Identifier: Apache-2.0
from copy import deepcopy

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from anomalib_flowood.features import create_feature_maps, run_backbone
from anomalib_flowood.features.folding import _same, folded

NETWORKS = ["resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "test_vit", "regnetx_002"]
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def norms(network):
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def trained(network):
    """The network with batch norms as training leaves them."""
    for norm in norms(network):
        for tensor, low in ((norm.running_mean, -0.5), (norm.running_var, 0.5), (norm.weight, 0.5), (norm.bias, -0.5)):
            tensor.data.uniform_(low, low + 1)
    return network.eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_gives_what_the_network_gives_without_its_batch_norms(name):
    torch.manual_seed(0)
    network = trained(timm.create_model(name, num_classes=0))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    light = folded(network, IMAGES)
    expected = network(IMAGES)
    torch.testing.assert_close(light(IMAGES), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (len(norms(network)) > 0) == (light is not network)
    assert not norms(light)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    exact = network.double()
    torch.testing.assert_close(folded(exact, IMAGES.double())(IMAGES.double()), exact(IMAGES.double()))


def test_sees_that_weights_have_changed():
    torch.manual_seed(0)
    network = trained(create_feature_maps("resnet18", [1, 2], pre_trained=False, image_size=(64, 64)))
    first = run_backbone(network, IMAGES)
    assert folded(network, IMAGES) is folded(network, IMAGES)
    changes = [
        lambda: norms(network)[3].running_var.mul_(4),
        lambda: network.load_state_dict(trained(deepcopy(network)).state_dict()),
        lambda: network.load_state_dict(trained(deepcopy(network)).state_dict(), assign=True),
    ]
    for change in changes:
        change()
        found = run_backbone(network, IMAGES)
        assert not torch.allclose(found[1], first[1], rtol=1e-3)
        torch.testing.assert_close(found, tuple(network(IMAGES)), rtol=1e-4, atol=1e-4)
        first = found


class Forked(nn.Module):
    """A convolution whose output goes on past the batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


@pytest.mark.parametrize(
    "network",
    [
        Forked(),
        nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    ],
)
def test_leaves_what_is_no_affine_map_of_a_convolution(network):
    network = trained(network) if norms(network)[0].track_running_stats else network.eval()
    assert folded(network, IMAGES) is network


def test_leaves_modules_whose_outputs_are_asked_for():
    network = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    seen = []
    network[0].register_forward_hook(lambda *outputs: seen.append(outputs[-1]))
    assert folded(network, IMAGES) is network


def test_gradients_pass_after_inference_mode():
    network = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.inference_mode():
        run_backbone(network, IMAGES.clone())
    images = IMAGES.clone().requires_grad_()
    run_backbone(network, images)[0].sum().backward()
    assert images.grad.abs().sum() > 0


def test_training_mode_keeps_its_batch_norms():
    network = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train()
    assert folded(network, IMAGES) is network


def test_a_forward_that_was_replaced_is_asked():
    """As the contest's memo does, after the detector was built, which runs its backbone once."""
    torch.manual_seed(0)
    network = trained(create_feature_maps("resnet18", [1], pre_trained=False, image_size=(64, 64)))
    expected = run_backbone(network, IMAGES)
    asked, plain = [], network.forward

    def forward(images):
        asked.append(len(images))
        return plain(images)

    network.forward = forward
    torch.testing.assert_close(run_backbone(network, IMAGES), expected, rtol=1e-4, atol=1e-4)
    assert asked == [2]


@given(
    lengths=st.tuples(*[st.integers(1, 20)] * 2),
    kernel=st.tuples(*[st.integers(1, 6)] * 2),
    stride=st.tuples(*[st.integers(1, 4)] * 2),
    dilation=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_padding_that_is_not_copied_gives_the_same(lengths, kernel, stride, dilation, seed):
    torch.manual_seed(seed)
    convolution = Conv2dSame(4, 6, kernel, stride=stride, dilation=dilation, groups=2).double()
    images = torch.randn(2, 4, *lengths, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(_same(convolution, images), convolution(images), rtol=1e-12, atol=1e-12)


def test_nothing_is_only_padded(monkeypatch):
    network = trained(create_feature_maps("tf_efficientnet_lite0", [1, 2], pre_trained=False, image_size=(64, 64)))
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    light, pad, padded = folded(network, images), nn.functional.pad, []
    monkeypatch.setattr(nn.functional, "pad", lambda *given, **named: padded.append(1) or pad(*given, **named))
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in light(images))
    assert not padded
    network(images)
    assert padded
