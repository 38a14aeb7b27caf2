# SPDX-License-Identifier: Apache-2.0
"""What a process that Lightning has started beside rank 0 knows before PyTorch is imported."""

from __future__ import annotations

import logging
import os
import time

_FOR_ALL = ("anomalib", "anomalib_flowood", "lightning")
"""Packages that say the same in every process."""

_OF_FILES = ("anomalib_flowood.data.decoding", "anomalib_flowood.data.skipping")
"""Loggers that name files, which one process alone may have met."""

_PARENT = os.getppid()


def was_started() -> bool:
    """Whether this process was started beside rank 0; known before the two are connected."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def is_said_once(record: logging.LogRecord) -> bool:
    """Whether a line is that of rank 0, or one that rank 0 does not say: an error, or a warning of one process's files.

    Progress, and warnings of data, settings and detector, are the same in every process.
    """
    if record.levelno >= logging.ERROR or not was_started():
        return True
    ours = record.name.partition(".")[0] in _FOR_ALL and record.name not in _OF_FILES
    return record.levelno >= logging.WARNING and not ours


def rank_zero_ends(seconds: float = 5.0) -> bool:
    """Whether this process was started by rank 0, and that has ended or does so within some seconds.

    Then both have the same error, or this one fails because rank 0 is gone: rank 0 says what is wrong. Where rank 0
    goes on, only this process can.
    """
    until = time.monotonic() + seconds
    while was_started() and os.getppid() == _PARENT and time.monotonic() < until:
        time.sleep(0.05)
    return was_started() and os.getppid() != _PARENT
