# SPDX-License-Identifier: Apache-2.0
"""Ground truth of pixels: masks in a folder ``ground_truth`` by the images, as MVTec AD, AD 2 and LOCO have it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from anomalib_flowood.data.decoding import UnreadableImageError, read_header, read_mask
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.listing import image_files, split_folder

logger = logging.getLogger(__name__)

GROUND_TRUTH = "ground_truth"
"""The folder of masks."""

_SHOWN = 3
"""The most files of a kind that a message names."""


def pair(images: Sequence[Path], folder: Path) -> tuple[list[str], list[Path]]:
    """Find the masks of images by their names.

    Args:
        images: Paths of the images, relative to where their kinds' folders are: ``KIND/NAME.jpg``.
        folder: The folder of masks, ``KIND/NAME_mask.png``, ``KIND/NAME.png``, or several of an image in a folder
            ``KIND/NAME``, of any ending that images may have.

    Returns:
        Path of the mask of each image, or of the folder of its masks, an empty text where it has none; and the masks
        that belong to no image.
    """
    files = image_files(folder, tell=False)
    found = {path.relative_to(folder).with_suffix(""): path for path in files}
    folders = {path.relative_to(folder).parent: path.parent for path in files}
    masks = []
    for image in images:
        name = image.with_suffix("")
        named = (found.get(name), found.get(name.with_name(f"{name.name}_mask")), folders.get(name))
        masks.append(next((str(path) for path in named if path), ""))
    used = set(masks)
    return masks, [path for path in files if used.isdisjoint({str(path), str(path.parent)})]


def union_of(mask: str) -> torch.Tensor:
    """Read the mask of an image, ``(H, W)``, ``uint8``: what is 1 in any of them, where it is a folder of masks.

    Raises:
        UnreadableImageError: As :func:`~anomalib_flowood.data.decoding.read_mask`.
        ValueError: If they differ in size.
    """
    first, *others = _files_of(mask)
    union = read_mask(first)
    for file in others:
        part = read_mask(file)
        if part.shape != union.shape:
            msg = f"The masks in {mask} are of one image, and {file} has another size than {first}."
            raise ValueError(msg)
        union |= part
    return union


def _files_of(mask: str) -> list[Path]:
    path = Path(mask)
    return image_files(path, tell=False) if path.is_dir() else [path]


def with_masks(images: Images, folder: Path, anomalous: np.ndarray) -> Images:
    """Give test images the masks that their folder has and that fit; say what does not, with the files' names.

    Args:
        images: The images, which are files in the folder's ``test``, or in the folder itself where there is none.
        folder: The folder. Masks are in its ``ground_truth``, or in that of ``test``, as MVTec AD 2 has them; without
            such a folder nothing is done.
        anomalous: Which of the images are anomalous, ``(N,)``. The others need no masks: theirs are empty.

    Returns:
        The images, with masks if any anomalous one has one of its size. The others' are empty:
        :func:`~anomalib_flowood.data.items.with_known_masks` leaves them out where pixels are judged.
    """
    top = split_folder(folder, "test") or split_folder(folder, "train") or folder
    ground_truth = next((place / GROUND_TRUTH for place in (folder, top) if (place / GROUND_TRUTH).is_dir()), None)
    if ground_truth is None:
        return images
    names = [Path(path).relative_to(top) for path in images.paths]
    rows = np.flatnonzero(anomalous)
    found, unmatched = pair([names[row] for row in rows], ground_truth)
    masks = np.full(len(images), "", dtype=object)
    masks[rows] = found
    missing = [str(ground_truth / names[row].with_suffix(".png")) for row in rows if not masks[row]]
    misfits = {row: text for row in rows if masks[row] and (text := _misfit(images.paths[row], masks[row]))}
    # Empty masks of normal images do no harm.
    normal = {name.with_suffix("") for name, mask in zip(names, masks, strict=True) if not mask}
    stray = [str(path) for path in unmatched if normal.isdisjoint(_images_of(path.relative_to(ground_truth)))]
    problems = [
        _some(missing, "missing"),
        _some([*misfits.values()], "of another size"),
        _some(stray, "that are no image's"),
    ]
    said = "; ".join(filter(None, problems))
    masks[[*misfits]] = ""
    judged = len(rows) - len(missing) - len(misfits)
    if missing or misfits:
        logger.warning(
            "Pixels are judged on %s: the other anomalous ones lack a mask of their size in %s, KIND/NAME.png, "
            "KIND/NAME_mask.png or several in KIND/NAME. Masks %s.",
            f"{judged} of the {len(rows)} anomalous test images, and on the normal ones" if judged else "no image",
            ground_truth,
            said,
        )
    elif stray:
        logger.warning("Left out: masks %s.", said)
    return replace(images, masks=tuple(masks)) if judged else images


def tell_of_masks(images: Sequence[Path]) -> None:
    """Say of images that they are called as if they were masks of others beside them; they are read as images.

    MVTec AD has masks in a folder of their own; KolektorSDD2 (``NAME_GT``) and Real-IAD (``NAME.png`` beside
    ``NAME.jpg``) have not.
    """
    others = {path.with_suffix(""): path for path in sorted(images, reverse=True)}
    likely = []
    for path in sorted(images):
        stem = re.sub(r"[_-](mask|gt|label|ground_?truth)$", "", path.stem, flags=re.IGNORECASE)
        image = others.get(path.with_name(stem))
        if image and (stem != path.stem or image != path):
            likely.append(f"{path} beside {image.name}")
    if likely:
        logger.warning(
            "Read as images, although they are named like masks: %d of %d (%s). Masks belong in %s/KIND, or elsewhere.",
            len(likely),
            len(images),
            ", ".join(likely[:_SHOWN]) + (", …" if len(likely) > _SHOWN else ""),
            GROUND_TRUTH,
        )


def without_masks(files: list[Path], folder: Path) -> list[Path]:
    """Leave masks out of the images that were found in a folder, unless there is nothing else."""
    images = [path for path in files if GROUND_TRUTH not in path.relative_to(folder).parts[:-1]]
    if images and len(images) < len(files):
        logger.info("Left out: %d masks below %s (in %s).", len(files) - len(images), folder, GROUND_TRUTH)
    tell_of_masks(images)
    return images or files


def _misfit(image: str, mask: str) -> str:
    """Say of a mask that its size is another; what cannot be read is said when it is read."""
    for file in _files_of(mask):
        try:
            of_image, of_mask = read_header(image)[:2], read_header(file)[:2]
        except UnreadableImageError:
            continue
        # What stands behind an image's pixels may turn it, of which its header says nothing.
        if of_mask not in {of_image, of_image[::-1]}:
            return f"{file} ({of_mask[0]} x {of_mask[1]} pixels; its image has {of_image[0]} x {of_image[1]})"
    return ""


def _images_of(mask: Path) -> set[Path]:
    """Names of the images that a mask may be of."""
    return {mask.with_name(mask.stem.removesuffix("_mask")), mask.parent}


def _some(files: Sequence[str], what: str) -> str:
    if not files:
        return ""
    return f"{what}: {len(files)} ({', '.join(files[:_SHOWN])}{', …' if len(files) > _SHOWN else ''})"
