# SPDX-License-Identifier: Apache-2.0
"""Which class of a data set is the normal one: as the user says, or as a folder shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from anomalib_flowood.data.images import Images
from anomalib_flowood.data.listing import split_folder
from anomalib_flowood.data.sources.layouts import NO_FOLDER
from anomalib_flowood.names import alternatives, unknown_name

NORMAL_NAMES = ("good", "normal", "ok")
"""What the normal class of a folder is called, in any letters, where nobody says what it is called."""

LAYOUTS_OF_PARTS = (
    "Understood without a word are folders with train/good, test/good and test/KIND (as MVTec AD), with good and KIND, "
    f"and of normal images alone. The normal class is called {alternatives(NORMAL_NAMES)} there."
)
"""In which ways images may lie in a folder, for messages."""


def named_class(normal_class: int | str | None, train: Images, test: Images) -> str:
    """Find the class that the user means by its name or its label.

    Raises:
        ValueError: If there is no such class, or there are none at all.
    """
    if train.classes is None or test.classes is None:
        msg = (
            f"The data set {train.name!r} has no classes: OneClass needs labels or a sub-folder per class, or no "
            "normal_class where all images are normal."
        )
        raise ValueError(msg)
    known = train.class_names or tuple(sorted({*train.classes, *test.classes}, key=_natural))
    text = str(normal_class)
    if text in known:
        return text
    if text.isdecimal() and int(text) < len(known):
        return known[int(text)]
    kind, hint = f"class of {train.name!r}", f"Labels from 0 to {len(known) - 1} work too."
    raise unknown_name(kind, normal_class, known, hint)


def found_class(train: Images, test: Images, folder: Path, divided: bool) -> tuple[str, Images, Images]:
    """Find out which class of a folder is normal.

    Args:
        train: The training split. Where there are no classes in it, all of its images are normal.
        test: The test split.
        folder: The folder.
        divided: Whether both splits are parts of the same images.

    Returns:
        Its name, and both splits with classes.

    Raises:
        ValueError: If several classes might be meant, or nothing says which test images are normal.
    """
    if train.classes is None:
        if test.classes is None and not divided:
            where = split_folder(folder, "test") or folder  # of idx files
            msg = f"The images in {where} lie in no sub-folder: nothing says which are normal. {LAYOUTS_OF_PARTS}"
            raise ValueError(msg)
        normal = _normal_names([] if test.classes is None else test.classes)[:1] or NORMAL_NAMES[:1]
        return normal[0], _all_of(normal[0], train), _all_of(normal[0], test) if test.classes is None else test
    both = () if test.classes is None else test.classes
    names = sorted(set(train.classes) or set(both), key=_natural)
    called_normal = _normal_names(names)
    if not called_normal:
        refuse_products(folder, names)
        if divided and len(names) == 1:
            _refuse_several_below(folder / names[0], train)
    likely = called_normal or names
    if len(likely) == 1:
        return likely[0], train, test
    flat = f" {NO_FOLDER!r} is the images beside these folders." if NO_FOLDER in names else ""
    msg = (
        f"Which class of {folder} is normal: {alternatives(names)}? Say so with normal_class (--data.normal_class "
        f"NAME).{flat} If all are, of several products that one model is to judge, they belong below train/good "
        f"(train/good/{names[-1]}/…). {LAYOUTS_OF_PARTS}"
    )
    raise ValueError(msg)


def refuse_products(folder: Path, names: Sequence[str]) -> None:
    """Refuse classes of a folder that are whole products, with a folder ``train`` of their own.

    All that such a folder holds would be one class, defects and masks, too.
    """
    inner = [name for name in names if name != NO_FOLDER and split_folder(folder / name, "train")]
    if inner:
        holds = "several folders" if len(inner) > 1 else "another folder"
        remedy = "give one of them" if len(inner) > 1 else f"give {folder / inner[0]}"
        msg = f"{folder} holds {holds} of images ({', '.join(inner)}): {remedy}. {LAYOUTS_OF_PARTS}"
        raise ValueError(msg)


def _refuse_several_below(folder: Path, images: Images) -> None:
    """Refuse the only folder within another, which nobody called normal, if it has images in several of its own."""
    inner = sorted({str(Path(path).parent) for path in images.paths})
    if len(inner) > 1:
        some = ", ".join(inner[:3]) + (", …" if len(inner) > 3 else "")
        msg = (
            f"Which images below {folder} are normal? They lie in {some}: give the folder of the normal ones, or the "
            f"one above it; if all are normal, say so with normal_class (--data.normal_class {folder.name}). "
            f"{LAYOUTS_OF_PARTS}"
        )
        raise ValueError(msg)


def _normal_names(names: Iterable[str]) -> Sequence[str]:
    return sorted({name for name in names if name.lower() in NORMAL_NAMES})


def _all_of(name: str, images: Images) -> Images:
    return replace(images, classes=np.full(len(images), name, dtype=object))


def _natural(text: str) -> tuple[int, str]:
    """Sort key under which 2 comes before 10."""
    return len(text) if text.isdecimal() else 0, text
