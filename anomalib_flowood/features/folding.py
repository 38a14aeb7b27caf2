# SPDX-License-Identifier: Apache-2.0
"""Frozen networks made faster: batch norms are folded into convolutions, and inputs are not copied to be padded.

Batch norms take a fifth to a third of a backbone's time. Where convolutions pad as TensorFlow does, as in the default
backbone, padding takes another fifth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, get_same_padding
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)
"""Exactly these classes: subclasses may use their weights differently."""

_TOLERANCE = 1e-3
"""The largest difference, as a share of the largest number in an output. Rounding gives a hundredth of it, a wrong
fold many times as much."""


class _Folded(NamedTuple):
    """A folded network, and what it was made from: dictionaries of tensors, the tensors, and their versions."""

    network: nn.Module | None
    places: list[Mapping[str, Tensor | None]]
    tensors: list[tuple[Tensor, int]]

    @property
    def holds(self) -> bool:
        """Whether no tensor has been replaced, as by a move to another device, or written to, as by loading weights."""
        now = chain.from_iterable(place.values() for place in self.places)
        then = iter(self.tensors)
        return all(t is None or ((was := next(then))[0] is t and was[1] == _version(t)) for t in now)


_known: WeakKeyDictionary[nn.Module, _Folded] = WeakKeyDictionary()


@torch.no_grad()
def folded(network: nn.Module, images: Tensor) -> nn.Module:
    """Return an equivalent network without batch norms behind convolutions, and without padded copies.

    In evaluation a batch norm is an affine map of each channel, which the weights before it can absorb. Convolutions
    that pad one end more than the other pad both ends alike (:func:`_same`). The network itself, and its state, stay as
    they are. The returned network shares all other tensors with it, is compared with it on an image before it is used,
    and is rebuilt when weights have changed.

    Args:
        network: In evaluation mode; in training mode nothing is folded.
        images: Images of the size that the network is run on, ``(N, 3, H, W)``.

    Returns:
        The folded network, or ``network`` where nothing can be folded, or its ``forward`` was replaced.
    """
    if network.training or images.is_meta or "forward" in vars(network):  # a replaced one is to be called
        return network
    known = _known.get(network)
    if known is None or not known.holds:
        places: list[Mapping[str, Tensor | None]] = [
            place
            for module in network.modules()
            if type(module) in (*_CONVOLUTIONS, *_NORMS)
            for place in (module._parameters, module._buffers)
        ]
        tensors = [t for t in chain.from_iterable(place.values() for place in places) if t is not None]
        with torch.inference_mode(mode=False):  # its tensors could not be used where gradients are needed
            fold = _fold(network, images[:1].clone())
        known = _Folded(fold, places, [(t, _version(t)) for t in tensors])
        _known[network] = known
    return network if known.network is None else known.network


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for tensors of inference mode, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _fold(network: nn.Module, image: Tensor) -> nn.Module | None:
    """Fold the batch norms that can be folded; ``None`` if there are none, or the outputs for an image differ."""
    pairs, expected = _pairs(network, image)
    if not pairs:
        return None
    # A copy of the modules, not of their tensors.
    shared: dict[int, Any] = {id(t): t for t in chain(network.parameters(), network.buffers())}
    found = deepcopy(network, shared)
    for before, after in pairs:
        convolution: Any = found.get_submodule(before)
        norm: Any = found.get_submodule(after)
        convolution.weight, convolution.bias = _fused(convolution, norm)
        acts = [norm.drop, norm.act] if isinstance(norm, BatchNormAct2d) else []
        found.set_submodule(after, nn.Sequential(*acts))
    for module in found.modules():
        if type(module) is Conv2dSame and "forward" not in vars(module):  # as above
            vars(module)["forward"] = MethodType(_same, module)
    outputs = zip(_tensors(found(image)), expected, strict=True)
    close = all((ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max() for ours, theirs in outputs)
    return found if close else None


def _same(convolution: Conv2dSame, images: Tensor) -> Tensor:
    """Convolve with TensorFlow's padding, ``(N, C, H, W)`` to ``(N, C', H / stride, W / stride)``, rounded up.

    If the padding is odd, one more row or column belongs at the end, for which timm copies the whole input. Here both
    ends are padded by a stride more than the beginning needs, and the additional first row of output is left out. That
    copies the output instead, which is smaller by the square of the stride.
    """
    padding, first = [], []  # ``first``: rows of output to leave out
    axes = zip(images.shape[2:], convolution.kernel_size, convolution.stride, convolution.dilation, strict=True)
    for length, kernel, stride, dilation in axes:
        total = get_same_padding(length, kernel, stride, dilation)
        first.append(total % 2)
        padding.append(total // 2 + first[-1] * stride)
    weight, bias = convolution.weight, convolution.bias
    found = functional.conv2d(
        images, weight, bias, convolution.stride, tuple(padding), convolution.dilation, convolution.groups
    )
    rows, columns = first
    return found[:, :, rows:, columns:].clone() if any(first) else found  # a clone keeps the memory format


def _fused(convolution: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of the folded convolution, in the weight's memory format; computed in float64."""
    weight, bias = convolution.weight, convolution.bias
    of_norm = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    exact: Any = [part.cpu().double() if isinstance(part, Tensor) else part for part in (weight, bias, *of_norm)]
    fused = fuse_conv_bn_weights(*exact)
    new_weight, new_bias = (nn.Parameter(part.detach().to(weight), requires_grad=False) for part in fused)
    new_weight.data = torch.empty_like(weight).copy_(new_weight)  # empty_like keeps the memory format
    return new_weight, new_bias


def _pairs(network: nn.Module, image: Tensor) -> tuple[list[tuple[str, str]], list[Tensor]]:
    """Names of convolutions and of the batch norms that take their outputs, in pairs; and the network's outputs."""
    names = {module: name for name, module in network.named_modules()}
    modules = Counter(module for _, module in network.named_modules(remove_duplicate=False))
    calls: Counter[nn.Module] = Counter()
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # kept alive, so that no id is reused
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        if type(module) in _CONVOLUTIONS:
            outputs[id(output)] = (module, output)
        elif id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], module))

    # Not those with hooks, which are to see the original outputs.
    seen = [module for module in names if type(module) in (*_CONVOLUTIONS, *_NORMS) and not _hooked(module)]
    handles = [module.register_forward_hook(see) for module in seen]
    try:
        expected = _tensors(network(image))
    finally:
        for handle in handles:
            handle.remove()
    once = [pair for pair in pairs if all(calls[module] == modules[module] == 1 for module in pair)]
    kept = [(names[before], names[after]) for before, after in once if after.running_var is not None]
    return kept, expected


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)
