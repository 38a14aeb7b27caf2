# SPDX-License-Identifier: Apache-2.0
"""Pages: one look for all of them, everything that is put into them escaped."""

from __future__ import annotations

from typing import Any

import jinja2

from anomalib_flowood.look import BLUE, SKY


def render(template: str, **values: Any) -> str:
    """Fill one of the templates in ``templates/``; they extend ``base.html``, which holds the common style.

    Args:
        template: Its file name.
        **values: What it shows. Text is escaped.

    Returns:
        The page.

    Raises:
        jinja2.UndefinedError: If the template needs a value that is not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("anomalib_flowood.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(BLUE=BLUE, SKY=SKY)
    return environment.get_template(template).render(**values)
