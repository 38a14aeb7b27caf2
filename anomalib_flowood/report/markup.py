# SPDX-License-Identifier: Apache-2.0
"""Pages: one look for all of them, everything that is put into them escaped."""

from __future__ import annotations

import json
import math
from typing import Any

import jinja2

from anomalib_flowood.look import BLUE, SKY, VERMILION

from .decisions import percent


def render(template: str, **values: Any) -> str:
    """Fill one of the templates in ``templates/``; they extend ``base.html``, which holds the common style.

    Text is escaped; a value that the template needs and that is not given is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("anomalib_flowood.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(BLUE=BLUE, SKY=SKY, VERMILION=VERMILION, percent=percent)
    environment.filters["json"] = script_json
    return environment.get_template(template).render(**values)


def script_json(value: Any) -> str:
    """Write plain data as JSON for a script element, which no text in it can close."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def finite(value: Any) -> Any:
    """Replace what JSON cannot express, NaN and infinities, by null."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
