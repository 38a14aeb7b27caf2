# SPDX-License-Identifier: Apache-2.0
import time

import pytest
import torch

from benchmarks.peak import Peak, anonymous, unshared


@pytest.mark.parametrize("measure", [anonymous, unshared])
def test_peak_sees_what_is_taken(measure):
    if measure() is None:
        pytest.skip("anonymous memory is read from /proc, which this system lacks")
    with Peak(measure, 0.001) as peak:
        block = torch.ones(2**26)
        for _ in range(500):  # a look may take long where other work is done
            if peak.above_rest / 2**30 > 0.2:
                break
            time.sleep(0.02)
        del block
    assert 0.2 < peak.above_rest / 2**30 < 0.6
    assert peak.most == peak.rest + peak.above_rest


def test_what_cannot_be_told_has_no_peak():
    with Peak(lambda: None) as peak:
        pass
    assert peak.above_rest is None
