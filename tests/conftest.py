# SPDX-License-Identifier: Apache-2.0
import gc
import os

import pytest

# Before torch is imported, which counts its threads then. The models of these tests are too small for more than one,
# and `make test` runs a process for each of two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Take what has been imported out of the garbage collector's sight: benchmarks collect after every job."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    import torch

    torch.manual_seed(0)
