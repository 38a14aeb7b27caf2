# SPDX-License-Identifier: Apache-2.0
"""The command ``flowood``: anomalib's command line with this package's detectors and data, and what that one lacks.

Importing anomalib takes seconds, so nothing here imports it before a subcommand is to run.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from anomalib_flowood import __version__
from anomalib_flowood.cli.help import COMPLETION, PARSED, help_level, overview, short_help, unknown, without_levels
from anomalib_flowood.cli.output import unheard
from anomalib_flowood.cli.starting import ended_by_signals, loading
from anomalib_flowood.cli.subcommands import SUBCOMMANDS, WRITTEN
from anomalib_flowood.files import at_home
from anomalib_flowood.noise import quieten
from anomalib_flowood.parsing import ALL, HELP_LEVEL, FlowoodParser
from anomalib_flowood.started import rank_zero_ends

_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
"""Errors of files and folders that this user may not read or write."""

_OTHER_KIND = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
"""Errors of a file where a folder has to be, or a folder where a file has to be."""


def _configure_logging() -> None:
    """Send log lines to stderr once; anomalib's own set-up prints each one twice."""
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False)
    quieten(handler)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    An error that the user can mend ends with its message and exit status 1, one in the command line itself with 2; a
    prediction that had to leave out files which it could not read, with 3.
    With the environment variable ``FLOWOOD_DEBUG=1`` every error shows its traceback.

    Args:
        args: The arguments after the command's name; the process's own if not given.
    """
    given = [_at_home(argument) for argument in (sys.argv[1:] if args is None else args)]
    if not given:
        print(overview(), file=sys.stderr)
        sys.exit(2)
    at_once = _at_once(given)
    if at_once is not None:
        with unheard():
            print(at_once)
        return
    _refuse_empty(given)
    level = help_level(given)
    token = HELP_LEVEL.set(ALL if level is None else level)
    try:
        with warnings.catch_warnings(), unheard(), ended_by_signals():
            _configure_logging()
            _run(given if level is None else without_levels(given))
    finally:
        HELP_LEVEL.reset(token)


def _at_home(argument: str) -> str:
    """Expand ``--option=~/…``, which shells leave as it is; taken as a path, it would make a folder called ``~``."""
    option, given, value = argument.partition("=")
    return f"{option}={at_home(value)}" if given and option[:2] == "--" and value[:1] == "~" else argument


def _at_once(given: list[str]) -> str | None:
    """What can be answered without importing anomalib; ``None`` where it takes more."""
    first, *others = given
    if first == "--version":
        return f"flowood {__version__} (anomalib {version('anomalib')}, torch {version('torch')})"
    if first in ("-h", "--help"):
        return overview()
    if first.partition("=")[0] == COMPLETION:
        from anomalib_flowood.cli.completion import completion

        try:
            return completion(first.partition("=")[2] or "".join(others[:1]))
        except ValueError as error:
            _refuse(str(error))
    if first.partition("=")[0] not in {*SUBCOMMANDS, *PARSED}:
        _refuse(unknown(first))
    return short_help(first) if first in SUBCOMMANDS and help_level(given) == 0 else None


def _refuse_empty(given: list[str]) -> None:
    """Refuse empty arguments: taken as a path, one is the current folder, whose files would be read or moved."""
    for before, argument in pairwise(given):
        option, assigned, value = argument.partition("=")
        if not argument or (assigned and not value and option[:2] == "--"):
            name = option or (before if before[:2] == "--" else "An argument")
            if name != "--data" or given[0] == "predict":  # others say what --data may be
                _refuse(f"{name} is empty. Is it a variable of the shell that is not set?")


def _refuse(message: str) -> NoReturn:
    print(f"flowood: {message}", file=sys.stderr)
    sys.exit(2)


def _run(args: list[str]) -> None:
    known = SUBCOMMANDS.get(args[0])
    if known is not None and known.module:
        _run_at_once(args[0], args[1:])
        return
    from anomalib_flowood.configuration import check_arguments

    try:
        _check_here()
        check_arguments(args)
    except (ValueError, OSError) as error:  # as a parser answers what it cannot read
        _refuse(str(error))
    with loading(f"anomalib and PyTorch for flowood {args[0]}"):
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from anomalib_flowood.benchmark import BenchmarkError, can_be_mended, readable
        from anomalib_flowood.cli.commands import FlowoodCLI

    logging.getLogger("lightning").handlers.clear()  # which print a second time what the root's handler shows
    try:
        with _told_by_rank_zero():
            FlowoodCLI(args)
    # What a user can mend: a wrong value, a missing file, a training that diverged, a trainer that cannot be set up, a
    # job that failed, an extra that is not installed.
    except (
        ValueError, OSError, ArithmeticError, MisconfigurationException, BenchmarkError, ModuleNotFoundError,
    ) as error:  # fmt: skip
        _fail(error, readable(error), args[0], debuggable=not isinstance(error, BenchmarkError))
    except (MemoryError, RuntimeError, TypeError) as error:
        if not can_be_mended(error):
            raise
        _fail(error, readable(error), args[0])


def _check_here() -> None:
    """Refuse to run in a folder that is gone, of which the system says no more than that something is not there."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        msg = "The folder that this runs in has been removed: change into another one."
        raise FileNotFoundError(msg) from error


@contextmanager
def _told_by_rank_zero() -> Iterator[None]:
    """Let a process that was started beside rank 0 end in silence if rank 0 ends, too."""
    try:
        yield
    except Exception:  # any error is passed on, unless rank 0 ends by it, too, and reports it
        if os.environ.get("FLOWOOD_DEBUG") != "1" and rank_zero_ends():
            sys.exit(1)
        raise


def _run_at_once(name: str, args: list[str]) -> None:
    """Run a subcommand that needs no anomalib."""
    module = import_module(SUBCOMMANDS[name].module)
    parser = FlowoodParser(prog=f"flowood {name}")
    module.add_arguments(parser)
    arguments = parser.parse_args(args)
    try:
        module.run(arguments)
    except (ValueError, OSError) as error:
        _fail(error, str(error), name)


def _fail(error: Exception, message: str, name: str, debuggable: bool = True) -> NoReturn:
    """End with an error that a user can mend."""
    if isinstance(error, OSError) and error.filename and error.errno in _FORBIDDEN | _OTHER_KIND:
        message = f"{_in_the_way(error)}. To write elsewhere, {_elsewhere(name)}."
    if os.environ.get("FLOWOOD_DEBUG") == "1":
        raise error
    print(f"flowood: {message}", file=sys.stderr)
    if debuggable:
        print("(FLOWOOD_DEBUG=1 shows where this came from.)", file=sys.stderr)
    sys.exit(1)


def _in_the_way(error: OSError) -> str:
    """Say which file or folder is in the way, or may not be accessed, by an error that names one."""
    path = Path(os.fsdecode(error.filename))
    file = next((part for part in (path, *path.parents) if part.is_file()), None)
    if error.errno in _OTHER_KIND and path.is_dir():
        return f"{path} is a folder, where a file has to be"
    if error.errno in _OTHER_KIND and file is not None:
        return f"{file} is a file, where a folder has to be"
    return f"{path} may not be read or written ({error.strerror})"


def _elsewhere(name: str) -> str:
    """Say how a subcommand is told to write elsewhere."""
    if name == "benchmark":
        return "run it in another folder"
    known = SUBCOMMANDS[name].names if name in SUBCOMMANDS else ()
    return next((f"name {option}" for option in WRITTEN if option in known), "name another folder")
