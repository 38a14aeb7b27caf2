# SPDX-License-Identifier: Apache-2.0
"""Why images are anomalous to a detector that looks at the positions of feature maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anomalib_flowood.models.components import FlowModule
from anomalib_flowood.models.components.capabilities import LayerView
from anomalib_flowood.report.maps import map_uri

from .cases import Bar, Case, Chosen, Tile, bars, choose, end_tiles, others, tile, within
from .images import ImageSet, spread
from .numbers import CHUNK, Scored
from .page import Picture

_HEADING = "What the score is made of"
_DIRECTIONS = 3
_COMPARED = 32
"""Normal images whose own patches are compared with those of the others, for a scale."""


class _Place(NamedTuple):
    """The most anomalous position: of which layer, and where."""

    view: LayerView
    normal: LayerView
    unseen: LayerView
    row: int
    column: int

    def of_its_kind(self, views: LayerView) -> Tensor:
        """Numbers of the images that are of this one's kind; of all, where there is one kind, or none is of it."""
        everyone = torch.arange(len(views.map))
        if views.kind is None or self.view.kind is None:
            return everyone
        same = everyone[views.kind == self.view.kind]
        return same if len(same) else everyone

    def patch(self, image: Tensor, row: int, column: int) -> tuple[Tensor, list[float]]:
        """What a position and its neighbours see of an image, ``(3, H, W)``, and its frame in the image."""
        height, width = self.view.map.shape[1:]
        tall, wide = image.shape[-2] / height, image.shape[-1] / width
        top, left = max(0, round((row - 1) * tall)), max(0, round((column - 1) * wide))
        bottom, right = round((row + 2) * tall), round((column + 2) * wide)
        patch = image[:, top:bottom, left:right]
        return patch, [left, top, patch.shape[-1], patch.shape[-2]]


def map_cases(detector: FlowModule, scored: list[Scored], normal: ImageSet, folder: Path) -> Picture:
    """Show, for single images, each layer's share and map, the directions that stand out, the nearest normal patch."""
    del folder
    views, unseen = _views(detector, normal.inputs), _views(detector, scored[0].images.inputs)
    chosen = list(choose(scored))
    own = [_views(detector, one.inputs) for one in chosen]
    maps = [_map(detector, one.inputs) for one in chosen]
    ends = _ends(_map(detector, scored[0].images.inputs), torch.cat(maps))
    layer_ends = [
        _ends(inside.map, torch.cat([found[number].map for found in own])) for number, inside in enumerate(unseen)
    ]
    cases = []
    for one, found, anomaly_map in zip(chosen, own, maps, strict=True):
        tiles = [tile(one.image, "image"), tile(one.image, "map", overlay=map_uri(anomaly_map[0].numpy(), ends))]
        tiles += [
            tile(one.image, f"map of {view.name}", overlay=map_uri(view.map[0].numpy(), limits))
            for view, limits in zip(found, layer_ends, strict=True)
        ]
        place = _most_anomalous(found, views, unseen)
        patches, distances = _nearest_patch(place, one, normal)
        directions, shares = _directions(place, normal)
        parts = {name: float(share) for view in found for name, share in view.shares.items()}
        numbers = {"set": one.set, "score": one.score, "shares": parts, "layer": place.view.name}
        numbers |= {"position": [place.row, place.column], "directions": shares, **distances}
        cases.append(Case(one.title, [*tiles, *patches], _HEADING, bars(parts), directions, numbers))
    caption = (
        "What the score is made of: what each layer's most anomalous positions, its patch that is rarest for its "
        "place, in normal images and in its own, its patch that is least like any normal one and its whole map add to "
        "it, where they are evidence, and what the image shows wherever it is, by the mean features of all layers; 0 "
        "is the mean of normal images. All maps of a layer have one colour scale, clear where nine tenths of the "
        "inside ones' positions are. The frame is the most anomalous position, with its neighbours, of the layer that "
        f"finds it so; beside it that patch of {len(normal.images)} {normal.name} images which is most like it there. "
        "Directions: those of the layer's descriptors in which the position is most unlike normal images, with their "
        "share of its anomaly, where it is along them and where nine tenths of the inside images are, and patches of "
        f"{normal.name} images at this position that are lowest and highest along them."
        + (" Patches and directions are those of its kind of image." if views[0].kind is not None else "")
    )
    return Picture("", "Single images: layers, directions, the nearest normal patch", caption, cases)


