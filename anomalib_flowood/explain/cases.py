# SPDX-License-Identifier: Apache-2.0
"""Single images, explained: which are, and what the page shows of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomalib_flowood.report.thumbnails import Thumbnail, thumbnail

from .images import ImageSet
from .numbers import Scored

_FOUND, _MISSED, _ALARMS = 2, 3, 1
_ENDS = 2
"""Images at either end of a direction."""
_SMALL = 112
"""The longer side of images beside the one that is explained, in pixels."""


class Tile(NamedTuple):
    """An image of a case.

    Attributes:
        image: The image.
        caption: What it is.
        overlay: Data URI of a picture that is laid over it; empty for none.
        box: Left, top, width and height of a frame in it, in its pixels; empty for none.
    """

    image: Thumbnail
    caption: str
    overlay: str = ""
    box: tuple[float, ...] = ()


class Bar(NamedTuple):
    """A part of a whole.

    Attributes:
        name: What it is of.
        text: Its size.
        share: Its size as a share of the largest one, in -1..1.
        tiles: Images that show what it stands for.
    """

    name: str
    text: str
    share: float
    tiles: Sequence[Tile] = ()


@dataclass(frozen=True)
class Case:
    """What the page shows of one image.

    Attributes:
        title: Which image, and why this one.
        tiles: It, and what belongs beside it.
        heading: What the parts are of.
        parts: What makes it anomalous, part by part.
        directions: The directions in which it is unlike normal images.
        numbers: The same for ``explain.json``.
    """

    title: str
    tiles: list[Tile]
    heading: str
    parts: list[Bar]
    directions: list[Bar]
    numbers: dict[str, Any] = field(default_factory=dict)


class Chosen(NamedTuple):
    """An image that is explained.

    Attributes:
        title: Which it is, and why it is explained.
        set: Its set.
        score: Its raw score.
        image: For the eye, ``(3, H, W)``.
        inputs: For the detector, ``(1, 3, H, W)``.
    """

    title: str
    set: str
    score: float
    image: Tensor
    inputs: Tensor


def choose(scored: list[Scored]) -> Iterator[Chosen]:
    """Choose images to explain: outside ones that are found, others that are missed, the most anomalous inside one."""
    outside = [(float(score), part, place) for part in scored[1:] for place, score in enumerate(part.score)]
    outside.sort(key=lambda item: item[0])
    inside = [(float(score), scored[0], place) for place, score in enumerate(scored[0].score)]
    inside.sort(key=lambda item: -item[0])
    missed = outside[:_MISSED]
    found = outside[_MISSED:][::-1][:_FOUND]
    for why, some in (
        ("among the most anomalous outside", found),
        ("among the least anomalous outside", missed),
        ("the most anomalous inside", inside[:_ALARMS]),
    ):
        for score, part, place in some:
            title = f"{part.images.name}, {why}: score {signed(f'{score:.4g}')}"
            images = part.images
            yield Chosen(title, images.name, score, images.images[place], images.inputs[place : place + 1])


def others(chosen: Chosen, normal: ImageSet) -> Tensor:
    """Which normal images are not the chosen one, boolean, ``(R,)``: all of them, unless they are all there are."""
    unlike = (normal.inputs != chosen.inputs).flatten(1).any(1)
    return unlike if bool(unlike.any()) else torch.ones_like(unlike)


def signed(number: str) -> str:
    """A number with the sign that is as wide as a plus."""
    return number.replace("-", "−")


def size(value: float) -> str:
    """A number with its sign and three digits, or all before the point."""
    return signed(f"{value:+,.0f}" if abs(value) >= 1_000 else f"{value:+.3g}")


def within(value: float, inside: Tensor) -> str:
    """Where an image is along a direction, and where nine tenths of the inside images for which it is known are."""
    inside = inside[inside.isfinite()]
    if not len(inside):
        return signed(f"{value:+.1f}")
    low, high = inside.quantile(torch.tensor([0.05, 0.95], dtype=inside.dtype)).tolist()
    return signed(f"{value:+.1f} (inside {low:+.1f} to {high:+.1f})")


def tile(image: Tensor, caption: str, *, small: bool = False, overlay: str = "", box: Sequence[float] = ()) -> Tile:
    """Make a tile of an image, ``(3, H, W)`` in [0, 1]; a small one where others matter more; the box in its pixels."""
    shown = thumbnail(torch.nan_to_num(image), *([_SMALL] if small else []))
    scale = shown.width / image.shape[-1]
    return Tile(shown, caption, overlay, tuple(round(value * scale, 1) for value in box))


def end_tiles(values: Tensor, show: Callable[[int], Tensor]) -> list[Tile]:
    """Show the images that are lowest and highest along a direction.

    Args:
        values: Where images are along it, ``(N,)``.
        show: What to show of one of them, by its place, ``(3, H, W)``.
    """
    order = values.argsort().tolist()
    count = min(_ENDS, len(order) // 2)
    return [
        tile(show(place), f"{name} {signed(f'{float(values[place]):+.1f}')}", small=True)
        for name, places in (("low", order[:count]), ("high", order[len(order) - count :]))
        for place in places
    ]


def bars(values: dict[str, float], unit: str = "") -> list[Bar]:
    """Show parts of a whole, which may be below zero, the largest first."""
    most = max([abs(value) for value in values.values()], default=0.0) or 1.0
    ordered = sorted(values.items(), key=lambda item: -item[1])
    return [Bar(name, f"{size(value)}{unit}", value / most) for name, value in ordered]
