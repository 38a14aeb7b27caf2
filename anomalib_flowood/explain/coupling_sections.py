# SPDX-License-Identifier: Apache-2.0
"""Pictures of what the couplings of a flow on pixels do (Kirichenko et al. 2020, figures 2 and 3)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anomalib_flowood import flows
from anomalib_flowood.models.components import FlowModule
from anomalib_flowood.models.components.capabilities import PixelDensity

from .images import spread
from .numbers import CHUNK, Scored
from .page import Picture
from .pictures import SHOWN_SETS, draw_coadaptation, draw_latents, draw_layers

DRAWS = 40
"""Dequantisation draws over which latents are averaged (Kirichenko et al. 2020, figure 2)."""

_LATENTS_PER_SET = 4
_SEED = 0


def latents(detector: FlowModule, scored: list[Scored], folder: Path) -> Picture:
    """Draw images above their latents."""
    model: Any = detector.model
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.flow.modules())
    blocks = {}
    for part in scored[:SHOWN_SETS]:
        inputs = part.images.inputs[:CHUNK].to(detector.device)
        places = spread(len(inputs), _LATENTS_PER_SET)
        few = inputs[places]
        # Noise of a generator of its own: no other random number depends on a picture.
        noises = flows.dequantization_noise(model.pixels(few).shape[1:], DRAWS, _SEED)
        draws = torch.stack([_latents(model, few, noise) for noise in noises])
        latents = {"latent": _latents(model, few), f"mean of\n{DRAWS} draws": draws.mean(0)}
        if normalised:
            # A copy: training mode moves running statistics.
            latents["training\nmode"] = _latents(copy.deepcopy(model).train(), inputs)[places]
        blocks[part.images.name] = (part.images.images[places], latents)
    draw_latents(blocks, folder / "latents.png")
    caption = (
        f"Images, their latents, and the latents averaged over {DRAWS} draws of the dequantisation noise, which "
        "takes the noise out and leaves what the image puts into the latent. Edges of the image that show in its "
        "latent say that the flow transforms local structure, whatever it depicts, which makes outside images likely "
        "too. One colour scale for all latents"
        + (", mean over the colours" if model.pixels(few).shape[1] > 1 else "")
        + "."
    )
    if normalised:
        caption += " In training mode, batch norm uses the statistics of the set shown and not those of training."
    return Picture("latents.png", "Latents", caption)


def _latents(model: PixelDensity, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Latents, mean over the colours, ``(N, H, W)``; of images with the same noise, ``(C, H, W)``, or with its mean."""
    pixels = model.pixels(images)
    z, _ = model.flow(flows.dequantize(pixels, None if noise is None else noise.to(pixels)))
    return z.mean(1).cpu()


def scales(detector: FlowModule, scored: list[Scored], folder: Path) -> Picture:
    """Draw s of every layer, for an image from inside and one from outside."""
    del detector
    _draw_layers(scored, "s", folder / "scales.png")
    caption = (
        "The log-scales s of every coupling layer, y = (x + t)·exp(s), for one image from inside and one from outside, "
        "on one colour scale; grey where the layer changes nothing. Their sum enters the log-likelihood: red "
        "raises it. Layers that draw the outlines of both images respond to edges and not to what is shown."
    )
    return Picture("scales.png", "Scales s, layer by layer", caption)


def shifts(detector: FlowModule, scored: list[Scored], folder: Path) -> Picture:
    """Draw t of every layer, likewise."""
    del detector
    _draw_layers(scored, "t", folder / "shifts.png")
    caption = (
        "The shifts t of every coupling layer for the same images, likewise. A layer that reproduces the image itself, "
        "with its sign turned, knows the values that it should predict: the layer before has stored them in what it "
        "sees."
    )
    return Picture("shifts.png", "Shifts t, layer by layer", caption)


def _draw_layers(scored: list[Scored], symbol: str, path: Path) -> None:
    pair = scored[:2]
    maps = {}
    for part in pair:
        maps[part.images.name] = [_over_channels(getattr(record, symbol)[0], record.changed) for record in part.records]
    draw_layers({part.images.name: part.images.images[0] for part in pair}, maps, symbol, path)


def _over_channels(values: Tensor, changed: Tensor) -> Tensor:
    """Mean over the channels that are changed, NaN where none is: ``(C, h, w)`` to ``(h, w)``."""
    return ((values * changed).sum(0) / changed.sum(0)).cpu()


def coadaptations(detector: FlowModule, scored: list[Scored], folder: Path) -> Picture:
    """Draw the co-adaptation of every layer."""
    model: Any = detector.model
    shown = {part.images.name: part.coadaptation for part in scored[:SHOWN_SETS] if part.coadaptation}
    draw_coadaptation(shown, folder / "coadaptation.png")
    caption = (
        "How well each layer's −t predicts the values that it transforms: squared correlation over the transformed "
        "positions and images, the mean image taken out; 1 is a perfect prediction. Above, the transformed pixels come "
        "from another image, so that what the image shows elsewhere says nothing about them: what is predicted all "
        "the same, layers before have passed on. Below, on the images as they are: what an image shows elsewhere "
        "counts as well."
    )
    if any(isinstance(module, flows.InvertibleConv1x1) for module in model.flow.modules()):
        caption += " Above there is nothing here: 1×1 convolutions mix the pixels that a layer transforms with others."
    return Picture("coadaptation.png", "Co-adaptation", caption)
