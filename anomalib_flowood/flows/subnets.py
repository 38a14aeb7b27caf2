# SPDX-License-Identifier: Apache-2.0
"""s,t-networks of coupling layers.

Each maps ``(N, channels_in, *size)`` to ``(N, channels_out, *size)`` and ends in a layer that starts at zero, so that
a fresh coupling is the identity (Kingma and Dhariwal 2018, section 3.3). A subnet is one class, registered by
:func:`register_subnet` under the name that users type.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from anomalib_flowood.names import Registry, alternatives

if TYPE_CHECKING:
    from .couplings import SubnetConstructor


@dataclass(frozen=True)
class Subnet:
    """A registered s,t-network.

    Attributes:
        network: Its class.
        fully_connected: Whether it has separate weights for every position, and therefore also takes vectors; other
            networks are convolutional.
        arguments: The arguments of its constructor.
    """

    network: type[nn.Module]
    fully_connected: bool
    arguments: frozenset[str]

    @property
    def squeezes(self) -> bool:
        """Whether it has a bottleneck."""
        return "bottleneck_dim" in self.arguments


SUBNETS: Registry[Subnet] = Registry("subnet")
"""s,t-networks by the names that users type."""

Network = TypeVar("Network", bound=type[nn.Module])


def register_subnet(name: str, *, fully_connected: bool = False) -> Callable[[Network], Network]:
    """Register a class as an s,t-network.

    Args:
        name: The name that users type.
        fully_connected: Whether it has separate weights for every position of an image, and therefore also takes
            vectors.

    Returns:
        Decorator of a class that is called with ``channels_in``, ``channels_out`` and, by keyword, those arguments of
        :func:`subnet_constructor` that its signature names.

    Raises:
        ValueError: If another module has registered a subnet of that name.
    """

    def register(network: Network) -> Network:
        arguments = frozenset(inspect.signature(network).parameters)
        SUBNETS.add(name, Subnet(network, fully_connected, arguments), network)
        return network

    return register


def subnets_with(suits: Callable[[Subnet], bool]) -> str:
    """Return the names of the subnets that satisfy a predicate, joined for use in a sentence."""
    return alternatives(name for name, subnet in SUBNETS.items() if suits(subnet))


class FullyConnected(nn.Module):
    """Fully connected network over all channels and positions at once.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        widths: Sizes of the hidden layers, in order.
        size: Spatial size of input and output; empty for flat vectors.
    """

    def __init__(self, channels_in: int, channels_out: int, *, widths: tuple[int, ...], size: tuple[int, ...]) -> None:
        super().__init__()
        positions = math.prod(size)
        layers: list[nn.Module] = []
        width = channels_in * positions
        for hidden in widths:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        layers.append(start_at_zero(nn.Linear(width, channels_out * positions)))
        self.layers = nn.Sequential(*layers)
        self.out_shape = (channels_out, *size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels_in, *size)`` to ``(N, channels_out, *size)``."""
        return self.layers(x.flatten(1)).unflatten(1, self.out_shape)


@register_subnet("mlp", fully_connected=True)
class Mlp(FullyConnected):
    """Multi-layer perceptron with two hidden layers.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        hidden_channels: Width of the hidden layers.
        size: Spatial size of input and output; empty for flat vectors.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, hidden_channels: int, size: tuple[int, ...] = ()
    ) -> None:
        super().__init__(channels_in, channels_out, widths=(hidden_channels, hidden_channels), size=size)


@register_subnet("bottleneck", fully_connected=True)
class Bottleneck(FullyConnected):
    """Fully connected network that squeezes its input to a few numbers (Kirichenko et al. 2020, section 6.2).

    With no room for pixel-wise structure, the network has to describe its input semantically.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        hidden_channels: Width of the layers before and after the squeeze.
        bottleneck_dim: Width of the squeeze; the paper's K.
        size: Spatial size of input and output; empty for flat vectors.

    Raises:
        ValueError: If the squeeze is not narrower than the input.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        hidden_channels: int,
        bottleneck_dim: int,
        size: tuple[int, ...] = (),
    ) -> None:
        check_bottleneck(bottleneck_dim, channels_in * math.prod(size))
        super().__init__(
            channels_in, channels_out, widths=(hidden_channels, bottleneck_dim, hidden_channels), size=size
        )


