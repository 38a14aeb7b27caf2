# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from benchmarks.peak import PeakMemory


def test_peak_memory_sees_what_is_taken():
    if PeakMemory.now() is None:
        pytest.skip("peak memory is read from /proc, which this system lacks")
    with PeakMemory(0.001) as memory:
        block = torch.ones(2**26)
        del block
    assert 0.2 < memory.gib < 0.6
