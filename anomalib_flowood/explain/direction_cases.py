# SPDX-License-Identifier: Apache-2.0
"""Why images are outliers to a density of embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomalib_flowood.models.components import FlowModule
from anomalib_flowood.models.components.capabilities import Contributions

from .cases import Bar, Case, bars, choose, end_tiles, others, size, tile, within
from .images import ImageSet
from .numbers import CHUNK, Scored
from .page import Picture

_HEADING = "What makes it less likely than normal images"
_DIRECTIONS = 3
_NEAREST = 3


def direction_cases(detector: FlowModule, scored: list[Scored], normal: ImageSet, folder: Path) -> Picture:
    """Show, for single images, which parts and directions make them unlikely, and the normal images nearest to them."""
    del folder
    usual = _contributions(detector, normal.inputs)
    embeddings = embedded(detector, normal.inputs)
    unseen = _contributions(detector, scored[0].images.inputs)
    cases = []
    for chosen in choose(scored):
        own = _contributions(detector, chosen.inputs)
        compared = _of_its_kind(own, unseen, usual)
        excess = own.nats[0] - compared.nats.mean(0)
        parts: dict[str, float] = {}
        for part, along, nats in zip(own.parts, own.coordinates[0].isfinite().tolist(), excess.tolist(), strict=True):
            name = f"{part}: {'along' if along else 'beyond'} the directions in which training images differ"
            parts[name] = parts.get(name, 0.0) + nats
        similarity = (embedded(detector, chosen.inputs) @ embeddings.T)[0]
        similarity = torch.where(others(chosen, normal), similarity, -torch.inf)
        best = similarity.topk(min(_NEAREST, int(similarity.isfinite().sum())))
        tiles = [tile(chosen.image, "image")]
        tiles += [
            tile(normal.images[place], f"nearest normal, cosine {value:.3f}")
            for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        directions, numbers = _directions(own, usual, compared.coordinates, excess, normal)
        record = {"set": chosen.set, "score": chosen.score, "parts_nats": parts, "directions": numbers}
        record["nearest_cosine"] = best.values.tolist()
        cases.append(Case(chosen.title, tiles, _HEADING, bars(parts, " nats"), directions, record))
    caption = (
        "By how many nats of −log p each part of the embedding makes an image less likely than inside images are on "
        f"average; the {normal.name} images whose embeddings are nearest to its own; and the directions that add the "
        "most, with where the image is along them, where nine tenths of the inside images are, and the "
        f"{normal.name} images that are lowest and highest: what changes from one end to the other is what the "
        "direction stands for. Numbers along directions are standard deviations of training images."
    )
    if unseen.kind is not None:
        caption += " Directions, and the images that an image is compared with, are those of its kind of image."
    return Picture("", "Single images: why they are outliers", caption, cases)


def embedded(detector: FlowModule, inputs: Tensor) -> Tensor:
    """Embeddings of pre-processed images, of length 1, so that their product is the cosine."""
    model: Any = detector.model
    parts = [model.embed(chunk.to(detector.device)).cpu() for chunk in inputs.split(CHUNK)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def _contributions(detector: FlowModule, inputs: Tensor) -> Contributions:
    model: Any = detector.model
    parts = [model.contributions(chunk.to(detector.device)) for chunk in inputs.split(CHUNK)]
    coordinates, nats = (torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("coordinates", "nats"))
    kinds = [part.kind.cpu() for part in parts if part.kind is not None]
    return Contributions(parts[0].names, parts[0].parts, coordinates, nats, torch.cat(kinds) if kinds else None)


def _same_kind(some: Contributions, own: Contributions) -> Tensor:
    """Indices of the images of one image's kind, whose directions are its own."""
    everything = torch.arange(len(some.nats))
    return everything if some.kind is None or own.kind is None else everything[some.kind == own.kind]


def _of_its_kind(own: Contributions, *some: Contributions) -> Contributions:
    """The contributions of images of an image's own kind, out of the first set that has any."""
    for one in some:
        same = _same_kind(one, own)
        if len(same):
            return one._replace(coordinates=one.coordinates[same], nats=one.nats[same])
    return some[0]


def _directions(
    own: Contributions, usual: Contributions, compared: Tensor, excess: Tensor, normal: ImageSet
) -> tuple[list[Bar], list[dict[str, Any]]]:
    """The directions that add the most.

    Args:
        own: Of the image.
        usual: Of the normal images that are shown.
        compared: Coordinates of the images that it is compared with, ``(M, K)``.
        excess: What each direction adds, ``(K,)``.
        normal: The images that are shown.
    """
    found, numbers = [], []
    shown = _same_kind(usual, own)
    along = torch.where(own.coordinates[0].isfinite(), excess, -torch.inf)  # what is no direction has no ends
    places = along.argsort(descending=True)[:_DIRECTIONS].tolist()
    for place in places:
        tiles = end_tiles(usual.coordinates[shown, place], lambda image: normal.images[shown[image]])
        value, nats = float(own.coordinates[0, place]), float(excess[place])
        name = f"{own.parts[place]}, {own.names[place]}"
        text = f"{size(nats)} nats, at {within(value, compared[:, place])}"
        found.append(Bar(name, text, nats / max(abs(float(excess[places[0]])), 1e-12), tiles))
        numbers.append({"part": own.parts[place], "direction": own.names[place], "nats": nats, "value": value})
    return found, numbers
