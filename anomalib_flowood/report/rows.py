# SPDX-License-Identifier: Apache-2.0
"""All test images of a data set, for a table that the page's script shows, filters and writes as CSV."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import pandas as pd

from .gallery import Gallery

_COLUMNS = ["image_path", "source", "label"]


def image_rows(jobs: dict[str, pd.DataFrame], thresholds: dict[str, float], gallery: Gallery) -> dict[str, Any]:
    """Lay the test images out, compactly: a page may hold tens of thousands.

    Args:
        jobs: For each detector its test images: ``image_path``, ``source``, ``label`` and ``score``.
        thresholds: Those of the detectors that have one.
        gallery: The images that the page shows.

    Returns:
        ``lists``, the distinct lists of images (detectors that were tested on the same ones share theirs): what all
        paths begin with, the rest of each, sources, of each image the place of its source, and its label. And
        ``detectors``: name, place of its list, scores and threshold. Plain data.
    """
    lists: list[dict[str, Any]] = []
    known: list[pd.DataFrame] = []
    detectors = []
    for detector, scores in jobs.items():
        images = scores[_COLUMNS].reset_index(drop=True)
        place = next((number for number, other in enumerate(known) if other.equals(images)), len(known))
        if place == len(known):
            known.append(images)
            lists.append(_list_of(images, gallery))
        # What is not finite is no JSON number.
        values = [score if abs(score) < float("inf") else str(score) for score in scores["score"].astype(float)]
        detectors.append({"name": detector, "list": place, "scores": values, "threshold": thresholds.get(detector)})
    return {"lists": lists, "detectors": detectors}


def _list_of(images: pd.DataFrame, gallery: Gallery) -> dict[str, Any]:
    paths = images["image_path"].tolist()
    # Path's parts would not be what is written.
    folders = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    start = "".join(f"{level[0]}/" for level in takewhile(lambda level: len(set(level)) == 1, folders))
    places, sources = pd.factorize(images["source"])
    return {
        "start": start,
        "paths": [path[len(start) :] for path in paths],
        "sources": [str(source) for source in sources],
        "source": places.tolist(),
        "label": images["label"].astype(int).tolist(),
        "pictures": {
            str(row): [picture.name, picture.width, picture.height]
            for row, path in enumerate(paths)
            if (picture := gallery.pictures.get(path)) is not None
        },
    }
