# SPDX-License-Identifier: Apache-2.0
"""Output that nobody reads to its end, or that has no letters for the name of a file."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Output(io.TextIOWrapper):
    """Standard output that goes nowhere once its reader is gone."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


@contextmanager
def unheard() -> Iterator[None]:
    """Let a command end its work, files and status, where its output is read in part (``flowood predict … | head -1``).

    Without it, the first line that nobody reads would end the command, whatever was left to be written. So would the
    name of a file that is not in UTF-8, as old cameras and archives have them: it is shown with escapes.

    Raises:
        SystemExit: With status 1, if the output cannot be written, which standard error is told.
    """
    given = sys.stdout
    if type(given) is not io.TextIOWrapper:  # a test's, a notebook's
        yield
        return
    given.flush()
    # A C locale without UTF-8 knows bytes of names, and no letters of ours: not those of a progress bar either.
    lacking = {"strict"} if codecs.lookup(given.encoding).name == "utf-8" else {"strict", "surrogateescape"}
    errors = "backslashreplace" if given.errors in lacking else given.errors  # as standard error has it
    sys.stdout = _Output(given.buffer, encoding=given.encoding, errors=errors, line_buffering=given.line_buffering)
    try:
        yield
    finally:
        mine, sys.stdout = sys.stdout, given
        try:
            mine.flush()
        except OSError as error:  # a full disk's
            mine._discard()  # which Python would try to write again as it ends
            print(f"flowood: the output cannot be written: {error.strerror}", file=sys.stderr)
            sys.exit(1)
        finally:
            mine.detach()
