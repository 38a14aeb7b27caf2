# SPDX-License-Identifier: Apache-2.0
"""The pictures on the page, each for detectors that offer what it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anomalib_flowood.look import short_name
from anomalib_flowood.models.components import FlowModule
from anomalib_flowood.models.components.capabilities import (
    contributes,
    couples,
    draws,
    embeds,
    reads_pixels,
    views_layers,
)
from anomalib_flowood.models.components.capabilities import scales as has_scales

from .coupling_sections import coadaptations, latents, scales, shifts
from .direction_cases import direction_cases, embedded
from .images import spread
from .map_cases import map_cases
from .numbers import Scored
from .page import Picture
from .pictures import SHOWN_SETS, draw_histograms, draw_images

TEMPERATURES = (1.0, 0.8, 0.6)

_SAMPLES = 8
_WORST = 6
_NEAREST = 3
_SEED = 0


def histograms(detector: FlowModule, scored: list[Scored], folder: Path) -> Picture:
    """Draw the log-likelihoods of the sets."""
    shown = scored[:SHOWN_SETS]
    aurocs = {part.images.name: part.auroc(shown[0]) for part in shown[1:]}
    draw_histograms({part.images.name: part.log_prob for part in shown}, aurocs, folder / "histograms.png")
    caption = (
        f"Log-likelihoods of {shown[0].images.name} (inside, blue) against those of each outside set. A flow that "
        "knew what its training images show would put the outside sets to the left. AUROC 0.5: the score cannot tell "
        "them apart; below 0.5: outside images count as less anomalous than inside ones. Outliers are counted in the "
        "outermost bins."
    )
    if not detector.model.scores_are_likelihoods:
        caption += " AUROC is that of the detector's own image score, which is not this likelihood."
    return Picture("histograms.png", "Log-likelihood", caption)


def samples(detector: FlowModule, scored: list[Scored], folder: Path) -> Picture:
    """Draw images out of the density, beside real ones."""
    model: Any = detector.model
    inside = scored[0].images
    real = inside.images[spread(len(inside.images), _SAMPLES)]
    count = len(real)
    rows, beyond = {inside.name: real}, []
    for temperature in TEMPERATURES:
        drawn = model.draw(count, temperature, torch.Generator(detector.device).manual_seed(_SEED)).cpu()
        rows[f"T = {temperature:g}"] = drawn.clamp(0, 1)
        beyond.append(f"{float(((drawn < 0) | (drawn > 1)).float().mean()):.0%} (T = {temperature:g})")
    draw_images(rows, [""] * count, folder / "samples.png")
    caption = (
        f"Real images of {inside.name}, and samples of the flow with latents of standard deviation T, the same "
        f"latents in every row. Of the pixels, {', '.join(beyond)} were drawn beyond black or white, where the "
        "density reaches, too, and are shown black or white. Good samples do not make a good detector, nor do bad "
        "samples make a bad one."
    )
    return Picture("samples.png", "Samples", caption)


def nearest(detector: FlowModule, scored: list[Scored], folder: Path) -> Picture:
    """Draw the worst mistakes, and the inside images whose embeddings are nearest."""
    model: Any = detector.model

    inside, others = scored[0].images, scored[1:]
    score = torch.cat([part.score for part in others])
    place = torch.argsort(score, dim=0)[:_WORST]
    names = [part.images.name for part in others for _ in part.score]
    outside = torch.cat([part.images.images for part in others])[place]
    inputs = torch.cat([part.images.inputs for part in others])[place]
    nearest_to = (
        (embedded(detector, inputs) @ embedded(detector, inside.inputs).T)
        .topk(min(_NEAREST, len(inside.inputs)), dim=1)
        .indices
    )
    rows = {"outside": outside}
    rows |= {f"inside, nearest {rank + 1}": inside.images[nearest_to[:, rank]] for rank in range(nearest_to.shape[1])}
    headings = [f"{short_name(names[i], 18)}\nscore {score[i]:.2f}" for i in place.tolist()]
    draw_images(rows, headings, folder / "nearest.png")
    unit = " (−log p per dimension, nats)" if model.scores_are_likelihoods else ""
    caption = (
        f"The outside images that the detector rates worst: those with the lowest anomaly score{unit} of all. Below "
        f"each, the images of {inside.name} whose embeddings are nearest to its own by their cosine. What they have in "
        "common is what the embedding does not tell apart."
    )
    return Picture("nearest.png", "The worst mistakes and their nearest inside images", caption)


class Section(NamedTuple):
    """A picture that a detector gets if it offers what is needed.

    Attributes:
        doing: What is being done while it is drawn.
        needs: Whether a torch model offers it: one of :mod:`anomalib_flowood.models.components.capabilities`, or
            ``None`` for what every density has.
        draw: Draws into a folder.
        compares: Whether that takes normal images to compare with.
    """

    doing: str
    needs: Callable[[Any], bool] | None
    draw: Callable[..., Picture]
    compares: bool = False


def _embeds_and_contributes(model: Any) -> bool:
    return embeds(model) and contributes(model)


_SECTIONS = (
    Section("drawing histograms", None, histograms),
    Section("drawing latents", reads_pixels, latents),
    Section("drawing s", has_scales, scales),
    Section("drawing t", couples, shifts),
    Section("drawing co-adaptation", couples, coadaptations),
    Section("drawing samples", draws, samples),
    Section("looking for the nearest images", embeds, nearest),
    Section("taking scores apart by layers", views_layers, map_cases, compares=True),
    Section("taking scores apart by directions", _embeds_and_contributes, direction_cases, compares=True),
)


def sections_of(detector: FlowModule) -> list[Section]:
    """Return what is drawn of a detector, in the page's order."""
    return [section for section in _SECTIONS if section.needs is None or section.needs(detector.model)]
