# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from model_helpers import BACKBONE
from torch import nn

from anomalib_flowood.features import PooledAndMaps, create_backbone, create_feature_maps
from benchmarks.contest.memo import Memo


@pytest.fixture
def memo(tmp_path):
    with Memo(tmp_path) as memo:
        yield memo


def maps_network(layers=(1, 2)):
    torch.manual_seed(3)
    return create_feature_maps(BACKBONE, layers, pre_trained=False)


@pytest.mark.parametrize("network", ["maps", "head"])
def test_memo_gives_what_the_plain_module_gives(memo, network):
    def make():
        torch.manual_seed(3)
        return maps_network() if network == "maps" else create_backbone(BACKBONE, pre_trained=False, num_classes=0)

    plain, module = make(), make()
    assert memo.attach(nn.ModuleDict({"inner": module})) == 1
    images = torch.randn(20, 3, 32, 32)
    with torch.no_grad():
        expected = plain(images)
        for batch in (images[:7], images, images.flip(0), images.contiguous(memory_format=torch.channels_last)):
            got = module(batch)
            want = plain(batch)
            assert type(got) is type(want)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        again = module(images)
    first = expected if isinstance(expected, torch.Tensor) else expected[0]
    assert (again if isinstance(again, torch.Tensor) else again[0]).is_contiguous()
    assert first.shape == (again if isinstance(again, torch.Tensor) else again[0]).shape


def test_memo_counts_and_measures(memo):
    module = maps_network()
    memo.attach(module)
    images = torch.randn(5, 3, 32, 32)
    account = memo.account()
    with torch.no_grad():
        module(torch.cat([images, images[:2]]))  # the same image twice in a batch is computed once, and is no hit
    assert (account.hits, account.computed, account.saved) == (0, 5, 0.0)
    account = memo.account()
    with torch.no_grad():
        module(torch.cat([images[:3], torch.randn(1, 3, 32, 32)]))
    assert (account.hits, account.computed) == (3, 1)
    assert account.saved > 0


def test_memo_is_shared_by_equal_backbones_only(memo):
    same, other, more = maps_network(), maps_network(), maps_network((1, 3))
    torch.manual_seed(9)
    weights = create_feature_maps(BACKBONE, (1, 2), pre_trained=False)
    for module in (same, other, more, weights):
        memo.attach(module)
    images = torch.randn(2, 3, 32, 32)
    account = memo.account()
    with torch.no_grad():
        first = same(images)
        assert torch.equal(other(images)[0], first[0])
        assert account.hits == 2
        more(images)
        weights(images)
        same(torch.randn(2, 3, 48, 48))
    assert account.hits == 2


def test_memo_tells_pooled_features_with_other_maps_apart(memo):
    networks = []
    for layers in ((1,), (2,), (1, 2)):
        torch.manual_seed(3)
        networks.append(PooledAndMaps(BACKBONE, layers, pre_trained=False).eval())
        assert memo.attach(networks[-1]) == 1
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        one, two, both = (network(images) for network in networks)
        assert memo.account().hits == 0
        again = networks[0](images)
    assert one[1].shape != two[1].shape
    torch.testing.assert_close(both, [one[0], one[1], two[1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, one)


def test_memo_steps_aside(memo):
    module = maps_network()
    memo.attach(module)
    images = torch.randn(2, 3, 32, 32)
    account = memo.account()
    with torch.no_grad():
        module.train()
        module(images)
        module.eval()
        with memo.off():
            module(images)
    wanted = images.clone().requires_grad_()
    module(wanted)[0].sum().backward()
    assert wanted.grad is not None
    assert account.computed == account.hits == 0


def test_memo_mixes_inference_mode_and_training(memo):
    module = maps_network()
    memo.attach(module)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        inside = module(images + 0)[0]
    outside = module(images)[0]
    assert torch.equal(inside, outside)
    (outside * torch.ones((), requires_grad=True)).sum().backward()  # not an inference tensor
    module(torch.randn(1, 3, 32, 32))


def test_memo_full_computes_on(tmp_path):
    module, plain = maps_network(), maps_network()
    with Memo(tmp_path, capacity=3) as memo:
        memo.attach(module)
        images = torch.randn(5, 3, 32, 32)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(module(images)[1], plain(images)[1], rtol=1e-4, atol=1e-5)
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
