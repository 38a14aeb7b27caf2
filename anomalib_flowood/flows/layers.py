# SPDX-License-Identifier: Apache-2.0
"""Invertible layers other than couplings: squeeze, factoring out, ActNorm, 1×1 convolution.

FrEIA's own do not fit: its squeeze is a convolution, which GPUs compute in reduced precision (TF32) by default, so that
a mere reordering would round; its ActNorm also initialises in evaluation and in the inverse direction, and a checkpoint
does not keep whether it has been initialised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import InvertibleModule
from torch import Tensor, distributed, nn
from torch.nn import functional

from .precision import full_precision

_CONSTANT = 1e-5
"""Standard deviation below which a channel counts as constant; half a grey level is about a hundred times as much."""


class Layer(InvertibleModule):
    """One tensor in, one tensor out.

    Args:
        dims_in: One shape.
        dims_c: FrEIA's convention; none are supported.

    Raises:
        ValueError: If there is more than one input, or a condition.
    """

    def __init__(self, dims_in: Iterable[tuple[int, ...]], dims_c: Iterable[tuple[int, ...]] | None = None) -> None:
        super().__init__(dims_in, dims_c)
        if len(self.dims_in) != 1 or self.dims_c:
            msg = f"{type(self).__name__} takes one input and no condition, got {self.dims_in} and {self.dims_c}."
            raise ValueError(msg)
        self.shape = tuple(self.dims_in[0])

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shape of the output, which is that of the input."""
        return input_dims

    def transform(self, x: Tensor, rev: bool) -> tuple[Tensor, Tensor | float]:
        """Transform ``x``, ``(N, ...)``, or undo it; also return the log-determinant of this direction."""
        raise NotImplementedError

    def forward(
        self,
        x_or_z: Iterable[Tensor],
        c: Iterable[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor], Tensor | float]:
        """Transform; see :class:`FrEIA.modules.InvertibleModule` for the convention."""
        del jac
        (x,) = x_or_z
        y, log_det = self.transform(x, rev, *(c or ()))
        return (y,), log_det


class _ImageLayer(Layer):
    """One image in, one image out.

    Args:
        dims_in: One image shape, ``[(C, H, W)]``.
        dims_c: FrEIA's convention; none are supported.

    Raises:
        ValueError: If there is more than one input, a condition, or the input is no image.
    """

    def __init__(self, dims_in: Iterable[tuple[int, ...]], dims_c: Iterable[tuple[int, ...]] | None = None) -> None:
        super().__init__(dims_in, dims_c)
        if len(self.shape) != 3:
            msg = f"{type(self).__name__} takes one image (C, H, W), got {self.dims_in}."
            raise ValueError(msg)


def _channels_of(x: Tensor) -> Tensor:
    """Blocks of 2 × 2 pixels as channels."""
    if _is_empty(x):
        return x.new_empty(0, 4 * x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    return functional.pixel_unshuffle(x, 2)


def _blocks_of(x: Tensor) -> Tensor:
    """Channels as blocks of 2 × 2 pixels."""
    if _is_empty(x):
        return x.new_empty(0, x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3])
    return functional.pixel_shuffle(x, 2)


def _is_empty(x: Tensor) -> bool:
    """Whether a batch is empty: PyTorch's pixel shuffles do not change the shape of an empty one (2.14)."""
    return not torch.compiler.is_compiling() and len(x) == 0


