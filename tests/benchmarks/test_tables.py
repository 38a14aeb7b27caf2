# SPDX-License-Identifier: Apache-2.0
import pandas as pd
import pytest

from benchmarks.tables import Column, markdown, mean_sd, short_number


def test_markdown():
    assert markdown(["a", "b"], [["x", "1"], ["y", "2"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |"
    assert markdown(["a", "b"], [], numbers=False) == "| a | b |\n| --- | --- |"


@pytest.mark.parametrize(
    ("values", "text", "short"),
    [([], "–", "–"), ([None], "–", "–"), ([0.25], "0.250", "0.250"), ([1234.4, None], "1234.400", "1,234"),
     ([1.0, 2.0], "1.500 ± 0.707", "1.50"), ([0.0], "0.000", "0")],
)  # fmt: skip
def test_cells(values, text, short):
    series = pd.Series(values, dtype=float)
    assert (mean_sd(series), short_number(series)) == (text, short)


def test_a_column_is_a_mean_over_tasks_for_each_seed():
    rows = pd.DataFrame({"seed": [0, 0, 1, 1], "task": list("abab"), "auroc": [0.5, 0.75, 0.25, 0.75]})
    assert Column("AUROC", "auroc").values(rows).tolist() == [0.625, 0.5]
    only = Column("AUROC", "auroc", where=lambda part: part["task"] == "b")
    assert only.values(rows).tolist() == [0.75, 0.75]
