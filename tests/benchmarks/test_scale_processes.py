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


def test_difference_is_of_scores_in_their_spread():
    key = "post_processor.calibration"
    one = {key: torch.tensor([1.0, 2.0, 3.0]), "bank": torch.tensor([4.0, -2.0])}
    assert difference(one, {**one, "bank": torch.tensor([-2.0, 4.0])}) == 0  # what is kept in another order
    assert difference(one, {**one, key: torch.tensor([1.0, 2.25, 3.0])}) == pytest.approx(0.25)
    assert difference(one, {**one, key: torch.tensor([1.0, 2.0])}) == float("inf")