@register_subnet("conv_bottleneck")
class ConvBottleneck(nn.Module):
    """Convolutional autoencoder with a code of a few numbers (Kirichenko et al. 2020, section 6.2).

    Two convolutions of stride 2, a linear layer to the code, one back, and two transposed convolutions. On large images
    it has far fewer weights than :class:`Bottleneck`.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        hidden_channels: Channels of the convolutions.
        bottleneck_dim: Length of the code; the paper's K.
        size: Spatial size of input and output, ``(H, W)``.

    Raises:
        ValueError: If the code is not shorter than the input.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, hidden_channels: int, bottleneck_dim: int, size: tuple[int, ...]
    ) -> None:
        super().__init__()
        check_bottleneck(bottleneck_dim, channels_in * math.prod(size))
        half = tuple((length + 1) // 2 for length in size)
        quarter = tuple((length + 1) // 2 for length in half)
        features = hidden_channels * math.prod(quarter)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels_in, hidden_channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, hidden_channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(features, bottleneck_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(bottleneck_dim, features),
            nn.ReLU(),
            nn.Unflatten(1, (hidden_channels, *quarter)),
            _upsampling(hidden_channels, hidden_channels, half),
            nn.ReLU(),
            start_at_zero(_upsampling(hidden_channels, channels_out, size)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels_in, H, W)`` to ``(N, channels_out, H, W)``."""
        return self.decoder(self.encoder(x))


def _upsampling(channels_in: int, channels_out: int, size: tuple[int, ...]) -> nn.ConvTranspose2d:
    """Transposed convolution to ``size`` from half of it, rounded up."""
    output_padding = (1 - size[0] % 2, 1 - size[1] % 2)
    return nn.ConvTranspose2d(channels_in, channels_out, 3, stride=2, padding=1, output_padding=output_padding)


class WeightNormConv2d(nn.Conv2d):
    """Convolution with weight normalisation: filters as length times direction (Salimans and Kingma 2016, equation 2).

    PyTorch's parametrisation of the same name neither pickles nor exports; this is an ordinary module. It cannot start
    at zero, where a filter has no direction.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        kernel_size: Height and width of the filters, odd; the spatial size is kept.
        bias: Whether to add a bias.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, *, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, kernel_size, padding=kernel_size // 2, bias=bias)
        self.gain = nn.Parameter(self._length().detach())

    def _length(self) -> Tensor:
        return torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels_in, H, W)`` to ``(N, channels_out, H, W)``."""
        return self._conv_forward(x, self.weight * (self.gain / self._length()), self.bias)


@register_subnet("resnet")
class ResNet(nn.Module):
    """Convolutional residual network of RealNVP (Dinh et al. 2017, section 3.6 and its code).

    Convolutions are weight-normalised, and every block's output also reaches the last layer through a skip
    connection.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        hidden_channels: Channels inside.
        num_blocks: Residual blocks of two 3×3 convolutions each.
        batch_norm: Whether there is batch normalisation before every convolution except those of the skip connections.
            In evaluation it uses the running statistics, so that an image's density does not depend on its batch.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        hidden_channels: int,
        num_blocks: int = 2,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else nn.Identity
        self.stem = nn.Sequential(norm(channels_in), WeightNormConv2d(channels_in, hidden_channels, 3))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                norm(hidden_channels),
                nn.ReLU(),
                # Batch normalisation would cancel a bias.
                WeightNormConv2d(hidden_channels, hidden_channels, 3, bias=not batch_norm),
                norm(hidden_channels),
                nn.ReLU(),
                WeightNormConv2d(hidden_channels, hidden_channels, 3),
            )
            for _ in range(num_blocks)
        )
        self.skips = nn.ModuleList(WeightNormConv2d(hidden_channels, hidden_channels, 1) for _ in range(num_blocks + 1))
        self.head = nn.Sequential(
            norm(hidden_channels), nn.ReLU(), start_at_zero(nn.Conv2d(hidden_channels, channels_out, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels_in, H, W)`` to ``(N, channels_out, H, W)``."""
        x = self.stem(x)
        total = self.skips[0](x)
        for block, skip in zip(self.blocks, self.skips[1:], strict=True):
            x = x + block(x)
            total = total + skip(x)
        return self.head(total)


