# SPDX-License-Identifier: Apache-2.0
"""Train and test many detectors on many data sets, and compare them on their raw scores.

The configuration file is anomalib's, with an optional ``benchmark.trainer`` and an optional ``name`` in each entry::

    accelerator: cpu
    benchmark:
      seed: 42
      trainer: {max_epochs: 5}
      model:
        grid:
          - {class_path: PixelFlow, name: cycle, init_args: {mask: cycle}}
          - {class_path: anomalib.models.Dfm}
      data:
        class_path: CrossDataset
        init_args: {in_distribution: fashion_mnist, out_of_distribution: [mnist]}

Detectors post-process their scores each in its own way (anomalib's clamps them to [0, 1], which makes ties), so every
detector's scores are taken before that happens, and all metrics are computed from them alike. Where the data name
several out-of-distribution sets, each of them has its own (``AUROC/mnist``), and ``AUROC/mean`` is their average.
"""

from .building import another_process_ended, build, built_at_once, can_be_mended, find_class, out_of_memory, readable
from .jobs import BenchmarkJob, BenchmarkJobGenerator, check_seed
from .recording import ScoreRecorder, measure
from .results import Results
from .runner import Benchmark, BenchmarkError, BenchmarkRunner

__all__ = [
    "Benchmark",
    "BenchmarkError",
    "BenchmarkJob",
    "BenchmarkJobGenerator",
    "BenchmarkRunner",
    "Results",
    "ScoreRecorder",
    "another_process_ended",
    "build",
    "built_at_once",
    "can_be_mended",
    "check_seed",
    "find_class",
    "measure",
    "out_of_memory",
    "readable",
]
