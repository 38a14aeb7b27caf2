# SPDX-License-Identifier: Apache-2.0
"""The page that shows an explanation's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from anomalib_flowood.files import write_text
from anomalib_flowood.report.markup import render

from .cases import Case


class Picture(NamedTuple):
    """A picture on the page.

    Attributes:
        file: Its name in the page's folder; empty where single images are explained in its place.
        title: Heading.
        caption: What the reader sees.
        cases: The images that are explained.
    """

    file: str
    title: str
    caption: str
    cases: Sequence[Case] = ()


def write_page(
    path: Path, title: str, introduction: str, header: list[str], rows: list[list[str]], pictures: list[Picture]
) -> Path:
    """Write the page, beside its pictures and ``explain.json``; everything given is text and is escaped.

    The first cell of each row of the table is its name.
    """
    text = render("explain.html", title=title, introduction=introduction, header=header, rows=rows, pictures=pictures)
    write_text(path, text)
    return path
