# SPDX-License-Identifier: Apache-2.0
"""How things look to a person, in every line, table, picture and page: colours, texts that fit, and paths."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

BLUE, SKY, ORANGE, GREEN, PURPLE, VERMILION = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
"""Okabe and Ito's colours, told apart by every common colour vision (https://jfly.uni-koeln.de/color)."""
GREY = "#777777"

PALETTE = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, GREY)
"""Colours of sets or detectors, in this order; where there is an inside set, the first is its own."""


def shorten(text: object, length: int, *, keep_end: bool = False) -> str:
    """Put a text on one line and cut it, with an ellipsis, to a length; at its beginning, if the end says more."""
    line = " ".join(str(text).split())
    if len(line) <= length:
        return line
    return f"…{line[1 - length :]}" if keep_end else f"{line[: length - 1]}…"


def short_names(names: Iterable[str], length: int) -> dict[str, str]:
    """Shorten names that stand side by side, so that they still differ.

    Args:
        names: The names, in any order; equal ones are one.
        length: The most characters of each, but for a number where nothing else would tell it from another.

    Returns:
        Each in short: those that begin alike keep their ends, and what looks the same even so gets its place, from 1.
    """
    names = list(dict.fromkeys(names))
    short = [shorten(name, length) for name in names]
    short = [
        shorten(name, length, keep_end=True) if short.count(text) > 1 else text
        for name, text in zip(names, short, strict=True)
    ]
    return {
        name: f"{text} #{place}" if short.count(text) > 1 else text
        for place, (name, text) in enumerate(zip(names, short, strict=True), start=1)
    }


def short_name(text: object, length: int) -> str:
    """Shorten a name for matplotlib's legends, which leave out names that begin with an underscore, or for an axis."""
    return _plain(shorten(text, length).lstrip("_"))


def heading(text: object, width: int) -> str:
    """Lay a name out as the title of a matplotlib figure: two lines at most, cut at a word if there are more."""
    return _plain(textwrap.fill(str(text), width, max_lines=2, placeholder="…"))


def from_here(path: str | Path) -> str:
    """A path as seen from the folder of the process; as it is where no way leads there, as to another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def typed(path: str | Path) -> str:
    """A path as it is typed in this system's shell. That of Windows knows no single quotes."""
    return subprocess.list2cmdline([str(path)]) if sys.platform == "win32" else shlex.quote(str(path))


def _plain(text: str) -> str:
    """Text for matplotlib, in which dollars make no formula."""
    return text.replace("$", r"\$")
