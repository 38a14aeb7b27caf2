# SPDX-License-Identifier: Apache-2.0
"""What timm knows of a backbone by its name, without its weights.

A backbone is named by

- any timm name (``resnet18``, ``vit_small_patch14_dinov2.lvd142m``);
- ``local-dir:FOLDER``: a folder with ``config.json`` and weights, as timm and
  :func:`~anomalib_flowood.features.save_local` write it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model, list_models, list_pretrained

from anomalib_flowood.names import unknown_name

LOCAL_DIR = "local-dir:"

_STRIDE = 16
"""Maps at this stride still say what is where, and no longer what every edge looks like."""


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
        _check_description(folder / "config.json")
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


def _check_description(path: Path) -> None:
    """Refuse a folder's ``config.json`` that names no network."""
    remedy = "`flowood backbone` writes such a file."
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are no text
        msg = f"{path} is not valid JSON in UTF-8 ({error}). {remedy}"
        raise ValueError(msg) from error
    architecture = description.get("architecture") if isinstance(description, dict) else None
    if not isinstance(architecture, str) or not is_model(architecture):
        has = f"its architecture is {architecture!r}" if architecture else "it has no architecture"
        msg = f"{path} describes no network that timm knows: {has}. {remedy}"
        raise ValueError(msg)


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
def backbone_config(name: str) -> dict[str, Any]:
    """Return how a backbone was trained: timm's ``pretrained_cfg``, with ``mean``, ``std`` and ``input_size``.

    Raises:
        ValueError: If the name is unknown.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
    """
    try:
        with torch.device("meta"):  # Only the configuration is wanted: no weights are made.
            config: Any = timm.create_model(name, pretrained=False).pretrained_cfg
        _ = config["mean"], config["std"], tuple(config["input_size"])
        return config
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if not name.startswith(LOCAL_DIR):
            raise
        path = Path(name.removeprefix(LOCAL_DIR), "config.json")
        reason = f"{type(error).__name__}: {error}"
        msg = f"timm builds nothing from {path} ({reason}). `flowood backbone` writes such a file."
        raise ValueError(msg) from error


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


def default_layers(name: str, strides: Sequence[int] = (_STRIDE,)) -> list[str]:
    """Return the layers that detectors take when they are told none: for each stride the last layer of it or less.

    Where none is as fine, it is the last one of those that are finest.

    Raises:
        ValueError: If the name is unknown, or timm cannot take maps out of this network.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
    """
    known = feature_layers(name)
    most = [max(stride, min(known.values())) for stride in strides]
    chosen = {[layer for layer in known if known[layer] <= stride][-1] for stride in most}
    return [layer for layer in known if layer in chosen]


def layer_indices(name: str, layers: Sequence[str | int] | None) -> list[int]:
    """Return the places of layers among :func:`feature_layers`, in order.

    Raises:
        ValueError: If the name or a layer is unknown, or a layer is named twice.
        FileNotFoundError: If a ``local-dir:`` folder lacks ``config.json`` or weights.
    """
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


def size_of(name: str) -> tuple[int, int]:
    """Return height and width of the images that a backbone was trained on; errors as for :func:`backbone_config`."""
    height, width = backbone_config(name)["input_size"][-2:]
    return height, width


def pixels(size: Sequence[int]) -> str:
    """Spell a height and a width."""
    return f"{size[0]} x {size[1]}"
