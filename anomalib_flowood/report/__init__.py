# SPDX-License-Identifier: Apache-2.0
"""What a person looks at during and after a benchmark: progress, a table and score histograms.

What is offered here is fetched when it is asked for: a run's folder is read without PyTorch and Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plots import score_histograms
    from .progress import JobProgress
    from .table import benchmark_markdown, benchmark_table, image_table, set_markdown, set_table, summarise

__all__ = [
    "JobProgress",
    "benchmark_markdown",
    "benchmark_table",
    "image_table",
    "score_histograms",
    "set_markdown",
    "set_table",
    "summarise",
]

_MODULES = {"JobProgress": "progress", "score_histograms": "plots"}
"""Where to find it, but for tables."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'table')}"), name)
