# SPDX-License-Identifier: Apache-2.0
"""The table of every outside set on its own."""

import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from anomalib_flowood.metrics import MOST_SETS
from anomalib_flowood.report.table import benchmark_markdown, set_markdown, set_table


def row(detector: str, data: str, sets: dict[str, float], **more: object) -> dict:
    values = {f"AUROC/{name}": value for name, value in sets.items()}
    values |= {f"FPR95/{name}": 1 - value for name, value in sets.items()}
    return {"detector": detector, "data": data, "seed": 0, "AUROC": 0.5, "FPR95": 0.5, "error": np.nan} | values | more


def render(results: pd.DataFrame, *, styles: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=100, force_terminal=styles, color_system="truecolor" if styles else None
    )
    table = set_table(results)
    assert table is not None
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


TWO = pd.DataFrame(
    [
        row("a", "x", {"kmnist": 0.9, "mnist": 0.6, "mean": 0.75}),
        row("b", "x", {"kmnist": 0.7, "mnist": 0.8, "mean": 0.75}),
        row("a", "y", {"cifar100": 0.55, "svhn": 0.65, "mean": 0.6}),
        row("a", "one set", {}),
    ]
)


def test_detectors_are_compared_on_each_set_and_the_mean_comes_last() -> None:
    lines = [line.split() for line in render(TWO).splitlines() if "0." in line]
    assert lines == [
        ["a", "x", "kmnist", "0.900", "0.100"],
        ["b", "x", "kmnist", "0.700", "0.300"],
        ["a", "x", "mnist", "0.600", "0.400"],
        ["b", "x", "mnist", "0.800", "0.200"],
        ["a", "x", "mean", "0.750", "0.250"],
        ["b", "x", "mean", "0.750", "0.250"],
        ["a", "y", "cifar100", "0.550", "0.450"],
        ["a", "y", "svhn", "0.650", "0.350"],
        ["a", "y", "mean", "0.600", "0.400"],
    ]


def test_the_best_of_each_set_is_bold() -> None:
    text = render(TWO, styles=True)
    for best in ("0.900", "0.800", "0.750", "0.650"):
        assert f"\x1b[1m{best}" in text
    assert "\x1b[1m0.700" not in text
    markdown = set_markdown(TWO)
    assert "| a | x | kmnist | **0.900** | 0.100 |\n" in markdown
    assert "| b | x | kmnist | 0.700 | 0.300 |\n" in markdown


def test_the_markdown_follows_the_table_of_all_images() -> None:
    text = benchmark_markdown(TWO) + set_markdown(TWO)
    assert "\n\n| detector | data | outside | AUROC ↑ | FPR95 ↓ |\n| --- | --- | --- | ---: | ---: |\n" in text


def test_seeds_are_averaged() -> None:
    sets = {"kmnist": 0.8, "mnist": 0.5, "mean": 0.65}
    results = pd.DataFrame([row("a", "x", sets), row("a", "x", {**sets, "kmnist": 0.9}, seed=1)])
    assert f"0.850 ± {np.std([0.8, 0.9], ddof=1):.3f}" in render(results)


def test_a_failed_job_is_left_to_the_table_of_all_images() -> None:
    failed = {"detector": "b", "data": "x", "seed": 0, "error": "ValueError: no"}
    results = pd.DataFrame([row("a", "x", {"k|m": 0.9, "mnist": 0.6, "mean": 0.75}), failed])
    assert "ValueError" not in render(results)
    assert "| a | x | k\\|m |" in set_markdown(results)
    assert set_table(pd.DataFrame([failed])) is None


@pytest.mark.parametrize("sets", [0, 1, MOST_SETS + 1])
def test_no_table_for_one_set_or_for_too_many(sets: int) -> None:
    values = {f"set {number}": 0.5 for number in range(sets)}
    results = pd.DataFrame([row("a", "x", values | ({"mean": 0.5} if sets > 1 else {}))])
    assert set_table(results) is None
    assert set_markdown(results) == ""


def test_long_names_fit_into_a_hundred_columns() -> None:
    long = "a very long name that says everything about it, twice over, and then some more than that"
    sets = {long: 0.9, f"another: {long}": 0.8, "mean": 0.85}
    text = render(pd.DataFrame([row(long, long, sets, seed=seed) for seed in range(2)]))
    assert max(map(len, text.splitlines())) <= 100
    assert "0.900 ± 0.000" in text
