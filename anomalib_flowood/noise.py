# SPDX-License-Identifier: Apache-2.0
"""Messages of libraries that no user can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from anomalib_flowood.started import is_said_once

_TALKATIVE = ("onnxscript", "onnx_ir")
"""Loggers that tell of every node of a graph."""

_PROGRESS = ("lightning.pytorch", "lightning.fabric", "lightning_fabric")
"""Loggers of a training's progress, whose level is INFO from their import on; what is imported last tells of it all."""

_LINES = (
    "litlogger",  # an advertisement
    "openvino_telemetry file",  # where the home folder may not be written
    "directory for storing client ID",  # the same
    "generated new fontManager",  # of Matplotlib, on its first use
    "Unexpected keys",  # the head of a classifier, of which a feature extractor has none
    "will override existing callbacks",  # those that the detector brings; anomalib adds its own first
    "has None output",  # what an exported detector does not have, a map for one
    "Skipping constant argument",  # the same
)
_LOGGERS = ("torch.onnx._internal.exporter._core",)
"""Loggers with a handler of their own."""

_WARNINGS = (
    ".*LeafSpec",  # Lightning's use of PyTorch
    ".*module\\(s\\) in eval mode",  # a frozen backbone
    ".*returned `None`, this fit will run with no optimizer",  # a density fitted in closed form
    "Image size .* could be decompression bomb",  # ours names the file
    "The dirpath has changed",  # results of a prediction have a folder of their own
    ".*is not defined: there are no ",  # which the table of a test says, and a line of ours, once for all metrics
    "Glyph .* missing from (current )?font",  # Matplotlib's has no letters of some scripts: pages have all of them
)


def _can_be_acted_on(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(line in message for line in _LINES)


def quieten(handler: logging.Handler) -> None:
    """Keep what no user can act on out of a handler and of Python's warnings; every other line stays.

    Of several processes, one alone says what all of them would.
    """
    handler.addFilter(_can_be_acted_on)
    handler.addFilter(is_said_once)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_can_be_acted_on)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    _ignore_warnings()


@contextmanager
def quiet_training() -> Iterator[None]:
    """Let a training within a call from Python say only what can be acted on, and nothing of its progress."""
    levels = {name: logging.getLogger(name).level for name in _PROGRESS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            _ignore_warnings()
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _ignore_warnings() -> None:
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
