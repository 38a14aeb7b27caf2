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


def test_kept_outputs_are_read_by_the_next_command(tmp_path):
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        with Memo(kept=tmp_path / "kept") as memo:
            assert memo.lasts
            module = maps_network()
            memo.attach(module)
            first = module(images[:3])
        with Memo(kept=tmp_path / "kept") as memo:
            module, other = maps_network(), maps_network((1, 3))
            memo.attach(module)
            memo.attach(other)
            account = memo.account()
            again = module(images)
            assert (account.hits, account.computed) == (3, 2)
            assert account.saved > 0  # what an image takes is known from before
            assert torch.equal(again[0][:3], first[0])
            other(images)
            assert account.hits == 3
        with Memo(kept=tmp_path / "kept") as memo:
            memo.attach(module := maps_network())
            account = memo.account()
            assert torch.equal(module(images)[1], again[1])
            assert (account.hits, account.computed) == (5, 0)
            (seconds,) = account.seconds_per_image.values()
            assert seconds > 0


def test_an_interrupted_store_goes_on_at_its_last_whole_image(tmp_path):
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        with Memo(kept=tmp_path) as memo:
            memo.attach(module := maps_network())
            expected = module(images)
        (digests,) = tmp_path.glob("*/digests")
        digests.write_bytes(digests.read_bytes()[: 2 * 16 + 5])
        with Memo(kept=tmp_path) as memo:
            memo.attach(module := maps_network())
            account = memo.account()
            assert torch.equal(module(images)[0], expected[0])
            assert (account.hits, account.computed) == (2, 2)
            assert len(digests.read_bytes()) == 4 * 16
        digests.with_name("about.json").unlink()  # interrupted earlier still
        with Memo(kept=tmp_path) as memo:
            memo.attach(module := maps_network())
            account = memo.account()
            assert torch.equal(module(images)[0], expected[0])
            assert account.hits == 0


def test_a_kept_folder_is_bounded(tmp_path):
    images = torch.randn(4, 3, 32, 32)

    def ask(layers, gib, count=4):
        with torch.no_grad(), Memo(kept=tmp_path, gib=gib) as memo:
            memo.attach(module := maps_network(layers))
            account = memo.account()
            module(images[:count])
            return account.hits

    def stored():
        return sum(len(path.read_bytes()) // 16 for path in tmp_path.glob("*/digests"))

    plain = maps_network((1, 2))
    size = sum(output[0].numel() * 4 for output in plain(images)) / 2**30
    ask((1, 2), size * 4.5)
    assert ask((1, 2), size * 4.5) == 4
    assert ask((1, 3), size * 4.5) == 0  # takes the place of the first
    assert ask((1, 2), size * 4.5) == 0
    assert stored() <= 8
    assert ask((2,), size * 0.1) == 0  # no room: nothing is kept, and what nobody asked for is gone
    assert stored() == 0


def test_two_commands_do_not_share_a_kept_folder(tmp_path):
    with Memo(kept=tmp_path / "kept") as first, Memo(tmp_path, kept=tmp_path / "kept") as second:
        assert first.lasts
        assert not second.lasts
        assert second.folder != first.folder
        with torch.no_grad():
            second.attach(module := maps_network())
            module(torch.randn(2, 3, 32, 32))
    assert not second.folder.exists()
    assert first.folder.exists()
