# SPDX-License-Identifier: Apache-2.0
"""What a detector can do beyond scoring images. Who wants it asks for it, and for no class.

=====================  ==============================================  ===========================================
capability             a detector has it if                            who asks
=====================  ==============================================  ===========================================
:func:`reads_pixels`   its torch model says so: ``reads_pixels``       ``explain`` (latents), scores of pixels,
                                                                       checks of exports
:func:`couples`        it reads pixels, and its flow has couplings     ``explain`` (layers, co-adaptation)
:func:`draws`          its torch model has a method ``draw``           ``explain`` (samples)
:func:`embeds`         its torch model has a method ``embed``          ``explain`` (the nearest images)
:func:`takes_scores`   it has an argument ``score``                    ``flowood score``
``images_at_once``     it is a :class:`FlowModule`, or says so itself  ``flowood predict``
``readable_since``     it is a :class:`FlowModule`, or says so itself  whatever opens a checkpoint
=====================  ==============================================  ===========================================
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol, TypeGuard

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor

from anomalib_flowood.flows import AffineCoupling


class PixelDensity(Protocol):
    """A torch model with a flow on dequantised pixels, whose latents have the shape of an image."""

    flow: InvertibleModule

    def pixels(self, images: Tensor) -> Tensor:
        """Check pre-processed images, ``(N, 3, H, W)``, and bring them to the flow's channels, ``(N, C, H, W)``."""
        ...

    def log_prob(self, images: Tensor, *, noisy: bool = False) -> Tensor:
        """Log-density of images, nats, ``(N,)``; dequantised with noise, or with its mean."""
        ...


class Draws(Protocol):
    """A torch model that images can be drawn from."""

    def draw(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images, ``(n, C, H, W)``, not clamped to [0, 1], from latents of so large a standard deviation."""
        ...


class Embeds(Protocol):
    """A torch model that turns an image into a vector, near those of images that show the same."""

    def embed(self, images: Tensor) -> Tensor:
        """Embed pre-processed images, ``(N, C, H, W)``, as vectors, ``(N, D)``, to be compared by their cosine."""
        ...


def reads_pixels(model: Any) -> TypeGuard[PixelDensity]:
    """Whether a torch model is a density of dequantised pixels."""
    return model.reads_pixels


def couples(model: Any) -> TypeGuard[PixelDensity]:
    """Whether a torch model is a density of dequantised pixels by coupling layers."""
    return reads_pixels(model) and any(isinstance(module, AffineCoupling) for module in model.flow.modules())


def scales(model: Any) -> TypeGuard[PixelDensity]:
    """Whether its coupling layers also scale values, and do not only shift them."""
    couplings = [module for module in model.flow.modules() if isinstance(module, AffineCoupling)]
    return couples(model) and any(coupling.scale is not None for coupling in couplings)


def draws(model: Any) -> TypeGuard[Draws]:
    """Whether images can be drawn from a torch model."""
    return callable(getattr(model, "draw", None))


def embeds(model: Any) -> TypeGuard[Embeds]:
    """Whether a torch model embeds images."""
    return callable(getattr(model, "embed", None))


def takes_scores(detector: type) -> bool:
    """Whether a class of detectors is built with whatever score is named."""
    return "score" in inspect.signature(detector).parameters
