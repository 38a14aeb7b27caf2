# SPDX-License-Identifier: Apache-2.0
"""Coupling layers as FrEIA invertible modules.

All of them are affine couplings (Dinh et al. 2017, equations 7 to 9) with the log-scale ``s = w * tanh(s_raw)`` of the
code of Kirichenko et al. (2020), where ``w`` is learned per channel::

    s_raw, t = subnet(values that feed the network)
    y = (x + t) * exp(s)    where the mask changes x,    y = x elsewhere
    log_det = sum of s over the changed values

or, without a scale (``s = 0``), the volume-preserving additive couplings of Dinh et al. (2015, "NICE", section 3.2):
``t = subnet(values that feed the network)`` and ``log_det = 0``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_flowood.names import check_known

from .layers import Layer
from .masks import MASKS, CouplingMask
from .precision import full_precision

_CLOCKWISE = (0, 1, 3, 2)
"""The quadrants clockwise from the top left, as indices in reading order."""

SCALES = ("tanh", "none")
"""Log-scales of a coupling by the names that users type: bounded by a learned weight, or none (additive couplings)."""

SubnetConstructor = Callable[[int, int], nn.Module]


def check_scale(scale: str) -> None:
    """Check that a name is one of :data:`SCALES`.

    Raises:
        ValueError: If it is not.
    """
    check_known("scale", [scale], SCALES)


class AffineCoupling(Layer):
    """Base class of the couplings: the scale, the s,t-network and the log-determinant.

    Args:
        dims_in: One shape, ``[(C, H, W)]`` or ``[(D,)]``, as FrEIA passes it.
        subnet_constructor: Called as ``subnet_constructor(channels_in, channels_out)``; the network has two output
            channels for each changed channel, one without a scale.
        dims_c: Shapes of conditions; FrEIA's convention, none are supported.
        channels: Number of channels that feed the network, and of channels that are changed; all by default.
        scale: One of :data:`SCALES`; ``none`` for an additive coupling.

    Raises:
        ValueError: If there is more than one input, there is a condition, or the scale is unknown.
    """

    scale: nn.Parameter | None
    """w, for each changed channel; ``None`` without a scale."""

    def __init__(
        self,
        dims_in: Iterable[tuple[int, ...]],
        subnet_constructor: SubnetConstructor,
        dims_c: Iterable[tuple[int, ...]] | None = None,
        channels: tuple[int, int] | None = None,
        scale: str = "tanh",
    ) -> None:
        super().__init__(dims_in, dims_c)
        check_scale(scale)
        fed, changed = channels or (self.shape[0], self.shape[0])
        scaled = scale != "none"
        self.subnet = subnet_constructor(fed, 2 * changed if scaled else changed)
        weight = nn.Parameter(torch.ones(changed, *[1] * (len(self.shape) - 1))) if scaled else None
        self.register_parameter("scale", weight)

    @classmethod
    def subnet_size(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial size of the network's input.

        Args:
            shape: ``(C, H, W)`` or ``(D,)``.

        Returns:
            ``(height, width)``; empty for vectors.
        """
        return shape[1:]

    def scale_and_shift(self, fed: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the s,t-network.

        Args:
            fed: The network's input, ``(N, C, ...)``.

        Returns:
            ``s`` (bounded by ``|w|``; zeros without a scale) and ``t``, each ``(N, C, ...)``.
        """
        # The log-determinant is exact whatever the network returns, so training may run the network in 16 bits. Scores
        # must not depend on the trainer's precision.
        network = self.subnet if self.training else self._exact_subnet
        out = network(fed).to(fed.dtype)
        if self.scale is None:
            return torch.zeros_like(out), out
        raw, shift = out.chunk(2, dim=1)
        return self.scale * torch.tanh(raw), shift

    @full_precision
    def _exact_subnet(self, fed: Tensor) -> Tensor:
        return self.subnet(fed)

    def couple(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """Transform the changed values.

        Args:
            x: Input, or output of the forward direction, ``(N, C, ...)``.
            rev: Undo the transformation.

        Returns:
            The transformed input, and the log-scales ``s`` of the forward direction, whose sum is its log-determinant;
            :meth:`spread` maps them to the positions of the values.
        """
        raise NotImplementedError

    def spread(self, s: Tensor) -> Tensor:
        """Put each log-scale at the position of the value that it scaled, and zero elsewhere.

        Args:
            s: Log-scales from :meth:`couple`.

        Returns:
            Tensor of the input's shape, ``(N, C, ...)``.
        """
        return s

    def transform(self, x: Tensor, rev: bool, *condition: Tensor) -> tuple[Tensor, Tensor]:
        """Transform the changed values of ``x``, ``(N, ...)``, or undo it."""
        y, s = self.couple(x, rev, *condition)
        log_det = s.flatten(1).sum(1)
        return y, -log_det if rev else log_det


class MaskedCoupling(AffineCoupling):
    """Affine coupling in the zero-masked form: the network sees the whole input, with zeros off the mask.

    The form of Kirichenko et al. (2020); works for every mask and every shape.

    Args:
        dims_in: One shape, ``[(C, H, W)]`` or ``[(D,)]``.
        mask: The two sides of the coupling, boolean tensors of that shape.
        subnet_constructor: Called as ``subnet_constructor(C, 2 * C)``; the network keeps the spatial size.
        dims_c: FrEIA's convention; none are supported.
        scale: One of :data:`SCALES`; with ``none`` the network has C output channels, not 2 C, as in the other forms.

    Raises:
        ValueError: If the mask does not fit the shape, or its sides overlap.
    """

    feed: Tensor
    change: Tensor

    def __init__(
        self,
        dims_in: Iterable[tuple[int, ...]],
        mask: CouplingMask,
        subnet_constructor: SubnetConstructor,
        dims_c: Iterable[tuple[int, ...]] | None = None,
        scale: str = "tanh",
    ) -> None:
        super().__init__(dims_in, subnet_constructor, dims_c, scale=scale)
        if mask.feed.shape != self.shape or mask.change.shape != self.shape:
            msg = f"The mask has the shape {tuple(mask.feed.shape)}, the input {self.shape}."
            raise ValueError(msg)
        if bool((mask.feed & mask.change).any()):
            msg = "A value cannot both feed the network and be changed: the layer would not be invertible."
            raise ValueError(msg)
        # Rebuilt from the configuration, so kept out of checkpoints.
        self.register_buffer("feed", mask.feed.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("change", mask.change.to(torch.get_default_dtype()), persistent=False)

    def couple(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """Transform the masked values; see :meth:`AffineCoupling.couple`."""
        s, t = self.scale_and_shift(x * self.feed)
        s, t = s * self.change, t * self.change
        return affine(x, s, t, rev), s


Form = TypeVar("Form", bound=type[AffineCoupling])


def native_form(mask: str) -> Callable[[Form], Form]:
    """Register a coupling as the native form of a mask: its network sees only the values that feed it, and no zeros.

    Args:
        mask: One of :data:`~anomalib_flowood.flows.MASKS`.

    Returns:
        Decorator of a class that is called with ``dims_in``, ``layer`` (index in the stack), ``subnet_constructor``
        and ``scale``, and changes the values that the mask of that layer changes.
    """

    def register(coupling: Form) -> Form:
        MASKS[mask].native = coupling
        return coupling

    return register


@native_form("channel")
class ChannelCoupling(AffineCoupling):
    """Affine coupling of the channel mask in its native form: the network sees only one half of the channels.

    As in the zero-masked form, even layers read the first ``C // 2`` channels and change the others, odd layers the
    other way round.

    Args:
        dims_in: One shape, ``[(C, H, W)]`` or ``[(D,)]``, of at least two channels.
        layer: Index of the layer in its stack.
        subnet_constructor: Called as ``subnet_constructor(channels_fed, 2 * channels_changed)``; the network keeps
            the spatial size.
        dims_c: FrEIA's convention; none are supported.
        scale: One of :data:`SCALES`.

    Raises:
        ValueError: If there is one channel only.
    """

    def __init__(
        self,
        dims_in: Iterable[tuple[int, ...]],
        layer: int,
        subnet_constructor: SubnetConstructor,
        dims_c: Iterable[tuple[int, ...]] | None = None,
        scale: str = "tanh",
    ) -> None:
        dims_in = list(dims_in)
        channels = dims_in[0][0]
        if channels < 2:
            msg = f"The channel mask needs at least 2 channels, got the shape {tuple(dims_in[0])}."
            raise ValueError(msg)
        halves = (channels // 2, channels - channels // 2)
        source, target = layer % 2, 1 - layer % 2
        super().__init__(dims_in, subnet_constructor, dims_c, (halves[source], halves[target]), scale)
        self.halves, self.source, self.target = halves, source, target

    def couple(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """Transform one half of the channels; see :meth:`AffineCoupling.couple`."""
        parts = list(x.split(self.halves, dim=1))
        s, t = self.scale_and_shift(parts[self.source])
        parts[self.target] = affine(parts[self.target], s, t, rev)
        return torch.cat(parts, dim=1), s

    def spread(self, s: Tensor) -> Tensor:
        """Put the log-scales of the changed half among all channels; see :meth:`AffineCoupling.spread`."""
        parts = [torch.zeros_like(s[:, :1]).expand(-1, length, *s.shape[2:]) for length in self.halves]
        parts[self.target] = s
        return torch.cat(parts, dim=1)


@native_form("cycle")
class QuadrantCoupling(AffineCoupling):
    """Affine coupling of the cycle mask in its native form: the network sees only one quadrant.

    As in the zero-masked form, layer ``k`` reads quadrant ``k % 4`` and changes the next one clockwise, at a quarter of
    the cost. Quadrants of odd-sized images are padded with zeros, at the bottom and the right, to a common size.

    Args:
        dims_in: One image shape, ``[(C, H, W)]``.
        layer: Index of the layer in its stack.
        subnet_constructor: Called as ``subnet_constructor(C, 2 * C)``; the network keeps the spatial size, which
            is :func:`quadrant_size`.
        dims_c: FrEIA's convention; none are supported.
        scale: One of :data:`SCALES`.

    Raises:
        ValueError: If the input is no image of at least 2 × 2 pixels.
    """

    def __init__(
        self,
        dims_in: Iterable[tuple[int, ...]],
        layer: int,
        subnet_constructor: SubnetConstructor,
        dims_c: Iterable[tuple[int, ...]] | None = None,
        scale: str = "tanh",
    ) -> None:
        super().__init__(dims_in, subnet_constructor, dims_c, scale=scale)
        if len(self.shape) != 3 or min(self.shape[1:]) < 2:
            msg = f"The cycle mask needs an image (C, H, W) of at least 2 x 2 pixels, got the shape {self.shape}."
            raise ValueError(msg)
        self.source, self.target = cycle_quadrants(layer)
        self.size = self.subnet_size(self.shape)

    @classmethod
    def subnet_size(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of a quadrant; see :meth:`AffineCoupling.subnet_size`."""
        return quadrant_size(*shape[1:])

    def couple(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """Transform one quadrant; see :meth:`AffineCoupling.couple`."""
        parts = split_quadrants(x)
        changed = parts[self.target]
        fed = pad_to(parts[self.source], self.size)
        s, t = (part[:, :, : changed.shape[2], : changed.shape[3]] for part in self.scale_and_shift(fed))
        parts[self.target] = affine(changed, s, t, rev)
        return join_quadrants(parts), s

    def spread(self, s: Tensor) -> Tensor:
        """Put the log-scales of the changed quadrant into the image; see :meth:`AffineCoupling.spread`."""
        top, left = (length // 2 * place for length, place in zip(self.shape[1:], divmod(self.target, 2), strict=True))
        return functional.pad(s, (left, self.shape[2] - left - s.shape[3], top, self.shape[1] - top - s.shape[2]))


def affine(x: Tensor, s: Tensor, t: Tensor, rev: bool) -> Tensor:
    """Scale and shift values, or undo it."""
    return x * torch.exp(-s) - t if rev else (x + t) * torch.exp(s)


def cycle_quadrants(layer: int) -> tuple[int, int]:
    """Return which quadrant a layer of the cycle mask reads, and which it changes, as indices in reading order."""
    return _CLOCKWISE[layer % 4], _CLOCKWISE[(layer + 1) % 4]


def split_quadrants(x: Tensor) -> list[Tensor]:
    """Split images, ``(N, C, H, W)``, into quadrants in reading order; of odd sizes the last ones are the larger."""
    # split and cat are each other's gradient; the gradient of each slice would be a whole image of zeros.
    heights, widths = ((length // 2, length - length // 2) for length in x.shape[2:])
    return [part for row in x.split(heights, dim=2) for part in row.split(widths, dim=3)]


def join_quadrants(parts: list[Tensor]) -> Tensor:
    """Undo :func:`split_quadrants`."""
    return torch.cat((torch.cat(parts[:2], dim=3), torch.cat(parts[2:], dim=3)), dim=2)


def pad_to(part: Tensor, size: tuple[int, ...]) -> Tensor:
    """Pad a quadrant with zeros, at the bottom and the right, to the common size."""
    height, width = size
    return functional.pad(part, (0, width - part.shape[3], 0, height - part.shape[2]))


def quadrant_size(height: int, width: int) -> tuple[int, int]:
    """Return the common (padded) size of the four quadrants of an image of ``height`` × ``width`` pixels."""
    return height - height // 2, width - width // 2
