# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and tables that no spreadsheet takes for formulas."""

from __future__ import annotations

import csv
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    import pandas as pd

NAMES: Final = "surrogateescape"
"""How text is written and read in which names of files may be: of one that is not in UTF-8 the very bytes."""

_WORKPLACE = ".flowood-"
"""What the names of folders begin with in which files are written, before they take their places."""

# What a spreadsheet takes for the beginning of a formula (OWASP, CSV Injection), quoted already or not.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Let a file appear whole or not at all, whenever the process ends and however full the disk is.

    Args:
        path: The file. What it held before stays until everything is written; a link stays a link.

    Yields:
        The file to write to: another one, on the same disk, with the same suffix. It takes the place of ``path`` once
        it is on the disk, and is removed if an error is raised.
    """
    target = Path(os.path.realpath(path))
    try:
        with _workplace(target.parent) as folder:
            temporary = folder / f".new{target.suffix}"
            yield temporary
            _sync(temporary)
            temporary.replace(target)
    except OSError as error:
        if _WORKPLACE in str(error.filename):  # which no user knows of
            error.filename = str(target)
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
    with _workplace(target) as temporary:
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: file.name == last)
        for file in files:
            _sync(file)
        (target / last).unlink(missing_ok=True)
        for file in files:
            file.replace(target / file.name)


@contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    """Make a hidden folder to write in, within another one, for a while.

    It is locked as long as its process lives, so that folders which killed processes have left can be told from those
    in use, even by another machine. The next process that writes there removes the former.

    A signal that ends the process (Ctrl-C, SIGTERM) leaves none, even one that arrives while the folder is made or
    removed: its name is known before, and removing it is begun anew.
    """
    _remove_abandoned(parent)
    folder, lock = parent / f"{_WORKPLACE}{secrets.token_hex(8)}", None
    try:
        try:
            lock = _made(folder)
            yield folder
        finally:
            try:
                shutil.rmtree(folder, ignore_errors=True)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            finally:
                if lock is not None:
                    os.close(lock)
    except (OSError, RuntimeError) as error:  # of rmtree, of PyTorch's writer: they hide the signal that ended them
        if isinstance(error.__context__, KeyboardInterrupt | SystemExit):
            raise error.__context__ from None
        raise


def _made(folder: Path) -> int | None:
    """Make a folder, for its owner alone, and lock it; see :func:`_locked`."""
    while True:
        folder.mkdir(mode=0o700)
        lock = _locked(folder, wait=True)
        if folder.exists():
            return lock
        # Another process has taken it for abandoned before it was locked.
        if lock is not None:
            os.close(lock)


@cache  # a process leaves none behind for itself, and listing large folders takes time
def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_WORKPLACE}*"):
        lock = _locked(folder, wait=False)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path, wait: bool) -> int | None:
    """Lock a folder until it is closed, or the process ends, in whatever way.

    Returns:
        The open folder; nothing if it is in use, or gone, or its disk or this system knows no locks on folders. Where
        none are known nothing is ever taken for abandoned.
    """
    if sys.platform == "win32":
        return None
    opened = None
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if opened is not None:
            os.close(opened)
        return None
    return opened


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it, on other machines, too, out of a folder while this one lives.

    Where its disk or this system knows no locks on folders, nobody is kept out.

    Raises:
        BlockingIOError: If another process has it.
    """
    if sys.platform == "win32":
        yield
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = f"Another process writes to {folder}: wait until it is through, or end it."
            raise BlockingIOError(msg) from None
        except OSError:
            pass
        yield
    finally:
        os.close(opened)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def check_writable(folder: Path) -> None:
    """Refuse a folder that may not be written to, or made, before the work whose results are to go there.

    Raises:
        PermissionError: If so.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, except hidden ones; links to folders are not followed.

    A folder that goes meanwhile, as that in which another process writes a file, has none; ``Path.rglob`` raises.
    """
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (Path(place, name) for name in names if name[0] != ".")


def at_home(path: str | Path) -> Path:
    """Put the home folder in the place of ``~``, as a shell does: a name that begins so, and is no user's, stays."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user, or no home
        return Path(path)


def write_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all; names of files with :data:`NAMES`."""
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8", errors=NAMES)


def escaped(value: Any) -> Any:
    """Put an apostrophe before text that a spreadsheet would take for a formula: ``=``, ``+``, ``-``, ``@`` first."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def unescaped(value: Any) -> Any:
    """Undo :func:`escaped`."""
    return value[1:] if isinstance(value, str) and value.startswith("'") and _FORMULA.match(value) else value


def quoting(values: Iterable[Any]) -> Literal[0, 2]:
    """How to quote a row of these: what needs it. Before Python 3.13 a carriage return, which ends rows, did not."""
    returns = any(isinstance(value, str) and "\r" in value for value in values)
    return csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL


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
    quoted = quoting(value for column in texts.values() for value in column)
    frame.assign(**texts).to_csv(path, index=False, errors=NAMES, quoting=quoted, **kwargs)
