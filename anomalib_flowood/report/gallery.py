# SPDX-License-Identifier: Apache-2.0
"""The images that a page shows: the worst and typical ones of each set, with anomaly maps and ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pandas as pd
from anomalib.data import AnomalibDataModule

from .maps import JobMaps, map_uri, outline, shown_images
from .thumbnails import find_thumbnails

_ALL = 200
"""So many test images are all in the page; of more, those in a row of worst or typical ones."""
_PIXELATED = 96
"""Images up to this side are shown pixel by pixel."""


@dataclass(frozen=True)
class Picture:
    """An image of the page, which stands in it once.

    Attributes:
        name: Its identifier.
        uri: A data URI.
        width: In pixels.
        height: In pixels.
        pixelated: Whether it is so small that its pixels are shown as they are.
    """

    name: str
    uri: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True)
class Tile:
    """An image in a row.

    Attributes:
        picture: The image; ``None`` if it was not found.
        path: Of the image.
        source: The set that it belongs to.
        score: Its raw score.
        alarm: Whether that raises an alarm; ``None`` without a threshold.
        map: Data URI of the anomaly map; empty without one.
        truth: The outline of the ground truth, an SVG path; empty without one.
    """

    picture: Picture | None
    path: str
    source: str
    score: str
    alarm: bool | None
    map: str
    truth: str


@dataclass(frozen=True)
class Gallery:
    """All images of one data set.

    Attributes:
        pictures: Each image once, by its path; as a detector sees it, by the detector's name and the path.
        strips: For each detector rows of images by what they are.
        missing: Why some are not there; empty if all are.
    """

    pictures: dict[str, Picture] = field(default_factory=dict)
    strips: dict[str, dict[str, list[Tile]]] = field(default_factory=dict)
    missing: str = ""

    @property
    def maps(self) -> bool:
        """Whether any image has an anomaly map."""
        return any(tile.map for tile in self._tiles)

    @property
    def truths(self) -> bool:
        """Whether the ground truth of any image is outlined."""
        return any(tile.truth for tile in self._tiles)

    @property
    def _tiles(self) -> Iterator[Tile]:
        return (tile for strips in self.strips.values() for tiles in strips.values() for tile in tiles)


def make_gallery(
    jobs: dict[str, pd.DataFrame],
    maps: dict[str, JobMaps],
    thresholds: dict[str, float],
    open_data: Callable[[], AnomalibDataModule] | None,
    prefix: str,
) -> Gallery:
    """Find the images, and lay maps and outlines over them.

    Args:
        jobs: For each detector its test images: ``image_path``, ``source``, ``label`` and ``score``.
        maps: Those of the detectors that have them.
        thresholds: Those of the detectors that have one.
        open_data: Builds the data module for images that are no files, ``None`` if nobody knows how.
        prefix: Of the images' identifiers, which are unique in a page.
    """
    chosen = {detector: shown_images(scores) for detector, scores in jobs.items()}
    paths = [path for strips in chosen.values() for rows in strips.values() for path in rows["image_path"]]
    if not paths:
        return Gallery()
    everything = pd.concat([scores["image_path"] for scores in jobs.values()]).unique()
    found, missing = find_thumbnails([*paths, *everything] if len(everything) <= _ALL else paths, open_data)
    seen = {(name, path): image for name, own in maps.items() if name in jobs for path, image in own.seen.items()}
    every = {**found, **{f"{detector}: {path}": image for (detector, path), image in seen.items()}}
    pictures = {
        key: Picture(f"{prefix}{number}", *image, pixelated=max(image.width, image.height) <= _PIXELATED)
        for number, (key, image) in enumerate(every.items(), start=1)
    }
    strips = {}
    for detector, parts in chosen.items():
        scores, own = jobs[detector], maps.get(detector, JobMaps({}, {}))
        ends = own.ends(scores.loc[scores["label"] == 0, "image_path"])
        threshold = thresholds.get(detector)
        shown = {**pictures, **{path: pictures[f"{detector}: {path}"] for path in own.seen}}
        strips[detector] = {title: _tiles(rows, shown, own, ends, threshold) for title, rows in parts.items()}
    return Gallery(pictures, strips, missing)


def _tiles(
    rows: pd.DataFrame,
    pictures: dict[str, Picture],
    maps: JobMaps,
    ends: tuple[float, float],
    threshold: float | None,
) -> list[Tile]:
    tiles = []
    for path, source, score in rows[["image_path", "source", "score"]].itertuples(index=False):
        picture = pictures.get(path)
        alarm = None if threshold is None else bool(score > threshold)
        overlay = map_uri(maps.maps[path], ends) if path in maps.maps else ""
        truth = outline(maps.masks[path], (picture.width, picture.height)) if picture and path in maps.masks else ""
        text = f"{score:,.4g}".replace("-", "−")
        tiles.append(Tile(picture, str(path), str(source), text, alarm, overlay, truth))
    return tiles
