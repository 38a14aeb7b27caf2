# SPDX-License-Identifier: Apache-2.0
import pandas as pd
import pytest
import torch

from benchmarks.scale.processes import difference, table


def rows(two: float, *, alike: bool = True, apart: float = 2e-6) -> pd.DataFrame:
    found = []
    for number, slower in enumerate((1.0, 1.0, 10.0)):  # in the last round both sides meet other work
        one = {"detector": "EmbeddingFlow", "images": 1200, "round": number, "processes": 1, "seconds": 9 * slower}
        found.append({**one, "alike": True, "difference": 0.0})
        found.append({**one, "processes": 2, "seconds": two * slower, "alike": alike, "difference": apart})
    return pd.DataFrame(found)


def test_table_of_rows():
    text = table(rows(5.0), "`the command`")
    assert text.startswith("`the command`\n\n| detector |")
    assert "| EmbeddingFlow | 1,200 | 9.0 | 5.0 | 1.80 | held | to the bit | 2e-06 |" in text


def test_table_says_what_is_not_as_it_should_be():
    text = table(rows(6.0, alike=False, apart=0.5), "")
    assert "| EmbeddingFlow | 1,200 | 9.0 | 6.0 | 1.50 | **not held** | **no** | **5e-01** |" in text


def test_difference_of_states():
    nan = torch.nan
    one = {"mean": torch.tensor([4.0, -2.0]), "empty": torch.empty(0), "unset": torch.tensor([nan, 0.0])}
    assert difference(one, one) == 0
    assert difference(one, {**one, "mean": torch.tensor([4.0, -1.0])}) == pytest.approx(0.25)
    assert difference(one, {**one, "unset": torch.tensor([0.0, 0.0])}) == float("inf")
    assert difference(one, {**one, "empty": torch.empty(1)}) == float("inf")
    assert difference(one, {key: one[key] for key in ("mean", "empty")}) == float("inf")
