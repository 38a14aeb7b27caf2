# SPDX-License-Identifier: Apache-2.0
"""The page that shows an explanation's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jinja2

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; overflow-wrap: anywhere; }
figure { margin: 0 0 1rem; }
figure a { display: block; overflow-x: auto; }
img { display: block; max-width: 100%; min-width: 36rem; height: auto; background: white; border-radius: .4rem; }
figcaption { margin-top: .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; overflow-wrap: anywhere; min-width: 9rem; }
tr { border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ introduction }}</p>
<div class="wide">
<table>
<tr>{% for name in header %}<th scope="col">{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for value in row[1:] %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</div>
{% for picture in pictures %}
<h2>{{ picture.title }}</h2>
<figure>
<a href="{{ picture.file }}"><img src="{{ picture.file }}" alt="{{ picture.title }}"></a>
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
<p>All numbers: <a href="explain.json">explain.json</a></p>
</body>
</html>
"""


class Picture(NamedTuple):
    """A picture on the page.

    Attributes:
        file: Its name in the page's folder.
        title: Heading.
        caption: What the reader sees.
    """

    file: str
    title: str
    caption: str


def write_page(
    path: Path, title: str, introduction: str, header: list[str], rows: list[list[str]], pictures: list[Picture]
) -> Path:
    """Write the page; everything given is text and is escaped.

    Args:
        path: File to write; the pictures and ``explain.json`` lie beside it.
        title: Heading of the page.
        introduction: First paragraph.
        header: Names of the table's columns.
        rows: The table's cells, the first of each row being its name.
        pictures: What to show, in this order.

    Returns:
        The path written.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(_TEMPLATE).render(
        title=title, introduction=introduction, header=header, rows=rows, pictures=pictures
    )
    path.write_text(text, encoding="utf-8")
    return path
