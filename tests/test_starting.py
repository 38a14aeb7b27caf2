# SPDX-License-Identifier: Apache-2.0
"""How commands start and end."""

import gc
import subprocess
import sys
import warnings

import pytest

from anomalib_flowood.cli.starting import loading


def test_no_garbage_is_looked_for_while_libraries_are_imported():
    with loading("little"):
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("kind", [FutureWarning, SyntaxWarning])
def test_warnings_of_the_code_of_libraries_are_not_heard(kind, recwarn):
    with loading("little"):
        warnings.warn("of an import", kind, stacklevel=1)
    assert not recwarn.list


def test_nor_is_it_among_what_was_imported_when_the_process_ends():
    code = (
        "import atexit, gc\n"
        "from anomalib_flowood.cli.starting import loading\n"
        "atexit.register(lambda: print(gc.get_freeze_count()))\n"  # the first comes last
        "with loading('little'): pass\n"
        "print(gc.get_freeze_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 1_000 < after


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc to say something when the process ends")
@pytest.mark.parametrize("loads", [False, True])
def test_what_libraries_say_of_objects_that_are_left_is_not_heard(loads):
    """Triton (3.9), which PyTorch brings, has thirty lines on them. What is said before is heard."""
    code = (
        "import ctypes, sys\n"
        "from anomalib_flowood.cli.starting import loading\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.on_exit(libc.perror, None)\n"  # behind all that Python does
        f"if {loads}:\n"
        "    with loading('little'): pass\n"
        "print('before', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("before\n")
    assert (done.stderr == "before\n") == loads
