# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

logger = logging.getLogger(__name__)

_UNREAD = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".mpo", ".pnm", ".tga")
"""Endings of images that are left out, and named."""

_SPLITS = {"train": ("train",), "test": ("test", "test_public")}
"""What the folders of both splits are called; MVTec AD 2 has ``test_public``."""


def split_folder(folder: Path, split: str) -> Path | None:
    """Find the folder of a split, if it is there.

    Where both splits are there, the case of their names does not matter: ``Train`` beside ``Test`` is no class.
    """
    if not folder.is_dir():
        return None
    if (folder / split).is_dir():
        return folder / split
    known = {name for names in _SPLITS.values() for name in names}
    folders = (path for path in folder.iterdir() if path.name.lower() in known and path.is_dir())
    there = {path.name.lower(): path for path in sorted(folders, reverse=True)}
    if not all(there.keys() & {*names} for names in _SPLITS.values()):
        return None  # trains are a class
    return next((there[name] for name in _SPLITS.get(split, ()) if name in there), None)


def image_files(folder: str | Path, *, tell: bool = True) -> list[Path]:
    """Find the images below a folder, by the rule that all commands follow.

    An image is a regular file whose name has one of torchvision's ``IMG_EXTENSIONS``, in upper or lower case. What is
    hidden, a file or a folder whose name starts with a dot, is left out, and so are pipes, devices and links that lead
    nowhere. Links to folders are followed; a file that is reached in several ways counts once, where its path has the
    fewest links.

    Args:
        folder: Folder to search.
        tell: Whether to say what is left out.

    Returns:
        Paths of the images, which start with ``folder``, sorted; empty if there are none.

    Raises:
        NotADirectoryError: If there is no such folder.
    """
    found = find(folder)
    tell_of_closed(found.closed)
    if found.odd and tell:
        logger.warning("Left out: %s.", _some(found.odd, "that is no regular file", "that are no regular files"))
    if tell:
        tell_of_unread(found.unread)
    if found.again and tell:
        logger.info("Left out below %s: %d links to images that are there already.", folder, found.again)
    return found.images


@dataclass(frozen=True)
class Found:
    """What is below a folder by the rule of :func:`image_files`.

    Attributes:
        images: The images, sorted.
        unread: Images by endings that are not read.
        odd: What is no regular file, though it has the name of an image.
        again: How many links lead to images that are there already.
        closed: Folders that cannot be looked into, and why.
    """

    images: list[Path]
    unread: list[Path]
    odd: list[Path]
    again: int
    closed: dict[Path, str]


def find(folder: str | Path, aside: Path | None = None) -> Found:
    """Find the images below a folder, and what is left out.

    Arguments and errors as for :func:`image_files`; a folder ``aside``, wherever links lead to it, is not looked into.
    """
    top = Path(folder)
    if not top.is_dir():
        msg = f"There is no folder {top} (looked for it from {Path.cwd()})."
        raise NotADirectoryError(msg)
    found: dict[str, Path] = {}
    odd: list[Path] = []
    unread: list[Path] = []
    again = 0
    closed: dict[Path, str] = {}
    for _, path, real in sorted(_walk(top, closed, aside and aside.resolve()), key=lambda one: (one[0], one[1].parts)):
        if not path.name.lower().endswith(IMG_EXTENSIONS):
            unread.append(path)
        elif real:
            again += found.setdefault(real, path) is not path
        else:
            odd.append(path)
    return Found(sorted(found.values()), unread, odd, again, closed)


def tell_of_closed(folders: Mapping[Path, str]) -> None:
    """Warn of folders that cannot be looked into, each with its reason."""
    for folder, reason in folders.items():
        logger.warning("Left out: the folder %s (%s).", folder, reason)


def tell_of_unread(paths: list[Path]) -> None:
    """Warn of files whose endings are not read, if there are any."""
    if paths:
        what = _some(paths, "whose ending is not read", "whose endings are not read")
        logger.warning("Left out: %s. Convert to one of %s, or rename.", what, " ".join(IMG_EXTENSIONS))


def _walk(top: Path, closed: dict[Path, str], aside: Path | None) -> Iterator[tuple[int, Path, str]]:
    """Yield what has the name of an image below a folder, read or not.

    That is the number of links on the way to it, its path, and its path without links, empty if it is no regular file.
    No folder is entered twice, and ``aside`` never; those that cannot be entered are added to ``closed``.
    """
    seen: set[tuple[int, int] | str] = set()
    links, folders = 0, [top]
    while folders:
        linked: list[Path] = []
        while folders:
            folder = folders.pop()
            try:
                status = folder.stat()
                # Some drives, as those of clouds are on Windows, give all folders the number 0.
                entered = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)
                if entered in seen:
                    continue
                seen.add(entered)
                real = folder.resolve()
                if aside is not None and real.is_relative_to(aside):
                    continue
                with os.scandir(real) as entries:
                    visible = [entry for entry in entries if not entry.name.startswith(".")]
            except OSError as error:
                closed[folder] = str(error.strerror)
                continue
            for entry in visible:
                path = folder / entry.name
                if _is_folder(entry):
                    (linked if entry.is_symlink() else folders).append(path)
                elif entry.name.lower().endswith((*IMG_EXTENSIONS, *_UNREAD)):
                    yield links + entry.is_symlink(), path, _real(entry)
        # Those that links lead to come last, so that a file is found where it lies. Of two links, the first by name.
        links, folders = links + 1, sorted(linked, reverse=True)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _real(entry: os.DirEntry) -> str:
    """The path of a file without links, where its folder's has none; empty if it is not a regular file.

    The system is asked nothing that it said when it listed the folder: one that is watched may hold thousands of files.
    """
    try:
        regular = entry.is_file()
    except OSError:  # a link to itself
        return ""
    if not regular:
        return ""
    return os.path.realpath(entry) if entry.is_symlink() else entry.path


def _some(paths: list[Path], one: str, many: str) -> str:
    shown = ", ".join(map(str, paths[:3])) + (", …" if len(paths) > 3 else "")
    return f"{shown}, {one}" if len(paths) == 1 else f"{len(paths)} entries {many} ({shown})"