def _views(detector: FlowModule, inputs: Tensor) -> list[LayerView]:
    """What each layer says of images, in main memory."""
    model: Any = detector.model
    chunks = [model.layer_views(chunk.to(detector.device)) for chunk in inputs.split(CHUNK)]

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.cpu() for part in parts])

    return [
        LayerView(
            name=views[0].name,
            descriptors=joined([view.descriptors for view in views]),
            whitened=joined([view.whitened for view in views]),
            map=joined([view.map for view in views]),
            shares={name: joined([view.shares[name] for view in views]) for name in views[0].shares},
            kind=None if views[0].kind is None else joined([view.kind for view in views]),
        )
        for views in zip(*chunks, strict=True)
    ]


def _map(detector: FlowModule, inputs: Tensor) -> Tensor:
    """Anomaly maps of images, ``(N, H, W)``, in main memory."""
    model: Any = detector.model
    chunks = (model.inputs(chunk.to(detector.device)) for chunk in inputs.split(CHUNK))
    return torch.cat([model.predict(chunk).anomaly_map[:, 0].cpu() for chunk in chunks])


def _ends(inside: Tensor, shown: Tensor) -> tuple[float, float]:
    """The values at which colours begin and end."""
    low, high = float(np.quantile(inside.numpy(), 0.9)), float(np.quantile(shown.nan_to_num().numpy(), 0.995))
    return low, max(high, low + 1e-9)


def _most_anomalous(views: list[LayerView], normal: list[LayerView], unseen: list[LayerView]) -> _Place:
    """The position that is the farthest above normal ones in any layer."""
    best = max(range(len(views)), key=lambda number: float(views[number].map.nan_to_num(torch.inf).max()))
    width = views[best].map.shape[2]
    row, column = divmod(int(views[best].map.flatten().nan_to_num(torch.inf).argmax()), width)
    return _Place(views[best], normal[best], unseen[best], row, column)


def _distances(one: Tensor, to: Tensor) -> Tensor:
    """Euclidean distances of a vector, ``(D,)``, from others, ``(R, P, D)``: ``(R * P,)``."""
    return torch.linalg.vector_norm(to.flatten(0, 1) - one, dim=1)


def _nearest_patch(place: _Place, chosen: Chosen, normal: ImageSet) -> tuple[list[Tile], dict[str, float]]:
    """The patch of normal images that is most like the most anomalous one, and how far both are apart."""
    which = place.of_its_kind(place.normal)
    vectors = place.normal.descriptors[which].flatten(2).movedim(1, 2).contiguous()  # (R, h * w, D)
    width = place.normal.descriptors.shape[3]
    found = _distances(place.view.descriptors[0, :, place.row, place.column], vectors)
    unlike = others(chosen, normal)[which]
    if bool(unlike.any()):
        found = torch.where(unlike.repeat_interleave(vectors.shape[1]), found, torch.inf)
    other, position = divmod(int(found.argmin()), vectors.shape[1])
    like_image = normal.images[which[other]]
    row, column = divmod(position, width)
    # Normal patches at the same position have nearest ones, too, in other images.
    own = []
    for number in spread(len(vectors), _COMPARED).tolist() if len(vectors) > 1 else []:
        away = _distances(vectors[number, place.row * width + place.column], vectors).reshape(len(vectors), -1)
        away[number] = torch.inf
        own.append(float(away.min()))
    distance, usual = float(found.min()), float(np.median(own)) if own else float("nan")
    seen, box = place.patch(chosen.image, place.row, place.column)
    like, like_box = place.patch(like_image, row, column)
    far = f", {distance / usual:.2g} times as far as normal ones are from theirs" if usual > 0 else ""
    tiles = [
        tile(chosen.image, "most anomalous position", box=box),
        tile(seen, f"it ({place.view.name})", small=True),
        tile(like, f"the nearest normal patch{far}", small=True),
        tile(like_image, "where that is", box=like_box),
    ]
    return tiles, {"nearest_patch_distance": distance, "usual_patch_distance": usual}


def _directions(place: _Place, normal: ImageSet) -> tuple[list[Bar], list[dict[str, float]]]:
    """The directions in which the position is unlike normal images, and patches at their ends."""
    values = place.view.whitened[0, :, place.row, place.column]
    which, unseen = place.of_its_kind(place.normal), place.of_its_kind(place.unseen)
    shares = values.square() / values.square().sum().clamp(min=1e-12)
    found: list[Bar] = []
    numbers = []
    for number in shares.argsort(descending=True)[:_DIRECTIONS].tolist():
        normal_values = place.normal.whitened[which, number, place.row, place.column]
        tiles = end_tiles(
            normal_values, lambda image: place.patch(normal.images[which[image]], place.row, place.column)[0]
        )
        share, value = float(shares[number]), float(values[number])
        text = f"{share:.0%}, at {within(value, place.unseen.whitened[unseen, number, place.row, place.column])}"
        found.append(Bar(f"{place.view.name}, direction {number + 1}", text, share / float(shares.max()), tiles))
        numbers.append({"direction": number + 1, "share": share, "value": value})
    return found, numbers
