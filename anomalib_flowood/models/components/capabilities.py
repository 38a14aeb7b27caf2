# SPDX-License-Identifier: Apache-2.0
"""What a detector can do beyond scoring images. Whoever needs one of these asks for it, and not for a class.

=====================  ==============================================  ===========================================
capability             a detector has it if                            who asks
=====================  ==============================================  ===========================================
:func:`reads_pixels`   its torch model says so: ``reads_pixels``       ``explain`` (latents), scores of pixels,
                                                                       checks of exports
:func:`couples`        it reads pixels, and its flow has couplings     ``explain`` (layers, co-adaptation)
:func:`draws`          its torch model has a method ``draw``           ``explain`` (samples)
:func:`embeds`         its torch model has a method ``embed``          ``explain`` (the nearest images)
:func:`views_layers`   its torch model has a method ``layer_views``    ``explain`` (layers, patches)
:func:`contributes`    its torch model has ``contributions``           ``explain`` (directions)
:func:`takes_scores`   it has an argument ``score``                    ``flowood score``
``images_at_once``     it is a :class:`FlowModule`, or says so itself  ``flowood predict``
``readable_since``     it is a :class:`FlowModule`, or says so itself  whatever opens a checkpoint
=====================  ==============================================  ===========================================
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeGuard

from FrEIA.modules import InvertibleModule
from torch import Tensor

from anomalib_flowood.flows import AffineCoupling
from anomalib_flowood.parsing import arguments_of


class PixelDensity(Protocol):
    """A torch model with a flow on dequantised pixels, whose latents have the shape of an image."""

    flow: InvertibleModule

    def pixels(self, images: Tensor) -> Tensor:
        """Check pre-processed images, ``(N, 3, H, W)``, and bring them to the flow's channels, ``(N, C, H, W)``."""
        ...

    def log_prob(self, images: Tensor) -> Tensor:
        """Log-density of images, nats, ``(N,)``, dequantised with the mean of the noise."""
        ...


class LayerView(NamedTuple):
    """What one layer of feature maps says about images.

    Attributes:
        name: The layer's.
        descriptors: What each position shows, to be compared by Euclidean distance, ``(N, D, h, w)``.
        whitened: How unlike normal images each position is: D independent numbers that are standard normal for normal
            images, ``(N, D, h, w)``.
        map: The layer's anomaly map in standard deviations of normal positions, ``(N, h, w)``.
        shares: Parts of the image score, ``(N,)`` each, by what they are of; those of all layers sum to the score.
        kind: The index of each image's kind, ``(N,)``, where normal images are of several; whitened numbers can then
            only be compared within a kind.
    """

    name: str
    descriptors: Tensor
    whitened: Tensor
    map: Tensor
    shares: dict[str, Tensor]
    kind: Tensor | None = None


class Contributions(NamedTuple):
    """What makes images unlikely, direction by direction.

    Attributes:
        names: Of the K directions.
        parts: The part of the embedding that each direction belongs to, K names.
        coordinates: Along the directions, in standard deviations of normal images, ``(N, K)``; NaN for the rest of a
            part, which is no single direction.
        nats: What each adds to −log p, up to a constant, ``(N, K)``.
        kind: The index of each image's kind, ``(N,)``, where each kind has directions of its own.
    """

    names: list[str]
    parts: list[str]
    coordinates: Tensor
    nats: Tensor
    kind: Tensor | None = None


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


def draws(model: Any) -> bool:
    """Whether images can be drawn from a torch model.

    ``draw(n, temperature, generator)`` returns images, ``(n, C, H, W)``, not clamped to [0, 1], from latents with the
    standard deviation ``temperature``.
    """
    return callable(getattr(model, "draw", None))


def embeds(model: Any) -> bool:
    """Whether a torch model turns images into vectors that lie near those of images which show the same.

    ``embed(images)`` takes pre-processed images, ``(N, C, H, W)``, and returns vectors, ``(N, D)``, to be compared by
    their cosine.
    """
    return callable(getattr(model, "embed", None))


def views_layers(model: Any) -> bool:
    """Whether the score of a torch model is made of what several layers say of the positions of an image.

    ``layer_views(images)`` takes pre-processed images, ``(N, C, H, W)``, and returns a list of :class:`LayerView`. A
    model may have the method, and say by an attribute ``views_layers`` that it cannot in its present configuration.
    """
    return callable(getattr(model, "layer_views", None)) and getattr(model, "views_layers", True)


def contributes(model: Any) -> bool:
    """Whether −log p of a torch model is a sum over directions.

    ``contributions(images)`` takes pre-processed images, ``(N, C, H, W)``, and returns :class:`Contributions`.
    """
    return callable(getattr(model, "contributions", None))


def takes_scores(detector: type) -> bool:
    """Whether a class of detectors is built with whatever score is named."""
    return "score" in arguments_of(detector)
