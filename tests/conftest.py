# SPDX-License-Identifier: Apache-2.0
import gc
import os
import signal

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


@pytest.fixture(autouse=True)
def _no_handler_of_ended_processes():
    """Undo what torch's loaders with processes install, once and for all.

    OpenVINO leaves a stack for signals behind that it has freed (2026.4): the next end of any process would be the end
    of this one, in the midst of another test.
    """
    yield
    from torch.utils.data._utils import signal_handling

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal_handling._SIGCHLD_handler_set = False
