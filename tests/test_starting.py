# SPDX-License-Identifier: Apache-2.0
"""How commands start and end."""

import gc
import subprocess
import sys

from anomalib_flowood.cli.starting import loading


def test_no_garbage_is_looked_for_while_libraries_are_imported():
    with loading("little"):
        assert not gc.isenabled()
    assert gc.isenabled()


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
