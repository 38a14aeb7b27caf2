# SPDX-License-Identifier: Apache-2.0
"""Every kind of timm network, with random weights: what the detectors get of it is a map of the image."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from anomalib_flowood import FeatureMapFlow
from anomalib_flowood.features import (
    LOCAL_DIR,
    PooledAndMaps,
    backbones,
    create_backbone,
    create_feature_maps,
    default_layers,
    feature_layers,
    run_backbone,
    save_local,
)
from anomalib_flowood.models.components import backbone_pre_processor
from anomalib_flowood.models.embedding_flow import EmbeddingFlowModel
from anomalib_flowood.models.feature_map_flow import FeatureMapFlowModel

# For each family: the smallest network, or one made smaller; images that are not square and of another size than the
# network's own, where it takes such; and what makes it smaller.
WIDE, NARROW = (96, 128), (64, 96)
FAMILIES = {
    "beit_base_patch16_224": (WIDE, {"depth": 3, "embed_dim": 48, "num_heads": 2}),
    "cait_xxs24_224": (WIDE, {"depth": 3, "embed_dim": 48, "num_heads": 4}),
    "coat_lite_tiny": (WIDE, {}),  # maps of several branches under one module's name
    "convit_tiny": ((96, 96), {"depth": 3, "local_up_to_layer": 2, "embed_dim": 16}),
    "crossvit_tiny_240": ((240, 240), {"embed_dim": [24, 32], "num_heads": [2, 2]}),  # two branches
    "cs3darknet_focus_s": (WIDE, {}),
    "davit_tiny": (NARROW, {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 32], "num_heads": [1, 2, 2, 2]}),
    "deit_tiny_distilled_patch16_224": (WIDE, {"depth": 3, "embed_dim": 48}),  # two prefix tokens
    "dla46x_c": (WIDE, {}),
    "edgenext_xx_small": (WIDE, {}),
    "efficientformerv2_s0": (WIDE, {}),
    "efficientvit_m0": (WIDE, {}),
    "fasternet_t0": (WIDE, {}),
    "ghostnet_050": (WIDE, {}),
    "hiera_tiny_224": (NARROW, {"embed_dim": 16, "stages": [1, 1, 2, 1]}),  # tokens in an order of their own
    "lambda_resnet26t": (NARROW, {}),  # a convolution of three dimensions
    "levit_128s": (WIDE, {}),
    "mobilenetv3_small_050": (WIDE, {}),
    "mobilevit_xxs": (WIDE, {}),
    "naflexvit_base_patch16_gap": (WIDE, {"depth": 3, "embed_dim": 48, "num_heads": 2}),
    "pit_ti_224": (WIDE, {}),
    "pvt_v2_b0": (WIDE, {}),
    "regnetx_002": (WIDE, {}),
    "samvit_base_patch16_224": (
        WIDE,
        {"depth": 3, "embed_dim": 48, "num_heads": 2, "global_attn_indexes": [1], "neck_chans": 32},
    ),
    "sequencer2d_s": (
        (56, 70),  # its stride is 14
        {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 32], "hidden_sizes": [8, 16, 16, 16]},
    ),
    "starnet_s050": (WIDE, {}),
    "swin_tiny_patch4_window7_224": (NARROW, {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]}),
    "swinv2_tiny_window8_256": (NARROW, {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]}),
    "swinv2_cr_tiny_ns_224": (NARROW, {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]}),
    "test_byobnet": (WIDE, {}),
    "test_coatnet": (WIDE, {}),
    "test_convnext": (WIDE, {}),
    "test_efficientnet": (WIDE, {}),
    "test_mambaout": (WIDE, {}),
    "test_nfnet": (WIDE, {}),
    "test_resnet": (WIDE, {}),
    "test_vit_relpos": (WIDE, {}),
    "tiny_vit_5m_224": (
        WIDE,
        {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 64], "num_heads": [1, 2, 2, 2]},
    ),
    "tnt_s_patch16_224": (WIDE, {"depth": 3}),
    "twins_svt_small": (NARROW, {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 32], "num_heads": [1, 2, 2, 2]}),
    "vit_base_patch32_224": ((160, 192), {"depth": 3, "embed_dim": 48, "num_heads": 2}),  # no layer of stride 16
    "vit_small_patch14_reg4_dinov2": ((56, 70), {"depth": 3, "embed_dim": 48, "num_heads": 2}),  # five prefix tokens
    "vit_tiny_patch16_dinov3_qkvb": (WIDE, {"depth": 3, "embed_dim": 48, "num_heads": 2}),
    "xcit_nano_12_p16_224": (WIDE, {"depth": 3, "embed_dim": 48}),
}

SMALL = {"subspace_dim": 2, "coupling_layers": 1, "hidden_channels": 4, "bottleneck_dim": 2, "pre_trained": False}


def small_backbone(name: str, arguments: dict, folder: Path, trained_at: tuple[int, int] | None = None) -> str:
    """Write a folder for `local-dir:` with a smaller network of this kind, and weights for images of a size."""
    cfg = timm.get_pretrained_cfg(name).to_dict()
    kept = ("input_size", "fixed_input_size", "mean", "std", "first_conv", "classifier", "num_classes")
    pretrained = {key: cfg[key] for key in kept}
    state = {}
    if trained_at:
        torch.manual_seed(0)
        pretrained["input_size"] = (3, *trained_at)
        sized = {"img_size": trained_at} if cfg["fixed_input_size"] else {}
        state = timm.create_model(name, **sized, **arguments).state_dict()
    config = {"architecture": name, "num_classes": cfg["num_classes"], "model_args": arguments}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pretrained}))
    save_file({key: value.clone() for key, value in state.items()}, folder / "model.safetensors")
    return f"{LOCAL_DIR}{folder}"


def model(kind: str, name: str, size: tuple[int, int]) -> FeatureMapFlowModel | EmbeddingFlowModel:
    torch.manual_seed(0)
    if kind == "maps":
        return FeatureMapFlowModel(name, image_size=size, layout_dims=1, **SMALL)
    return EmbeddingFlowModel(name, None, size, modes=1, **SMALL)


def settle(network: nn.Module, images: torch.Tensor) -> None:
    """Give batch norms statistics to divide by, without which random weights blow a signal up or let it die."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = None
    with torch.no_grad():
        network(images)
    for norm in norms:
        norm.eval()


