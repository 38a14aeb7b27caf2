# SPDX-License-Identifier: Apache-2.0
import re
from importlib import import_module

import pytest

from benchmarks.results import KEY, append_rows, check_columns, failed, finished, read_rows


def row(detector, seed=0, **values):
    return {"part": "p", "task": "t", "detector": detector, "seed": seed, **values}


def test_the_last_row_of_a_key_counts(tmp_path):
    columns = (*KEY, "auroc", "error")
    append_rows(tmp_path, [row("a", error="broken"), row("b", auroc=0.5)], columns)
    assert finished(tmp_path) == {("p", "t", "b", 0)}
    append_rows(tmp_path, [row("a", auroc=0.75)], columns)
    rows = read_rows(tmp_path).set_index("detector")
    assert len(rows) == 2
    assert rows.loc["a", "auroc"] == 0.75
    assert finished(tmp_path) == {("p", "t", "a", 0), ("p", "t", "b", 0)}
    check_columns(tmp_path, columns)
    with pytest.raises(ValueError, match=r"measured other things \(their order\)"):
        check_columns(tmp_path, columns[::-1])


@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError("out of order\nand more"), "RuntimeError: out of order"), (KeyError(), "KeyError: ")],
)
def test_an_error_leaves_rows_and_a_traceback(tmp_path, error, said):
    keys = [("p", "t", "a", 0), ("q", "t", "a", 0)]
    output = tmp_path / "not there yet"
    rows = failed(output, keys, error)
    assert rows == [{**dict(zip(KEY, key, strict=True)), "error": said} for key in keys]
    log = (output / "errors.log").read_text()
    assert log.startswith("('p', 't', 'a', 0)\n")
    assert str(error).splitlines() == [] or "and more" in log


@pytest.mark.parametrize("name", ["contest", "paper", "scores"])
def test_published_tables_are_those_of_the_published_rows(name):
    report = import_module(f"benchmarks.{name}.report")
    text = (report.HERE / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(f"<!-- {name}: begin -->\n\n(.*?)<!-- {name}: end -->", text, re.DOTALL)
    assert shown.startswith(report.tables(read_rows(report.HERE)))
