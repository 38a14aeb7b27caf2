# SPDX-License-Identifier: Apache-2.0
"""The benchmark of scores: what it runs, what it says of the bars, and that a finished row is not run again."""

import pandas as pd
import pytest
import torch
from model_helpers import idx_folder
from rich.console import Console

from benchmarks.results import append_rows, read_rows
from benchmarks.scores import report, study


def rows_of(score: str, aurocs: dict[str, float], **values) -> list[dict]:
    known = {"training_s": 150, "bits_per_dim": 4.5, "ms_per_image": 1.0, "images": 40, "fit_s": 1, "pass_s": 2}
    return [
        {"part": "scores", "task": pair, "detector": score, "seed": 0, "auroc": auroc, **known, **values}
        for pair, auroc in aurocs.items()
    ]


def pairs(*aurocs: float) -> dict[str, float]:
    names = [pair for inside in study.SETS for pair in study.outside_sets(inside)]
    return dict(zip(names, aurocs, strict=True))


def frame(*parts: list[dict]) -> pd.DataFrame:
    return pd.DataFrame([row for part in parts for row in part])


GOOD = pairs(0.999, 0.98, 0.976, 0.7, 0.8, 0.8, 1.0, 0.9, 0.9, 0.9, 0.8, 0.8)
ALL = len(GOOD)


def test_outside_sets_are_the_other_set_and_the_changed_test_images():
    assert study.outside_sets("mnist")[0] == "mnist -> fashion_mnist"
    assert set(study.NAMED_BEFORE) <= {pair for inside in study.SETS for pair in study.outside_sets(inside)}
    images = torch.arange(12.0).reshape(2, 1, 2, 3)
    changed = {name: change(images)[0, 0].tolist() for name, change in study.CHANGES.items()}
    assert changed == {
        "rotated by 90°": [[2, 5], [1, 4], [0, 3]],
        "mirrored top to bottom": [[3, 4, 5], [0, 1, 2]],
        "mirrored left to right": [[2, 1, 0], [5, 4, 3]],
        "halves of two images": [[0, 1, 2], [9, 10, 11]],
        "a quadrant black": [[0, 1, 2], [3, 0, 0]],
    }


@pytest.mark.parametrize(
    ("complexity", "states", "missed"),
    [
        (GOOD, GOOD, []),
        (GOOD | {"fashion_mnist -> mnist": 0.997}, pairs(*[0.95] * ALL), ["at least 0.998"]),
        (GOOD | {"fashion_mnist -> mirrored top to bottom": 0.97}, GOOD, ["top to bottom, "]),
        # 0.02 below nll on one pair, but best on the mean; and the other way round.
        (GOOD, GOOD | {"mnist -> rotated by 90°": 0.68}, ["worse than nll", "mean over all"]),
        (GOOD, pairs(*[0.86] * ALL), ["mean over all"]),
    ],
)
def test_bars(complexity, states, missed):
    rows = frame(
        rows_of("nll", pairs(*[0.7] * ALL)),
        rows_of("complexity", complexity),
        rows_of("density_of_states", states),
        rows_of(study.BITS, pairs(*[1.0] * ALL)),  # no model: it wins nothing
    )
    lines = report._bars(rows).splitlines()
    wrong = [line for line in lines if "not met" in line]
    assert len(lines) == 9
    assert len(wrong) == len(missed)
    assert all(text in line for text, line in zip(missed, wrong, strict=True))


def test_tables(tmp_path):
    output, into = tmp_path / "out", tmp_path / "into"
    into.mkdir()
    (into / "README.md").write_text("before\n<!-- scores: begin -->\nold\n<!-- scores: end -->\nafter\n")
    append_rows(output, rows_of("nll", pairs(*[0.8] * ALL), fit_s=None, pass_s=None), study.COLUMNS)
    append_rows(output, rows_of("complexity", GOOD, ms_per_image=2.5), study.COLUMNS)
    report.write(output, into)
    text = (into / "README.md").read_text()
    assert text.startswith("before\n<!-- scores: begin -->")
    assert "old" not in text
    assert "| complexity | **0.999** | **0.980** | **0.976** | 0.700 | **0.800** | **0.800** | 0.876 |" in text
    assert "mirrored left to right †" in text
    assert "| complexity | 2.50 | 2.5 | 1.00 | 0.50 |" in text
    assert "| nll | 1.00 | 1.0 | – | – |" in text
    assert (into / "scores.png").stat().st_size > 5000


def test_a_run_measures_every_score_and_repeats_none(tmp_path, monkeypatch):
    idx_folder(tmp_path / "ramps", "plain")
    idx_folder(tmp_path / "squares", "square", seed=1)
    monkeypatch.setattr(study, "SETS", ("ramps", "squares"))
    monkeypatch.setitem(study.FLOW, "image_size", (12, 12))
    monkeypatch.setitem(study.FLOW, "hidden_channels", 8)
    monkeypatch.setitem(study.SLOW, "lid", 4)
    scores = (study.BITS, "nll", "typicality", "lid", "ensemble")
    options = study.Options(tmp_path / "out", ("ramps",), scores, (0,), 0.5, 10, str(tmp_path))
    console = Console(quiet=True)
    study.run(options, console)
    rows = read_rows(options.output)
    assert rows["error"].isna().all(), rows["error"].tolist()
    assert set(rows["detector"]) == set(scores)
    assert len(rows) == 6 * len(scores)
    assert rows["auroc"].between(0, 1).all()
    assert rows.loc[rows["detector"] == "typicality", ["fit_s", "pass_s"]].notna().all(axis=None)
    # One training serves all scores but those that train flows of their own.
    checkpoints = sorted(path.name for path in (options.output / "checkpoints").glob("*.ckpt"))
    assert [name.split("-")[-2] for name in checkpoints] == ["ensemble", "nll"]
    before = (options.output / "results.csv").read_bytes()
    study.run(options, console)
    assert (options.output / "results.csv").read_bytes() == before
    # A row that is missing is measured on the flow that was trained.
    kept = [line for line in before.splitlines(keepends=True) if b"rotated by 90" not in line]
    (options.output / "results.csv").write_bytes(b"".join(kept))
    times = {path: path.stat().st_mtime_ns for path in (options.output / "checkpoints").glob("*.ckpt")}
    study.run(options, console)
    again = read_rows(options.output)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(again) == len(rows)
    index = ["task", "detector"]
    same = (study.BITS, "nll", "ensemble")  # the others are fitted on images in another order
    before, after = (frame[frame["detector"].isin(same)].set_index(index).sort_index() for frame in (rows, again))
    pd.testing.assert_frame_equal(before[["auroc", "epochs"]], after[["auroc", "epochs"]])
