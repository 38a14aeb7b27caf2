# SPDX-License-Identifier: Apache-2.0
"""What libraries say, and no user of the command can act on."""

from __future__ import annotations

import logging
import warnings

_TALKATIVE = ("onnxscript", "onnx_ir")
"""Loggers that tell of every node of a graph."""

_LINES = (
    "litlogger",  # an advertisement
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
)


def _can_be_acted_on(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(line in message for line in _LINES)


def quieten(handler: logging.Handler) -> None:
    """Leave out of a handler, and of what Python warns of, what no user can act on; every other line stays."""
    handler.addFilter(_can_be_acted_on)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_can_be_acted_on)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
