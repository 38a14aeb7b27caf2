# SPDX-License-Identifier: Apache-2.0
"""Frozen timm backbones that return feature maps, in one layout and at any image size that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import Format, PatchEmbed, nhwc_to
from torch import Tensor, nn

from anomalib_flowood.flows import full_precision
from anomalib_flowood.look import shorten

from .catalogue import LOCAL_DIR, feature_layers, layer_indices, pixels, size_of
from .folding import folded
from .weights import create_backbone

_STEPS = (14, 16, 28, 32, 48, 64, 224)
"""Image sizes whose multiples networks take: patches, windows of patches, and combinations of them."""

_CPU_CHUNK = 16
"""Images that go through a backbone at once on the CPU: more do not fit the caches, and 64 take twice the time."""

_taken: set[tuple[Any, ...]] = set()
"""Backbones with layers, and image sizes that they are known to take: a benchmark builds the same many times."""


def create_feature_maps(
    name: str,
    layers: Sequence[str | int] | None = None,
    *,
    pre_trained: bool = True,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Create a frozen backbone that returns feature maps, to be run by :func:`run_backbone`.

    Args:
        name: As for :func:`~anomalib_flowood.features.create_backbone`; a transformer's token grid counts as a map.
        layers: Layers by timm's module names (``blocks.4``, ``layer2``) or by their indices; by default
            :func:`~anomalib_flowood.features.default_layers`.
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
    indices = layer_indices(name, layers)
    if not indices:
        msg = f"layers must name at least one layer of {name}. Known: {', '.join(feature_layers(name))}."
        raise ValueError(msg)

    def build(size: tuple[int, int] | None, pre_trained: bool = False) -> Any:
        return create_backbone(
            name, pre_trained=pre_trained, image_size=size, features_only=True, out_indices=tuple(indices)
        )

    def check(network: Any, images: Tensor) -> None:
        _check_maps(run_backbone(network, images), network.feature_info.get_dicts())

    _check_size(name, ("maps", *indices), image_size, build, check)
    return build(image_size, pre_trained)


class PooledAndMaps(nn.Module):
    """A frozen backbone that returns its pooled features and some of its feature maps, from one pass.

    Args:
        name: As for :func:`~anomalib_flowood.features.create_backbone`; a transformer's token grid counts as a map.
        layers: Layers by timm's module names or by their indices, none for the pooled features alone; by default
            :func:`~anomalib_flowood.features.default_layers`.
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
        self.indices = layer_indices(name, layers)

        def build(size: tuple[int, int] | None, pre_trained: bool = False) -> Any:
            return create_backbone(name, pre_trained=pre_trained, image_size=size, num_classes=0)

        def check(network: Any, images: Tensor) -> None:
            if self.indices and not hasattr(network, "forward_intermediates"):
                msg = "timm takes no maps out of it beside its pooled features; set layers to an empty list"
                raise ValueError(msg)
            _, *maps = _pooled_and_maps(network, images, self.indices)
            _check_maps(maps, [network.feature_info[index] for index in self.indices])

        _check_size(name, ("pooled", *self.indices), image_size, build, check)
        self.network = build(image_size, pre_trained)
        self.pretrained_cfg: dict[str, Any] = self.network.pretrained_cfg

    @property
    def layer_names(self) -> list[str]:
        """The names of the layers whose maps are returned, in their order."""
        return [self.network.feature_info[index]["module"] for index in self.indices]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the pooled features, ``(N, D)``, and each layer's map, ``(N, C, h, w)``, in the network's order."""
        return _pooled_and_maps(self.network, images, self.indices)


@full_precision
def run_backbone(backbone: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Run a backbone in full precision, so that its features are the same everywhere, and as fast as possible.

    Args:
        backbone: From :func:`create_feature_maps`, or :class:`PooledAndMaps`.
        images: Images as the backbone wants them, ``(N, 3, H, W)``.

    Returns:
        The backbone's outputs, as a tuple: pooled features, ``(N, D)``, or maps, ``(N, C, h, w)``, or both.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    if torch.compiler.is_compiling():  # runtimes fold the batch norms of exported graphs themselves
        return _outputs(backbone, images)
    backbone = folded(backbone, images)
    if images.device.type != "cpu":
        return _outputs(backbone, images)
    chunks = [_outputs(backbone, chunk) for chunk in images.split(_CPU_CHUNK)]
    return tuple(torch.cat(outputs) for outputs in zip(*chunks, strict=True))


def _outputs(backbone: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    output = backbone(images)
    if isinstance(output, Tensor):
        return (output,)
    # timm's feature extractors say which layout their maps have; other networks were asked for NCHW.
    if getattr(backbone, "output_fmt", Format.NCHW) == Format.NHWC:
        return tuple(nhwc_to(layer, Format.NCHW) for layer in output)
    return tuple(output)


def _pooled_and_maps(network: Any, images: Tensor, indices: list[int]) -> list[Tensor]:
    if not indices:
        return [network(images)]
    # To the end: some networks would otherwise stop at the last of these layers, and pool its output.
    last, maps = network.forward_intermediates(images, indices=indices, output_fmt="NCHW", stop_early=False)
    return [network.forward_head(last), *maps]


def _check_maps(maps: Sequence[Tensor], infos: Sequence[dict[str, Any]]) -> None:
    """Check that maps are ``(N, C, h, w)``, with the number of channels that timm states for their layers."""
    for layer, info in zip(maps, infos, strict=True):
        if layer.ndim != 4 or layer.shape[1] != info["num_chs"]:
            msg = (
                f"the map of layer {info['module']!r} is {tuple(layer.shape)}, where {info['num_chs']} channels belong"
            )
            raise ValueError(msg)


def _check_size(
    name: str,
    outputs: tuple[str | int, ...],
    image_size: tuple[int, int] | None,
    build: Callable[[tuple[int, int]], nn.Module],
    check: Callable[[nn.Module, Tensor], None],
) -> None:
    """Check that a network takes images of a size before its weights are fetched, on meta tensors.

    Args:
        name: The backbone's name.
        outputs: What the network returns, and the indices of its layers. What has passed is not checked again, except
            for folders, whose files may change.
        image_size: Height and width; by default the size that the backbone was trained at.
        build: Makes the network for a size of images, with random weights.
        check: Runs the network on an image, and raises if its outputs are not as expected.

    Raises:
        ValueError: If it does not take them; the message names some sizes that it takes.
    """

    def problem(size: tuple[int, int]) -> str:
        try:
            with torch.device("meta"), torch.no_grad():
                network = build(size)
                for module in network.modules():
                    if isinstance(module, PatchEmbed) and not getattr(module, "dynamic_img_pad", False):
                        lengths, patch = module.img_size or size, module.patch_size
                        if any(length % side for length, side in zip(lengths, patch, strict=True)):
                            return f"patches of {pixels(patch)} do not cover {pixels(lengths)}"
                check(network, torch.zeros(1, 3, *size))
        except Exception as error:  # whatever a network's own code raises
            said = shorten(error, 160).rstrip(".")
            return said or f"timm's code raises {type(error).__name__}"
        return ""

    own = size_of(name)
    height, width = size = image_size or own
    asked = (name, outputs, height, width)
    if asked in _taken:
        return
    reason = problem((height, width))
    if not reason:
        if not name.startswith(LOCAL_DIR):
            _taken.add(asked)
        return
    near = {((height // step + up) * step, (width // step + up) * step) for step in _STEPS for up in (0, 1)}
    nearest = sorted(near - {own, (height, width)}, key=lambda other: abs(other[0] - height) + abs(other[1] - width))
    takes = [other for other in (own, *nearest) if min(other) and not problem(other)]
    if takes:
        *others, last = map(pixels, sorted(takes[:4]))
        offer = f"{', '.join(others)} or {last}" if others else last
        msg = f"The backbone {name!r} takes no images of {pixels(size)} pixels ({reason}). Set image_size to {offer}."
    else:
        msg = f"The backbone {name!r} does not work here: {reason}."
    raise ValueError(msg)
