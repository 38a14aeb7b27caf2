# SPDX-License-Identifier: Apache-2.0
"""Anomaly maps of the images that a report shows: kept while a test runs, in the run's folder, and on the page."""

from __future__ import annotations

import base64
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import contourpy
import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from anomalib_flowood.files import whole_file
from anomalib_flowood.look import shorten
from anomalib_flowood.metrics import MOST_SETS

from .run import JOB_COLUMNS
from .thumbnails import Thumbnail, thumbnail

MAPS = "maps"
"""The folder in that of a run which holds a file for each job with maps."""

_WORST, _TYPICAL = 5, 3
_MAP_SIDE, _MASK_SIDE = 64, 128
_MOST = 10_000
"""Images whose maps, of 8 KiB, and masks, of 16, are kept until it is known which are shown; later ones have none."""


def shown_images(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Choose the images of a job that are looked at: of each set the most wrongly scored ones and typical ones.

    Args:
        scores: One row per test image of one job: ``source``, ``label`` and ``score``.

    Returns:
        Rows by what they are, the worst first; typical ones are those about the set's median. The inside images are one
        set, and so is each source of outside images, or all of them where there are more than 8.
    """
    ascending = scores.sort_values("score", kind="stable")
    inside, outside = ascending[ascending["label"] == 0].iloc[::-1], ascending[ascending["label"] == 1]
    sets = {"inside": inside}
    names = list(scores.loc[scores["label"] == 1, "source"].unique())
    if 2 <= len(names) <= MOST_SETS:
        sets |= {f"outside: {name}": outside[outside["source"] == name] for name in names}
    else:
        sets["outside"] = outside
    chosen: dict[str, pd.DataFrame] = {}
    for name, rows in sets.items():
        side, _, which = name.partition(": ")
        worst = "The most anomalous inside" if side == "inside" else "The least anomalous outside"
        rest = rows.iloc[_WORST:]
        start = max(0, len(rows) // 2 - _TYPICAL // 2 - _WORST)
        suffix = f": {which}" if which else ""
        chosen |= {
            f"{worst}{suffix}": rows.iloc[:_WORST],
            f"Typical {side}{suffix}": rest.iloc[start : start + _TYPICAL],
        }
    return {title: rows for title, rows in chosen.items() if not rows.empty}


class Kept(NamedTuple):
    """What is kept of an image.

    Attributes:
        map: Its anomaly map, ``(h, w)``.
        mask: Its ground truth, ``(h, w)``, 255 where it is anomalous; ``None`` without one.
        seen: The image as the detector sees it, where the map does not cover the file.
    """

    map: np.ndarray
    mask: np.ndarray | None
    seen: Thumbnail | None = None


class MapKeeper:
    """Small copies of the anomaly maps and masks of a test, in main memory."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def add(self, paths: Sequence[str], maps: Tensor | None, masks: Tensor | None, seen: Tensor | None = None) -> None:
        """Keep those of a batch.

        Args:
            paths: Of the images, by which they are found again; an empty one has no map.
            maps: Raw anomaly maps, ``(N, 1, H, W)`` or ``(N, H, W)``.
            masks: Ground truth, likewise; what is not 0 is anomalous.
            seen: The images as the detector sees them, ``(N, C, H, W)`` in [0, 1], if its maps do not cover the files.
        """
        if maps is None or len(self._kept) >= _MOST:
            return
        small = _shrunk(maps, _MAP_SIDE).clamp(-6e4, 6e4).half().numpy()
        truth = None if masks is None else (_shrunk(masks, _MASK_SIDE) * 255).round().to(torch.uint8).numpy()
        for place, path in enumerate(paths):
            if path:
                mask = None if truth is None or not truth[place].any() else truth[place]
                picture = None if seen is None else thumbnail(seen[place].float().cpu(), _MASK_SIDE)
                self._kept[path] = Kept(small[place], mask, picture)

    def of(self, paths: Iterable[str]) -> dict[str, Kept]:
        """Return what is kept of each of some images that have maps."""
        return {path: self._kept[path] for path in paths if path in self._kept}


def _shrunk(maps: Tensor, side: int) -> Tensor:
    """Shrink maps, ``(N, 1, H, W)`` or ``(N, H, W)``, to ``(N, h, w)`` on the CPU, h and w being ``side`` at most."""
    maps = maps.detach().float()
    maps = maps.reshape(len(maps), 1, *maps.shape[-2:])
    scale = side / max(maps.shape[-2:])
    if scale < 1:
        size = [max(1, round(length * scale)) for length in maps.shape[-2:]]
        maps = functional.interpolate(maps, size, mode="area")
    return maps[:, 0].cpu()


def write_maps(folder: Path, row: Mapping[str, Any], maps: Mapping[str, Kept]) -> None:
    """Write the maps and masks of a job, by the path of the image, into a run's folder, if there are any."""
    if not maps:
        return
    job = json.dumps([row[name] for name in JOB_COLUMNS], default=str)
    arrays: dict[str, Any] = {"job": np.array(job), "image_path": np.array(list(maps))}
    for number, (values, mask, seen) in enumerate(maps.values()):
        arrays[f"map_{number}"] = values
        if seen is not None:
            arrays[f"seen_{number}"] = np.array([seen.uri, str(seen.width), str(seen.height)])
        if mask is not None:
            arrays[f"mask_{number}"] = mask
    (folder / MAPS).mkdir(exist_ok=True)
    with whole_file(folder / MAPS / f"{zlib.crc32(job.encode()):08x}.npz") as file:
        np.savez_compressed(file, **arrays)


@dataclass(frozen=True)
class JobMaps:
    """Maps of one job.

    Attributes:
        maps: By the path of the image, ``(h, w)``.
        masks: Ground truth by the path of the image, ``(h, w)``, 255 where it is anomalous; of those that have one.
        seen: The image by its path, of those whose map does not cover the file.
    """

    maps: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    seen: dict[str, Thumbnail] = field(default_factory=dict)

    def ends(self, inside: Iterable[str]) -> tuple[float, float]:
        """The values at which colours begin and end, the same for all images of the job.

        Args:
            inside: Paths of inside images: nine tenths of their maps have no colour.
        """
        if not self.maps:
            return 0.0, 1.0
        normal = [self.maps[path].ravel() for path in inside if path in self.maps]
        everything = np.concatenate([values.ravel() for values in self.maps.values()]).astype(float)
        low = float(np.quantile(np.concatenate(normal) if normal else everything, 0.9))
        high = float(np.quantile(everything, 0.995))
        return low, max(high, low + 1e-9)


def read_maps(folder: Path) -> dict[tuple[str, str, str], JobMaps]:
    """Read the maps of a run's folder, by detector, data and seed, all of them text.

    Raises:
        ValueError: If a file cannot be read.
    """
    found = {}
    for path in sorted((folder / MAPS).glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                names = [str(name) for name in file["image_path"]]
                maps = {name: file[f"map_{number}"] for number, name in enumerate(names)}
                masks = {name: file[f"mask_{n}"] for n, name in enumerate(names) if f"mask_{n}" in file}
                seen = {name: _picture(file[f"seen_{n}"]) for n, name in enumerate(names) if f"seen_{n}" in file}
                detector, data, seed = json.loads(str(file["job"]))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            reason = shorten(error, 80)
            msg = f"{path} holds no anomaly maps of a test: {reason}. Without it the page has none of this job."
            raise ValueError(msg) from error
        found[str(detector), str(data), str(seed)] = JobMaps(maps, masks, seen)
    return found


def _picture(parts: np.ndarray) -> Thumbnail:
    uri, width, height = parts.tolist()
    return Thumbnail(uri, int(width), int(height))


def map_uri(values: np.ndarray, ends: tuple[float, float]) -> str:
    """A map as a picture to lay over its image: clear where it is low, from yellow to dark red where it is high."""
    low, high = ends
    levels = np.nan_to_num((values.astype(float) - low) / (high - low), nan=1.0).clip(0, 1)
    shades = (mpl.colormaps["YlOrRd"](np.linspace(0.15, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    picture = Image.fromarray((levels * 255).round().astype(np.uint8), mode="P")
    picture.putpalette(shades.tobytes())
    opacity = np.round(200 * np.linspace(0, 1, 256) ** 0.75).astype(np.uint8).tobytes()
    buffer = io.BytesIO()
    picture.save(buffer, format="png", transparency=opacity, optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def outline(mask: np.ndarray, size: tuple[int, int]) -> str:
    """The outline of a mask, ``(h, w)``, 255 inside, as an SVG path over a picture of some width and height."""
    lines = contourpy.contour_generator(z=np.pad(mask.astype(float), 1)).lines(127.5)
    scale = np.array(size) / mask.shape[::-1]
    parts = []
    for line in lines:
        points = np.round((np.asarray(line) - 0.5) * scale, 1)
        kept = points[:: max(1, math.ceil(len(points) / 200))]
        parts.append("M" + "L".join(f"{x:g} {y:g}" for x, y in kept) + "Z")
    return "".join(parts)
