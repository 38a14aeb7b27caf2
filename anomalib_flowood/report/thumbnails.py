# SPDX-License-Identifier: Apache-2.0
"""Test images of a run that is over, small enough to stand inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.data import AnomalibDataModule
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_flowood.data.decoding import read_picture

SIDE = 256
"""The longer side of a thumbnail, in pixels: what is seen when it is opened."""
_EXACT = 96
"""Images up to this side are kept exactly."""


class Thumbnail(NamedTuple):
    """An image inside a page.

    Attributes:
        uri: A data URI.
        width: Of the image, in pixels.
        height: Likewise.
    """

    uri: str
    width: int
    height: int


def find_thumbnails(
    paths: Iterable[str], open_data: Callable[[], AnomalibDataModule] | None
) -> tuple[dict[str, Thumbnail], str]:
    """Find images by the paths that a test recorded.

    Files are read. Images that never were files (MNIST's) have paths that only stand in for them: the data module is
    built once more, and asked.

    Args:
        paths: Values of ``image_path``.
        open_data: Builds the data module; ``None`` if nobody knows how.

    Returns:
        The images that were found, by path, and why others were not; an empty text if all were.
    """
    wanted = list(dict.fromkeys(paths))
    found: dict[str, Thumbnail] = {}
    reason = ""
    for path in wanted:
        if Path(path).is_file():
            try:
                found[path] = thumbnail(read_picture(path))
            except ValueError as error:
                reason = str(error)
    others = [path for path in wanted if path not in found and not Path(path).is_file()]
    if others and open_data is None:
        reason = f"there is no such file from {Path.cwd()}, and the run did not keep how its data were made"
    elif others and open_data is not None:
        try:
            images = _from_data(open_data(), others)
        except Exception as error:  # data that have gone since must not cost the page
            reason = f"the data could not be read again ({str(error) or type(error).__name__})"
        else:
            found |= images
            if len(images) < len(others):
                lost = next(path for path in others if path not in images)
                reason = f"neither a file nor the data as they are now hold {lost or 'an image without a path'}"
    lacking = len(wanted) - len(found)
    return found, f"{lacking} of {len(wanted)} images are missing: {reason}." if lacking else ""


def _from_data(datamodule: AnomalibDataModule, paths: list[str]) -> dict[str, Thumbnail]:
    """The test images of a data module that have these paths, made small."""
    datamodule.prepare_data()
    datamodule.setup("test")
    images: Any = datamodule.test_data
    places = {str(path): place for place, path in enumerate(images.samples["image_path"])}
    return {path: thumbnail(images[places[path]].image) for path in paths if path in places}


def thumbnail(image: torch.Tensor, side: int = SIDE) -> Thumbnail:
    """Shrink an image, ``(C, H, W)``, ``uint8`` or floats in [0, 1], for a page; small ones are kept exactly."""
    picture = to_pil_image(image.as_subclass(torch.Tensor))
    kind = "png" if max(picture.size) <= _EXACT else "jpeg"
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **({"quality": 80} if kind == "jpeg" else {}))
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(uri, *picture.size)
