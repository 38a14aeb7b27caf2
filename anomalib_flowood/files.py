# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and tables that no spreadsheet takes for formulas."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# What a spreadsheet takes for the beginning of a formula (OWASP, CSV Injection), quoted already or not.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Let a file appear whole or not at all, whenever the process ends and however full the disk is.

    Args:
        path: The file. What it held before stays until everything is written; a link stays a link.

    Yields:
        The file to write to: another one in the same folder, with the same suffix. It takes the place of ``path`` once
        it is on the disk, and is removed if an error is raised.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all."""
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")


def escaped(value: Any) -> Any:
    """Put an apostrophe before text that a spreadsheet would take for a formula: ``=``, ``+``, ``-``, ``@`` first."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def unescaped(value: Any) -> Any:
    """Undo :func:`escaped`."""
    return value[1:] if isinstance(value, str) and value.startswith("'") and _FORMULA.match(value) else value


def write_table(frame: pd.DataFrame, path: str | Path, **kwargs: Any) -> None:
    """Write a table as CSV without its index, texts :func:`escaped`.

    Args:
        frame: The table.
        path: The file, of :func:`whole_file` for one that appears whole.
        **kwargs: Those of :meth:`pandas.DataFrame.to_csv`.
    """
    texts: dict[str, Any] = {
        str(name): frame[name].map(escaped) for name in frame.select_dtypes(exclude=["number", "bool"])
    }
    frame.assign(**texts).to_csv(path, index=False, **kwargs)
