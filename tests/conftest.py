# SPDX-License-Identifier: Apache-2.0
import gc
import inspect
import os
import signal
import sys

import pytest
from signal_stack import disable_signal_stack

# Before torch is imported, which counts its threads then. The models of these tests are too small for more than one,
# and `make test` runs a process for each of two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _stack(context: int = 1) -> list[inspect.FrameInfo]:
    """Return the frames of the calling function and of its callers, as `inspect.stack` does, without lines of source.

    Lightning asks at each checkpoint that it loads, and jsonargparse at each command line. For pytest's many frames the
    lines took 3 % of a sample of the tests' time; nobody looks at them.
    """
    del context
    frame, found = sys._getframe(1), []
    while frame is not None:
        code = frame.f_code
        found.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return found


inspect.stack = _stack


_LONG = (
    "test_notebooks.py",
    "test_engine.py",
    "test_readme.py",
    "test_large_images.py",
    "test_processes.py",
    "test_three_processes.py",
)
"""Modules with tests that take minutes, which are begun with: at the end, one of them would run alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each of the workers, which get as many of the tests each, one after the other, begin with long ones."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    others = [item for item in items if item.path.name not in _LONG]
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        room = (len(items) - len(ordered)) // (workers - worker)
        own = [item for name in _LONG[worker::workers] for item in items if item.path.name == name]
        filled = max(0, room - len(own))
        ordered += [*own, *others[:filled]]
        del others[:filled]
    items[:] = [*ordered, *others]


def pytest_collection_finish() -> None:
    """Take what has been imported out of the garbage collector's sight: benchmarks collect after every job.

    It looks less often, too. Tracing for an export makes objects by the hundred thousand, and few cycles.
    """
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """Detectors by name, each fitted once and exported once in each way, of which tests change nothing.

    An export takes half a minute: all workers have the same, and who needs one first makes it.
    """
    import torch
    from model_helpers import DETECTORS, Case

    own = tmp_path_factory.getbasetemp()
    common = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "exports"

    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            exports = common / name
            exports.mkdir(parents=True, exist_ok=True)
            made[name] = Case(tmp_path_factory.mktemp(name), DETECTORS[name](), exports=exports)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_stack_for_signals():
    """Undo what OpenVINO (2026.4) does to the thread that it computes on: its stack for signals is freed memory.

    The next signal that is handled would be the end of the process, in the midst of another test: that of a loader's
    process that ends, for which torch installs a handler once and for all.
    """
    yield
    from torch.utils.data._utils import signal_handling

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal_handling._SIGCHLD_handler_set = False
    if sys.platform == "linux":
        disable_signal_stack()
