# SPDX-License-Identifier: Apache-2.0
"""Colours and texts have one place, and names that people give survive in pictures."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from anomalib_flowood import look
from anomalib_flowood.look import from_here, heading, short_name, shorten, typed
from anomalib_flowood.report.plots import score_histograms

REPOSITORY = Path(__file__).parents[1]


def test_short_texts_stay_and_long_ones_are_cut() -> None:
    assert shorten("as it is", 8) == "as it is"
    assert shorten("too long by far", 8) == "too lon…"
    assert shorten("/some/path/to/images", 8, keep_end=True) == "…/images"
    assert shorten("one\n  line", 20) == "one line"
    assert shorten(12.5, 8) == "12.5"
    assert short_name("_hidden", 20) == "hidden"
    assert heading("word " * 30, 10) == "word word\nword word…"


@pytest.mark.parametrize("name", ["cost $x_{$", "_hidden", "x" * 60, "a $ and a _", "two\nlines"])
def test_any_name_can_stand_in_a_picture(name: str, tmp_path: Path) -> None:
    rows = {"source": [name] * 20, "label": [0, 1] * 10, "score": np.arange(20.0), "image_path": "p"}
    scores = pd.DataFrame(rows).assign(detector=name, data=name, seed=0)
    drawn: list[Figure] = []
    save = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
        )
        score_histograms(scores, tmp_path / "scores.png")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["in-distribution", short_name(name, 40)]
    assert len(short_name(name, 40)) > 5


def test_no_other_module_has_colours_of_the_palette() -> None:
    colours = {value.lower() for value in vars(look).values() if isinstance(value, str) and value.startswith("#")}
    assert colours >= {colour.lower() for colour in look.PALETTE}
    files = [path for top in ("anomalib_flowood", "benchmarks") for path in (REPOSITORY / top).rglob("*")]
    found = [
        path.name
        for path in files
        if path.suffix in {".py", ".html"}
        and any(colour in path.read_text(encoding="utf-8").lower() for colour in colours)
    ]
    assert found == ["look.py"]


def test_paths_are_said_as_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert from_here(tmp_path / "my results/v0") == "my results/v0"
    assert typed("my results/v0") == "'my results/v0'"

    def on_another_drive(path: object) -> str:
        msg = f"path is on mount 'D:', start on mount 'C:': {path}"
        raise ValueError(msg)

    monkeypatch.setattr("os.path.relpath", on_another_drive)
    monkeypatch.setattr(sys, "platform", "win32")
    assert from_here(r"D:\my results\v0") == r"D:\my results\v0"
    assert typed(r"D:\my results\v0") == r'"D:\my results\v0"'
    assert typed(r"results\v0") == r"results\v0"
