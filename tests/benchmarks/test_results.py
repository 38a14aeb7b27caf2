# SPDX-License-Identifier: Apache-2.0
import argparse
import re
import sys
from importlib import import_module

import pytest

from benchmarks.results import (
    KEY,
    append_rows,
    check_columns,
    failed,
    finished,
    positive,
    read_rows,
    refused,
    seconds,
    seed,
)


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


@pytest.mark.parametrize("name", ["NA", "nan", "None", "007"])
def test_a_folder_of_any_name_is_finished_once(tmp_path, name):
    """One that was called "NA" was run again each time."""
    append_rows(tmp_path, [{**row("a", auroc=0.5), "task": name}], (*KEY, "auroc", "error"))
    assert finished(tmp_path) == {("p", name, "a", 0)}


@pytest.mark.parametrize("text", ["0", "-4"])
@pytest.mark.parametrize("name", ["suite", "contest", "paper"])
def test_a_trial_is_of_some_images(name, text, monkeypatch, capsys):
    """Of none it was no trial: everything was run, for hours."""
    monkeypatch.setattr(sys, "argv", [name, "run", f"--limit={text}"])
    with pytest.raises(SystemExit) as exit_info:
        import_module(f"benchmarks.{name}.__main__").main()
    assert exit_info.value.code == 2
    assert f"argument --limit: has to be 1 at least, not {text}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("read", "text"), [(seed, "-1"), (seed, str(2**32)), (seconds, "0"), (seconds, "nan"), (positive, "0")]
)
def test_arguments_that_nothing_can_be_run_with(read, text):
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        read(text)


def test_an_error_is_printed_as_it_is(capsys):
    """A folder called "[/b]" ended in an error of the printer's."""
    assert refused(ValueError("There is no [/b] or [red].")) == 2
    assert capsys.readouterr().err == "error: There is no [/b] or [red].\n"


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
