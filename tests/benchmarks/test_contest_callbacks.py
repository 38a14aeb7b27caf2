# SPDX-License-Identifier: Apache-2.0


from benchmarks.contest.callbacks import levelled_off


def test_levelled_off():
    assert not levelled_off([10, 9, 8, 7, 6])
    assert not levelled_off([10, 10, 10])
    assert levelled_off([10, 10, 10, 9.999])
    assert levelled_off([-10, -10.01, -10.02, -10.03])  # less than half a percent
    assert not levelled_off([-10, -10.1, -10.2, -10.3])