def lit_corners(size: tuple[int, int]) -> torch.Tensor:
    """Noise, and the same with a bright corner: upper right, lower left."""
    images = (0.2 * torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))).repeat(3, 1, 1, 1)
    height, width = size[0] // 4, size[1] // 4
    images[1, :, :height, -width:] += 3
    images[2, :, -height:, :width] += 3
    return images


def moved_corners(maps: torch.Tensor) -> list[str]:
    """Name the quarter of the map that each bright corner moves most."""
    moves = (maps[1:] - maps[:1]).abs().sum(1)
    height, width = moves.shape[1] // 2, moves.shape[2] // 2
    quarters = {
        "upper left": moves[:, :height, :width],
        "upper right": moves[:, :height, -width:],
        "lower left": moves[:, -height:, :width],
        "lower right": moves[:, -height:, -width:],
    }
    means = torch.stack([quarter.mean((1, 2)) for quarter in quarters.values()], dim=1)
    return [list(quarters)[place] for place in means.argmax(1)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bright_corner_of_the_image_is_one_of_the_map(name, tmp_path):
    size, smaller = FAMILIES[name]
    backbone = small_backbone(name, smaller, tmp_path) if smaller else name
    images = lit_corners(size)
    for kind in ("maps", "embedding"):
        network = model(kind, backbone, size)
        settle(network.backbone if kind == "maps" else network.embedding.network, images)
        with torch.no_grad():
            layers = network.extract(images)
        # The layer of stride 16: those that are coarser do not say in which corner.
        shown = [layer.top for layer in network.layers] if kind == "maps" else [False, True, *[False] * len(layers[2:])]
        maps = [layer for layer, top in zip(layers, shown, strict=True) if top][-1]
        assert moved_corners(maps) == ["upper right", "lower left"], kind


SWIN, DINO, HIERA = "swin_tiny_patch4_window7_224", "vit_small_patch14_reg4_dinov2", "hiera_tiny_224"


@pytest.mark.parametrize("name", [SWIN, DINO, HIERA])
def test_both_ways_to_maps_agree_and_pooled_features_are_those_of_the_network(name, tmp_path):
    size, smaller = FAMILIES[name]
    backbone = small_backbone(name, smaller, tmp_path, size)
    images = torch.rand(2, 3, *size)
    layers = [0, -1]  # an early one, behind which some networks would stop, and the last one
    both = PooledAndMaps(backbone, layers)
    pooled, *maps = run_backbone(both, images)
    torch.testing.assert_close(pooled, both.network(images))
    (early, _) = run_backbone(PooledAndMaps(backbone, layers[:1]), images)
    torch.testing.assert_close(early, pooled)
    for layer, other in zip(run_backbone(create_feature_maps(backbone, layers), images), maps, strict=True):
        torch.testing.assert_close(layer, other)


def test_both_detectors_choose_the_same_layer_by_stride():
    expected = {
        "tf_efficientnet_lite0": "blocks.4",
        "resnet18": "layer3",
        "vit_tiny_patch16_224": "blocks.11",
        "vit_base_patch32_224": "blocks.11",  # stride 32 is the finest
        "crossvit_tiny_240": "blocks.2",  # strides 12 and 17
        "coat_lite_tiny": "serial_blocks3",
    }
    assert {name: default_layers(name) for name in expected} == {name: [layer] for name, layer in expected.items()}
    chosen = model("maps", "test_efficientnet", (64, 64))
    layers = ("blocks.2", "blocks.3"), ("blocks.4",)
    named = FeatureMapFlowModel("test_efficientnet", *layers, (64, 64), layout_dims=1, **SMALL)
    named.load_state_dict(chosen.state_dict())
    assert default_layers("test_efficientnet") == ["blocks.3"]
    assert [layer.name for layer in chosen.layers if layer.top] == list(layers[0])
    assert [layer.name for layer in chosen.layers if layer.whole] == list(layers[1])


def test_checkpoints_of_named_layers_and_of_none_are_alike():
    arguments = {"backbone": "test_efficientnet", "image_size": (64, 64), "layout_dims": 1, **SMALL}
    named = FeatureMapFlow(map_layers=("blocks.2", "blocks.3"), score_layers=("blocks.4",), **arguments)
    none = FeatureMapFlow(**arguments)
    none.load_state_dict(named.state_dict())
    assert named.hparams["map_layers"] == ("blocks.2", "blocks.3")


def test_layers_of_branches_have_names_of_their_own():
    fine, coarse = [f"blocks.{number}" for number in range(3)], [f"blocks.{number}#2" for number in range(3)]
    assert feature_layers("crossvit_tiny_240") == dict.fromkeys(fine, 12) | dict.fromkeys(coarse, 17)
    network = create_feature_maps("crossvit_tiny_240", ["blocks.2", "blocks.0#2"], pre_trained=False)
    maps = run_backbone(network, torch.zeros(1, 3, 240, 240))
    assert [tuple(layer.shape) for layer in maps] == [(1, 96, 20, 20), (1, 192, 14, 14)]


@pytest.mark.parametrize(
    ("create", "name", "size", "message"),
    [
        (
            create_feature_maps,
            DINO,
            (230, 230),
            r"patches of 14 x 14 do not cover 230 x 230\). .* 224 x 224, 238 x 238",
        ),
        (PooledAndMaps, "convit_tiny", (96, 128), r"takes no images of 96 x 128 pixels \(.* 96 x 96, .* or 224 x 224"),
        (PooledAndMaps, "tresnet_m", (225, 225), r"takes no images of 225 x 225 pixels \(.* image_size to 224 x 224"),
        (create_feature_maps, "halonet26t", (224, 224), r"takes no images of 224 x 224 pixels \(.* or 256 x 256"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_some_that_do(create, name, size, message):
    with pytest.raises(ValueError, match=message):
        create(name, None, image_size=size)  # with weights, which nobody has asked for yet


@pytest.mark.parametrize("create", [create_feature_maps, PooledAndMaps])
def test_a_size_is_checked_once(create, tmp_path, monkeypatch):
    """A benchmark builds the same detector many times; a folder may have other files by then."""
    built = []
    timms = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: built.append(args) or timms(*args, **kwargs))
    times = []
    for name in ("test_resnet", small_backbone("test_resnet", {}, tmp_path)):
        for _ in range(3):
            built.clear()
            create(name, ["layer1"], pre_trained=False, image_size=(40, 56))
            times.append(len(built))
    assert times[1:3] == [1, 1]
    assert times[4:] == [2, 2]


def test_a_transformer_is_built_for_the_size_of_the_images(tmp_path):
    backbone = small_backbone(DINO, FAMILIES[DINO][1], tmp_path, (518, 518))
    for create in (create_feature_maps, PooledAndMaps):
        *_, layer = run_backbone(create(backbone, image_size=(224, 238)), torch.rand(1, 3, 224, 238))
        assert layer.shape == (1, 48, 16, 17)


def test_weights_that_timm_cannot_resize_are_refused(tmp_path):
    backbone = small_backbone("cait_xxs24_224", FAMILIES["cait_xxs24_224"][1], tmp_path, (224, 224))
    with pytest.raises(ValueError, match="are for images of 224 x 224 pixels.*for 96 x 96. Set image_size to 224 x"):
        create_feature_maps(backbone, image_size=(96, 96))
    create_feature_maps(backbone, image_size=(224, 224))


def test_networks_without_maps_say_so(monkeypatch):
    create = timm.create_model

    def without_maps(name, *args, **kwargs):
        if kwargs.get("features_only"):
            raise RuntimeError("features_only not implemented for this network.")
        return create(name, *args, **kwargs)

    monkeypatch.setattr(timm, "create_model", without_maps)
    name = "test_vit2"  # which no other test asks for, so that nothing is remembered of it
    for kind in ("maps", "embedding"):
        with pytest.raises(ValueError, match="no feature maps out of .*'test_vit2'.*not implemented.*empty list of"):
            model(kind, name, (64, 64))
    pooled = EmbeddingFlowModel(name, [], (64, 64), modes=1, **SMALL)
    assert [part.shape for part in pooled.extract(torch.rand(2, 3, 64, 64))] == [(2, 64)]


def test_maps_in_an_unknown_layout_are_refused(monkeypatch):
    monkeypatch.setattr(backbones, "nhwc_to", lambda layer, _: layer)
    with pytest.raises(ValueError, match=r"the map of layer 'stages.2' is \(1, 6, 8, 48\), where 48 channels belong"):
        create_feature_maps("test_mambaout", pre_trained=False, image_size=(96, 128))


@pytest.mark.parametrize("name", [SWIN, DINO, "coat_lite_tiny"])  # the last one names a tensor twice
def test_saved_backbones_give_the_same_maps_and_take_other_sizes(name, tmp_path):
    size, smaller = FAMILIES[name]
    backbone = small_backbone(name, smaller, tmp_path / "weights", size)
    saved = f"{LOCAL_DIR}{save_local(backbone, tmp_path / 'saved')}"
    images, turned = lit_corners(size), size[::-1]
    for create in (create_feature_maps, PooledAndMaps):
        for one, other in zip(*(run_backbone(create(each), images) for each in (saved, backbone)), strict=True):
            torch.testing.assert_close(one, other)
        *_, layer = run_backbone(create(saved, image_size=turned), lit_corners(turned))
        assert moved_corners(layer) == ["upper right", "lower left"]


def test_networks_for_grey_images_take_rgb(tmp_path):
    torch.manual_seed(0)
    grey = timm.create_model("test_resnet", in_chans=1, num_classes=0).eval()
    backbone = small_backbone("test_resnet", {}, tmp_path / "grey")
    config = json.loads((tmp_path / "grey" / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [1, 64, 64], "mean": [0.4], "std": [0.2]}
    (tmp_path / "grey" / "config.json").write_text(json.dumps(config))
    state = timm.create_model("test_resnet", in_chans=1).state_dict() | grey.state_dict()
    save_file(state, tmp_path / "grey" / "model.safetensors")
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        expected = grey(images)
    for name in (backbone, f"{LOCAL_DIR}{save_local(backbone, tmp_path / 'saved')}"):
        network = create_backbone(name, num_classes=0)
        torch.testing.assert_close(network(images.expand(-1, 3, -1, -1)), expected, rtol=1e-4, atol=1e-5)
        normalised = backbone_pre_processor(name).transform(images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(normalised[:, :1], (images - 0.4) / 0.2)


class Extract(nn.Module):
    """What a detector extracts, as a module of its own."""

    def __init__(self, detector: FeatureMapFlowModel | EmbeddingFlowModel) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.detector.extract(images)


@pytest.mark.filterwarnings("ignore")  # of the exporter's own code
@pytest.mark.parametrize(("kind", "name"), [("maps", "test_efficientnet"), ("maps", SWIN), ("embedding", DINO)])
def test_exported_backbones_agree(kind, name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is the extra anomalib-flowood[export]")
    pytest.importorskip("onnxscript", reason="ONNX export is the extra anomalib-flowood[export]")
    size, smaller = FAMILIES[name]
    backbone = small_backbone(name, smaller, tmp_path) if smaller else name
    network = Extract(model(kind, backbone, size))
    path = tmp_path / "model.onnx"
    torch.onnx.export(network, (torch.rand(2, 3, *size),), path, dynamo=True, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(str(path))
    images = lit_corners(size)[1:]
    with torch.no_grad():
        expected = network(images)
    for ours, theirs in zip(session.run(None, {session.get_inputs()[0].name: images.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
