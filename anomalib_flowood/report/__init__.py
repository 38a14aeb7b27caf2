# SPDX-License-Identifier: Apache-2.0
"""What a person looks at during and after a benchmark: progress, a table and score histograms."""

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
