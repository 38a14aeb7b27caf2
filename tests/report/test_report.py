# SPDX-License-Identifier: Apache-2.0
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from anomalib_flowood.report.plots import score_histograms
from anomalib_flowood.report.table import benchmark_markdown, benchmark_table, summarise


def row(detector: str, data: str, auroc: float, seed: int = 0, **more: object) -> dict:
    return {"detector": detector, "data": data, "seed": seed, "AUROC": auroc, "FPR95": 0.25} | {
        "fit_duration": 12.3,
        "images_per_s": 1234.5,
        "error": np.nan,
        **more,
    }


def render(results: pd.DataFrame, *, styles: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=100, force_terminal=styles, color_system="truecolor" if styles else None
    )
    console.print(benchmark_table(results))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_one_row_per_detector_and_data_the_best_in_bold() -> None:
    results = pd.DataFrame([row("a", "x", 0.9), row("a", "y", 0.5), row("b", "x", 0.8), row("b", "y", 0.7)])
    text = render(results, styles=True)
    assert "\x1b[1m0.900" in text
    assert "\x1b[1m0.700" in text
    assert "\x1b[1m0.800" not in text
    assert "seeds" not in text
    plain = render(results)
    assert [line.split()[:2] for line in plain.splitlines() if "12.3" in line] == [
        ["a", "x"],
        ["b", "x"],
        ["a", "y"],
        ["b", "y"],
    ]


def test_seeds_are_averaged() -> None:
    results = pd.DataFrame([row("a", "x", 0.8, seed=0), row("a", "x", 0.9, seed=1), row("b", "x", 0.1, seed=0)])
    summary = summarise(results)
    assert summary["AUROC"].tolist() == pytest.approx([0.85, 0.1])
    assert summary["AUROC_std"][0] == pytest.approx(np.std([0.8, 0.9], ddof=1))
    assert summary["seeds"].tolist() == [2, 1]
    assert "0.850 ± 0.071" in render(results)
    assert "seeds" in render(results)


def test_a_failed_job_is_a_row_with_its_error() -> None:
    nan = float("nan")
    failed = row("b|c [x]", "x", nan, FPR95=nan, fit_duration=nan, images_per_s=nan, error="ValueError: no [images]")
    results = pd.DataFrame([row("a", "x", 0.9), failed])
    assert "failed: ValueError: no [images]" in render(results)
    markdown = benchmark_markdown(results)
    assert "| b\\|c [x] (failed: ValueError: no [images]) | x | - | - | - | - |\n" in markdown
    assert "| a | x | **0.900** | 0.250 | 12.3 | 1,234 |\n" in markdown


def test_a_metric_of_one_class_is_not_defined() -> None:
    nan = float("nan")
    results = pd.DataFrame([row("a", "x", nan, FPR95=nan), row("a", "y", 0.9)])
    assert render(results).count("not defined") == 2
    assert "| a | x | not defined | not defined | 12.3 | 1,234 |\n" in benchmark_markdown(results)


def test_only_failures() -> None:
    results = pd.DataFrame([{"detector": "a", "data": "x", "seed": 0, "error": "RuntimeError: boom"}])
    assert "boom" in render(results)
    assert "boom" in benchmark_markdown(results)


def test_long_names_fit_into_a_hundred_columns() -> None:
    long = "PixelFlow with a very long name that says everything about it, twice over, and then some more"
    results = pd.DataFrame([row(long, long, 0.9, seed=seed, error=np.nan) for seed in range(3)])
    text = render(results)
    assert max(map(len, text.splitlines())) <= 100
    assert "0.900 ± 0.000" in text


def scores(panels: int, sources: int, **changes: object) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    parts = []
    for panel in range(panels):
        for source in range(sources + 1):
            values = {"score": rng.normal(source * 1000.0, 1e3, 50), "label": int(source > 0)}
            names = {"detector": f"detector {panel}", "data": "x", "seed": 0, "source": f"source {source}"}
            parts.append(pd.DataFrame({**names, **values, "image_path": "p"}).assign(**changes))
    return pd.concat(parts)


@pytest.mark.parametrize(("panels", "sources"), [(1, 1), (2, 3), (4, 2), (6, 8)])
def test_a_picture_of_any_number_of_panels(tmp_path: Path, panels: int, sources: int) -> None:
    path = score_histograms(scores(panels, sources), tmp_path / "scores.png")
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] > 600
    blue = (np.abs(picture.astype(int) - [0x00, 0x72, 0xB2]).sum(axis=2) < 12).sum()
    assert blue > 50  # the in-distribution outline was drawn


def test_scores_that_are_constant_infinite_or_of_one_class(tmp_path: Path) -> None:
    score_histograms(scores(1, 1, score=3.0), tmp_path / "constant.png")
    frame = scores(1, 1)
    frame.iloc[0, frame.columns.get_loc("score")] = np.inf  # type: ignore[index]
    score_histograms(frame, tmp_path / "infinite.png")
    score_histograms(scores(1, 1, score=np.inf), tmp_path / "all_infinite.png")  # of a flow that overflows everywhere
    with pytest.warns(UserWarning, match="AUROC is not defined"):
        score_histograms(scores(1, 0), tmp_path / "single.png")
    with pytest.raises(ValueError, match="no scores"):
        score_histograms(frame.iloc[:0], tmp_path / "none.png")
