# SPDX-License-Identifier: Apache-2.0
"""What the documentation site makes of docstrings."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from operator import attrgetter
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([^`]+)`")
_CODE = re.compile(r"``([^`]+)``")
_FILLED = re.compile(r"\{[a-z_]+\}")


def _name(role: re.Match[str]) -> str:
    """A name as it is read: the last part where the role asks for that."""
    short, name = role.groups()
    return f"`{name.rpartition('.')[2] if short else name}`"


class AsRead(griffe.Extension):
    """Sphinx's roles, as anomalib's docstrings have them, become code; lists of registered names are filled in."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        del kwargs
        if not obj.docstring:
            return
        text = obj.docstring.value
        if _FILLED.search(text):  # as the package does when it is imported: anomalib_flowood.names.lists_names
            imported = import_module(obj.module.path)
            inside = obj.path.removeprefix(f"{obj.module.path}.")
            text = inspect.getdoc(imported if obj.is_module else attrgetter(inside)(imported)) or text
        obj.docstring.value = _CODE.sub(r"`\1`", _ROLE.sub(_name, text))
