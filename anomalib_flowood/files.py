# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and tables that no spreadsheet takes for formulas."""

from __future__ import annotations

import os
import re
import secrets
import shutil
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
        _sync(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_files(folder: str | Path, last: str) -> Iterator[Path]:
    """Let files that belong together appear in a folder once all of them are on the disk, or not at all.

    Only the renaming at the end, some microseconds, can be cut in half by a kill: then there is no file ``last``.

    Args:
        folder: Where they are to be; made if missing. What else it holds stays.
        last: Name of the one without which nobody reads the others: the earlier one goes first, the new one comes last.

    Yields:
        The folder to write to, within ``folder``. It is gone afterwards.
    """
    target = Path(os.path.realpath(folder))
    target.mkdir(parents=True, exist_ok=True)
    temporary = target / f".{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: file.name == last)
        for file in files:
            _sync(file)
        (target / last).unlink(missing_ok=True)
        for file in files:
            file.replace(target / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


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