@register_subnet("highway")
class Highway(nn.Module):
    """Convolutional highway network (Srivastava et al. 2015), with which Kirichenko et al. (2020) train Glow.

    Each block computes ``y = g h(x) + (1 - g) x`` with a convolution ``h``, where the gates ``g = sigmoid(conv(x))``
    are the only nonlinearity, as in the paper's code.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        hidden_channels: Channels inside.
        num_blocks: Highway blocks.
    """

    def __init__(self, channels_in: int, channels_out: int, *, hidden_channels: int, num_blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels_in, hidden_channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Conv2d(hidden_channels, 2 * hidden_channels, 3, padding=1) for _ in range(num_blocks)
        )
        self.head = start_at_zero(nn.Conv2d(hidden_channels, channels_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels_in, H, W)`` to ``(N, channels_out, H, W)``."""
        x = self.stem(x)
        for block in self.blocks:
            h, gate = block(x).chunk(2, dim=1)
            x = x + torch.sigmoid(gate) * (h - x)
        return self.head(x)


def subnet_constructor(
    name: str,
    *,
    hidden_channels: int,
    bottleneck_dim: int,
    size: tuple[int, ...] = (),
    num_blocks: int = 2,
    batch_norm: bool = False,
) -> SubnetConstructor:
    """Return the constructor of an s,t-network, to be called with ``(channels_in, channels_out)``.

    Args:
        name: One of :data:`SUBNETS`.
        hidden_channels: Width of the hidden layers.
        bottleneck_dim: Width of a bottleneck's squeeze; ignored by other networks.
        size: Spatial size of the network's input; empty for flat vectors.
        num_blocks: Blocks of ``resnet`` and ``highway``; ignored by other networks.
        batch_norm: Whether to use batch normalisation, which only ``resnet`` has.

    Returns:
        A constructor that pickles.

    Raises:
        ValueError: If the name is unknown, a number is not positive, a convolutional network is to take flat vectors,
            or a network without batch normalisation is to use it.
    """
    subnet = SUBNETS[name]
    numbers = {"hidden_channels": hidden_channels, "bottleneck_dim": bottleneck_dim, "num_blocks": num_blocks}
    for argument, value in numbers.items():
        if value < 1:
            msg = f"{argument} must be at least 1, got {value}."
            raise ValueError(msg)
    if batch_norm and "batch_norm" not in subnet.arguments:
        normalised = subnets_with(lambda other: "batch_norm" in other.arguments)
        msg = (
            f"Only subnet {normalised} has batch normalisation: leave batch_norm out, or choose it instead of {name!r}."
        )
        raise ValueError(msg)
    if not subnet.fully_connected and len(size) != 2:
        others = subnets_with(lambda other: other.fully_connected)
        msg = f"Subnet {name!r} is convolutional and needs images; choose {others} for flat vectors."
        raise ValueError(msg)
    arguments: dict[str, Any] = {**numbers, "size": size, "batch_norm": batch_norm}
    taken = {argument: value for argument, value in arguments.items() if argument in subnet.arguments}
    return partial(subnet.network, **taken)


def check_bottleneck(bottleneck_dim: int, values: int) -> None:
    """Check that a bottleneck is narrower than the network's input.

    Args:
        bottleneck_dim: Width of the squeeze.
        values: Number of values that feed the network.

    Raises:
        ValueError: If it is not.
    """
    if bottleneck_dim >= values:
        msg = f"bottleneck_dim={bottleneck_dim} squeezes nothing: the network's input has {values} values."
        raise ValueError(msg)


def start_at_zero(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    """Set a layer to zero: as the last one of an s,t-network, it makes the coupling start as the identity.

    Args:
        layer: The layer, changed in place.

    Returns:
        The layer.
    """
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