class Squeeze(_ImageLayer):
    """Turn blocks of 2 × 2 pixels into channels: ``(C, H, W)`` to ``(4 C, H / 2, W / 2)``.

    Source: Dinh et al. (2017), section 3.6. The four pixels of a channel become neighbouring channels, in reading
    order. Values are only reordered, so that the inverse is exact.

    Args:
        dims_in: One image shape, ``[(C, H, W)]``, of even height and width.
        dims_c: FrEIA's convention; none are supported.

    Raises:
        ValueError: If the input is no image, or its height or width is odd.
    """

    def __init__(self, dims_in: Iterable[tuple[int, ...]], dims_c: Iterable[tuple[int, ...]] | None = None) -> None:
        super().__init__(dims_in, dims_c)
        if self.shape[1] % 2 or self.shape[2] % 2:
            msg = f"Squeezing needs an even height and width, got the shape {self.shape}."
            raise ValueError(msg)

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return ``[(4 C, H / 2, W / 2)]``."""
        channels, height, width = input_dims[0]
        return [(4 * channels, height // 2, width // 2)]

    def transform(self, x: Tensor, rev: bool) -> tuple[Tensor, float]:
        """Reorder the pixels of ``x``, or put them back; the log-determinant is 0."""
        return _blocks_of(x) if rev else _channels_of(x), 0.0


class Unsqueeze(_ImageLayer):
    """Undo :class:`Squeeze`: ``(4 C, H, W)`` to ``(C, 2 H, 2 W)``.

    Args:
        dims_in: One image shape, ``[(4 C, H, W)]``.
        dims_c: FrEIA's convention; none are supported.

    Raises:
        ValueError: If the input is no image, or its number of channels is not a multiple of 4.
    """

    def __init__(self, dims_in: Iterable[tuple[int, ...]], dims_c: Iterable[tuple[int, ...]] | None = None) -> None:
        super().__init__(dims_in, dims_c)
        if self.shape[0] % 4:
            msg = f"Undoing a squeeze needs a multiple of 4 channels, got the shape {self.shape}."
            raise ValueError(msg)

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return ``[(C, 2 H, 2 W)]``."""
        channels, height, width = input_dims[0]
        return [(channels // 4, 2 * height, 2 * width)]

    def transform(self, x: Tensor, rev: bool) -> tuple[Tensor, float]:
        """Reorder the pixels of ``x``, or put them back; the log-determinant is 0."""
        return _channels_of(x) if rev else _blocks_of(x), 0.0


class FactorOut(_ImageLayer):
    """Send the first half of the channels through an inner flow; the other half is final.

    Source: Dinh et al. (2017), section 3.6. They remove the final half from the tensor; here it stays, so that latents
    keep the shape of the image and a multi-scale flow is used like any other.

    Args:
        dims_in: One image shape, ``[(C, H, W)]``, of at least two channels.
        fill: Called once with an empty flow on ``(C // 2, H, W)``, to which it appends layers; their output must
            have that shape, too.
        dims_c: FrEIA's convention; none are supported.

    Raises:
        ValueError: If there is one channel only, or the inner flow changes the shape.
    """

    def __init__(
        self,
        dims_in: Iterable[tuple[int, ...]],
        fill: Callable[[SequenceINN], None],
        dims_c: Iterable[tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(dims_in, dims_c)
        channels, *size = self.shape
        if channels < 2:
            msg = f"Factoring out needs at least 2 channels, got the shape {self.shape}."
            raise ValueError(msg)
        self.halves = (channels // 2, channels - channels // 2)
        self.inner = SequenceINN(self.halves[0], *size)
        fill(self.inner)
        if tuple(self.inner.shapes[-1]) != (self.halves[0], *size):
            msg = f"The inner flow turns {self.inner.shapes[0]} into {self.inner.shapes[-1]}; it must keep the shape."
            raise ValueError(msg)

    def transform(self, x: Tensor, rev: bool) -> tuple[Tensor, Tensor | float]:
        """Run the inner flow on half of the channels; its log-determinant is that of the layer."""
        inner, final = x.split(self.halves, dim=1)
        inner, log_det = self.inner(inner, rev=rev)
        return torch.cat((inner, final), dim=1), log_det


class ActNorm(_ImageLayer):
    """Shift and scale each channel, ``y = (x + b) exp(l)``, initialised so that the first batch comes out standardised.

    Source: Kingma and Dhariwal (2018), section 3.1. The initialisation happens once, in the first forward pass in
    training mode, and checkpoints keep it. Until then the layer is the identity. A channel that is constant over the
    first batch is shifted and keeps its scale.

    Args:
        dims_in: One image shape, ``[(C, H, W)]``.
        dims_c: FrEIA's convention; none are supported.

    Raises:
        ValueError: If the input is no image.
    """

    initialized: Tensor
    """Whether the layer has been initialised; a buffer."""
    _initialized_here = False
    """The same as a plain attribute: reading the buffer in every step would wait for the device."""

    def __init__(self, dims_in: Iterable[tuple[int, ...]], dims_c: Iterable[tuple[int, ...]] | None = None) -> None:
        super().__init__(dims_in, dims_c)
        self.bias = nn.Parameter(torch.zeros(self.shape[0], 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(self.shape[0], 1, 1))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        std, mean = _moments(x)
        self.bias.copy_(-mean.reshape(-1, 1, 1))
        self.log_scale.copy_(-torch.where(std > _CONSTANT, std, torch.ones_like(std)).log().reshape(-1, 1, 1))
        self.initialized.fill_(True)

    def _is_initialized(self) -> bool:
        self._initialized_here = self._initialized_here or bool(self.initialized)
        return self._initialized_here

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._initialized_here = False
        super()._load_from_state_dict(state_dict, prefix, *args)

    def transform(self, x: Tensor, rev: bool) -> tuple[Tensor, Tensor]:
        """Shift and scale ``x``, or undo it."""
        if self.training and not rev and len(x) and not self._is_initialized():
            self._initialize(x)
        log_det = (self.shape[1] * self.shape[2] * self.log_scale.sum()).expand(x.shape[0])
        if rev:
            return x * torch.exp(-self.log_scale) - self.bias, -log_det
        return (x + self.bias) * torch.exp(self.log_scale), log_det


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of each channel, ``(C,)``, over the batches of all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return torch.std_mean(x, dim=(0, 2, 3), correction=0)
    values = x.double().movedim(1, 0).flatten(1)
    sums = torch.cat([values.sum(1), values.square().sum(1), values.new_full((1,), values.shape[1])])
    distributed.all_reduce(sums)
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    return (square - mean.square()).clamp(min=0).sqrt().to(x), mean.to(x)


class InvertibleConv1x1(_ImageLayer):
    """Mix the channels by a learned matrix ``W = P L (U + diag(s))``, the same for every pixel.

    Source: Kingma and Dhariwal (2018), section 3.2, the LU parameterisation: ``P`` is a fixed permutation and the signs
    of ``s`` are fixed, so that ``W`` cannot become singular and ``log|det W| = sum log|s|`` costs nothing. ``W`` is
    initialised as a random rotation.

    Args:
        dims_in: One image shape, ``[(C, H, W)]``.
        dims_c: FrEIA's convention; none are supported.

    Raises:
        ValueError: If the input is no image.
    """

    permutation: Tensor
    sign: Tensor
    below: Tensor
    identity: Tensor

    def __init__(self, dims_in: Iterable[tuple[int, ...]], dims_c: Iterable[tuple[int, ...]] | None = None) -> None:
        super().__init__(dims_in, dims_c)
        identity = torch.eye(self.shape[0])
        below = torch.ones_like(identity).tril(-1)
        rotation, _ = torch.linalg.qr(torch.randn_like(identity))
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower * below)
        self.upper = nn.Parameter(upper * below.T)
        self.log_s = nn.Parameter(diagonal.abs().log())
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        # Determined by the shape, so kept out of checkpoints.
        self.register_buffer("below", below, persistent=False)
        self.register_buffer("identity", identity, persistent=False)

    def _triangles(self) -> tuple[Tensor, Tensor]:
        lower = self.lower * self.below + self.identity
        upper = self.upper * self.below.T + self.identity * (self.sign * self.log_s.exp())
        return lower, upper

    def weight(self) -> Tensor:
        """Return the matrix ``W``, ``(C, C)``."""
        lower, upper = self._triangles()
        return self.permutation @ lower @ upper

    def _inverse_weight(self) -> Tensor:
        lower, upper = self._triangles()
        inner = torch.linalg.solve_triangular(lower, self.permutation.T, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, inner, upper=True)

    @full_precision
    def transform(self, x: Tensor, rev: bool) -> tuple[Tensor, Tensor]:
        """Multiply the channels of ``x`` by ``W``, or by its inverse."""
        weight = self._inverse_weight() if rev else self.weight()
        # Not a convolution, which GPUs compute in reduced precision by default.
        y = (weight @ x.flatten(2)).unflatten(2, self.shape[1:])
        log_det = (self.shape[1] * self.shape[2] * self.log_s.sum()).expand(x.shape[0])
        return y, -log_det if rev else log_det
