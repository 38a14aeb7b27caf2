# SPDX-License-Identifier: Apache-2.0
"""How commands start and end: what they load, and what signals do to them."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from anomalib_flowood import quiet_imports


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say what is being imported, on a terminal; a signal then ends the process at once.

    Python collects garbage as objects pile up, and at its end. Nothing of what is imported is garbage, and there is so
    much of it that looking takes a quarter of the import and most of the end: it is kept out of the collector's sight.
    """
    from rich.console import Console

    atexit.register(_leave_the_rest)
    collecting = gc.isenabled()
    gc.disable()
    with (
        _handled_by(_leave, signal.SIGINT, signal.SIGTERM),
        Console(stderr=True).status(f"loading {what}"),
        quiet_imports(),
    ):
        try:
            yield
        finally:
            if collecting:
                gc.enable()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let a signal end the command with the status that says so, 128 and its number: 130 of Ctrl-C, 143 of SIGTERM.

    Lightning takes both for the regular end of a training. A file that was being written does not appear: see
    :mod:`anomalib_flowood.files`.
    """
    try:
        with _handled_by(_terminate, signal.SIGTERM):
            yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            sys.exit(128 + signal.SIGINT)
        raise


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], NoReturn], *signals: signal.Signals) -> Iterator[None]:
    """Let a function handle signals for a while, in the main thread, the only one that can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def _leave_the_rest() -> None:
    """Collect no garbage at the end, and let no library complain of what that leaves to the system, as Triton does."""
    gc.freeze()
    with suppress(OSError):  # without file descriptors nobody hears it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End the process at once: what is half imported does not survive an exception, and nothing has been written."""
    del frame
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # the cursor, which a spinner has hidden
        sys.stderr.flush()
    os._exit(128 + number)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End whatever is running, however deep in the stack."""
    del frame
    sys.exit(128 + number)
