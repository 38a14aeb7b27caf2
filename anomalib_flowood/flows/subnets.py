# SPDX-License-Identifier: Apache-2.0
"""s,t-networks of coupling layers.

Each maps ``(N, channels_in, *size)`` to ``(N, channels_out, *size)`` and ends in a layer that starts at zero, so that
a fresh coupling is the identity (Kingma and Dhariwal 2018, section 3.3).
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from anomalib_flowood.names import unknown_name

if TYPE_CHECKING:
    from .couplings import SubnetConstructor

SUBNETS = ("bottleneck", "mlp", "resnet")


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
        layers.append(_start_at_zero(nn.Linear(width, channels_out * positions)))
        self.layers = nn.Sequential(*layers)
        self.out_shape = (channels_out, *size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels_in, *size)`` to ``(N, channels_out, *size)``."""
        return self.layers(x.flatten(1)).unflatten(1, self.out_shape)


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


class Bottleneck(FullyConnected):
    """Fully connected network that squeezes its input to a few numbers (Kirichenko et al. 2020, section 6.2).

    With no room for pixel-wise structure, the network has to describe its input by what it shows.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        hidden_channels: Width of the layers before and after the squeeze.
        bottleneck_dim: Numbers that pass the squeeze; the paper's K.
        size: Spatial size of input and output; empty for flat vectors.

    Raises:
        ValueError: If the squeeze is no narrower than the input.
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
        values = channels_in * math.prod(size)
        if bottleneck_dim >= values:
            msg = f"bottleneck_dim={bottleneck_dim} squeezes nothing: the network's input has {values} values."
            raise ValueError(msg)
        super().__init__(
            channels_in, channels_out, widths=(hidden_channels, bottleneck_dim, hidden_channels), size=size
        )


class ResNet(nn.Module):
    """Convolutional residual network, without normalisation (after Dinh et al. 2017, section 3.6).

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        hidden_channels: Channels inside.
        num_blocks: Residual blocks of two 3×3 convolutions each.
    """

    def __init__(self, channels_in: int, channels_out: int, *, hidden_channels: int, num_blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels_in, hidden_channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
            )
            for _ in range(num_blocks)
        )
        self.head = nn.Sequential(nn.ReLU(), _start_at_zero(nn.Conv2d(hidden_channels, channels_out, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels_in, H, W)`` to ``(N, channels_out, H, W)``."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def subnet_constructor(
    name: str,
    *,
    hidden_channels: int,
    bottleneck_dim: int,
    size: tuple[int, ...] = (),
) -> SubnetConstructor:
    """Return the constructor of an s,t-network, to be called with ``(channels_in, channels_out)``.

    Args:
        name: One of :data:`SUBNETS`.
        hidden_channels: Width of the hidden layers.
        bottleneck_dim: Numbers that pass the squeeze of ``bottleneck``; other networks have none.
        size: Spatial size of what the network sees; empty for flat vectors.

    Returns:
        A constructor that pickles.

    Raises:
        ValueError: If the name is unknown, a width is not positive, or ``resnet`` is asked for flat vectors.
    """
    if name not in SUBNETS:
        raise unknown_name("subnet", name, SUBNETS)
    for argument, value in (("hidden_channels", hidden_channels), ("bottleneck_dim", bottleneck_dim)):
        if value < 1:
            msg = f"{argument} must be at least 1, got {value}."
            raise ValueError(msg)
    if name == "resnet":
        if len(size) != 2:
            msg = "Subnet 'resnet' is convolutional and needs images; choose 'mlp' or 'bottleneck' for flat vectors."
            raise ValueError(msg)
        return partial(ResNet, hidden_channels=hidden_channels)
    if name == "mlp":
        return partial(Mlp, hidden_channels=hidden_channels, size=size)
    return partial(Bottleneck, hidden_channels=hidden_channels, bottleneck_dim=bottleneck_dim, size=size)


def _start_at_zero(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
