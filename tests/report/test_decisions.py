# SPDX-License-Identifier: Apache-2.0
"""Thresholds: what a test records of them, and what a page makes of it."""

import html
import io
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from report_helpers import Page, job, report
from rich.console import Console
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from anomalib_flowood import conformal, processes
from anomalib_flowood.benchmark import Results
from anomalib_flowood.cli.results import ResultsCLI
from anomalib_flowood.models.components import ConformalPostProcessor
from anomalib_flowood.report.curves import roc_chart
from anomalib_flowood.report.decisions import decide, decision_of, expectation, kinds, without_expectation
from anomalib_flowood.report.markup import script_json
from anomalib_flowood.report.predictions import keep_predictions

DETECTORS = {"sharp": 3.0, "<b>dull</b>": 0.7}


def images(seed: int = 0) -> pd.DataFrame:
    """40 inside images, and 15 with a hole, 25 with a scratch."""
    sources = ["good"] * 40 + ["hole"] * 15 + ["scratch"] * 25
    paths = [f"{source}/{number}.png" for number, source in enumerate(sources)]
    return pd.DataFrame({"image_path": paths, "source": sources, "label": [int(name != "good") for name in sources]})


def run_with_thresholds(folder: Path, **columns: float) -> pd.DataFrame:
    """A run's folder, whose scores it returns."""
    folder.mkdir()
    results, rng, parts = Results(folder), np.random.default_rng(0), []
    for detector, distance in DETECTORS.items():
        samples = images()
        row = {"detector": detector, "data": "parts", "seed": 0}
        row, scores = job(row, samples.assign(score=rng.normal(size=len(samples)) + distance * samples["label"]))
        results.add({**row, "threshold": 1.5, "alpha": 0.05, "level": 0.04, **columns}, scores)
        parts.append(scores)
    return pd.concat(parts)


def test_a_test_records_by_what_it_labels():
    calibrated = ConformalPostProcessor(alpha=0.1)
    calibrated.calibrate(torch.arange(20.0))
    found = decision_of(calibrated)
    assert found == {
        "threshold": float(calibrated.image_threshold),
        "alpha": 0.1,
        "level": calibrated.level,
        "calibration_images": 20,
    }
    assert found["threshold"] == 18.0  # of 20, at most 2 of 21 places are above it

    plain = PostProcessor()
    assert decision_of(plain) == {}
    plain._image_threshold.fill_(0.25)
    assert decision_of(plain) == {"threshold": 0.25}
    assert decision_of(None) == {}
    assert decision_of(ConformalPostProcessor()) == {}


def test_the_matrix_is_scikit_learns():
    samples = images()
    scores = samples.assign(score=np.random.default_rng(1).normal(size=80) + samples["label"])
    scores.loc[3, "score"] = 0.5  # as high as the threshold raises no alarm
    decision = decide(pd.Series({"threshold": 0.5, "alpha": 0.05, "level": 0.04}), scores)
    (tn, fp), (fn, tp) = confusion_matrix(scores["label"], scores["score"] > 0.5)
    assert (decision.true_negatives, decision.false_positives) == (tn, fp)
    assert (decision.false_negatives, decision.true_positives) == (fn, tp)
    alarms = f"{fp} of 40 inside images raise an alarm ({100 * fp / 40:.3g}\u00a0%; expected: at most 4\u00a0%)"
    assert str(decision).startswith(alarms)
    assert f"{tp} of 40 outside images are found" in str(decision)
    assert decide(pd.Series({"AUROC": 0.5}), scores) is None
    alone = decide(pd.Series({"threshold": 0.5}), scores[scores["label"] == 0])
    assert "found" not in str(alone)
    assert "expected" not in str(alone)


def test_of_images_that_have_set_the_threshold_nothing_is_expected():
    scores = images().assign(score=np.random.default_rng(1).normal(size=80))
    found = {"threshold": 0.5, "alpha": 0.05, "level": 0.04, "calibration_images": 40}
    assert without_expectation(found, 0) == found
    row = pd.Series(without_expectation(found, 40))
    assert {*row.index} == {"threshold", "alpha", "judged_twice"}
    text = decide(row, scores).sentence()
    assert text.startswith("At alpha = 0.05: ")
    assert text.endswith("so that this does not say how many other ones raise an alarm.")
    assert "expected" not in text
    assert "Validation and test images are the same" in text
    some = decide(pd.Series(without_expectation(found, 3)), scores).sentence()
    assert "3 of the normal ones are validation images, too: the threshold is from them" in some


def test_histograms_name_the_level_that_there_is(tmp_path: Path):
    run_with_thresholds(tmp_path / "run", level=1 / 16, calibration_images=15)
    charts = Page(report(tmp_path / "run")).charts()
    lines = [layer["data"]["values"] for chart in charts for layer in chart["layer"] if layer["mark"]["type"] == "rule"]
    names = {value["name"] for values in lines for value in values if "threshold" in value}
    assert names == {"threshold, level of 6.25\u00a0%"}


def test_kinds_are_measured_against_all_inside_images():
    samples = images()
    scores = samples.assign(score=np.random.default_rng(1).normal(size=80) + samples["label"])
    table = kinds(scores, 0.5).set_index("kind")
    assert table["images"].to_dict() == {"hole": 15, "scratch": 25}
    part = scores[scores["source"].isin(["good", "hole"])]
    assert table.loc["hole", "AUROC"] == pytest.approx(roc_auc_score(part["label"], part["score"]))
    assert table.loc["hole", "found"] == (part.query("label == 1")["score"] > 0.5).sum()
    assert kinds(scores, math.nan)["found"].isna().all()
    assert kinds(scores[scores["label"] == 1], 0.5)["AUROC"].isna().all()
    assert kinds(scores[scores["label"] == 0], 0.5).empty


def test_the_page_has_thresholds_matrices_and_kinds(tmp_path: Path):
    scores = run_with_thresholds(tmp_path / "run", pixel_AUROC=0.9125, pixel_AUPRO=math.nan)
    page = Page(report(tmp_path / "run"))

    # A line in every histogram; a point on every curve, where the threshold is.
    charts = {chart["title"]: chart for chart in page.charts()}
    histograms = [chart for title, chart in charts.items() if title.partition(":")[0] in DETECTORS]
    assert len(histograms) == 3 * 2  # all, and each source
    for chart in histograms:
        lines = [layer for layer in chart["layer"] if layer["mark"]["type"] == "rule"]
        assert [line["data"]["values"] for line in lines] == [[{"threshold": 1.5, "name": "threshold, α = 0.05"}]]
    sharp = scores[scores["detector"] == "sharp"]
    alarm = sharp["score"] > 1.5
    (point, _) = charts["ROC: All 2 outside sets"]["layer"][-1]["data"]["values"]
    assert point["x"] == pytest.approx(alarm[sharp["label"] == 0].mean())
    assert point["y"] == pytest.approx(alarm[sharp["label"] == 1].mean())
    (point, _) = charts["Precision and recall: All 2 outside sets"]["layer"][-1]["data"]["values"]
    assert point["x"] == pytest.approx(alarm[sharp["label"] == 1].mean())
    assert point["y"] == pytest.approx(sharp["label"][alarm].mean(), abs=1e-5)

    # Numbers are those of the results.
    results = pd.read_csv(tmp_path / "run" / "results.csv").set_index("detector")
    precision = average_precision_score(sharp["label"], sharp["score"])
    spoken = [svg["aria-label"] for svg in page.all("svg") if svg.get("class") == "marks"]
    (said,) = [text for text in spoken if text.startswith("Precision-recall curves, All 2 outside sets")]
    assert f"sharp {precision:.3f};" in said
    assert f"AUROC: sharp {results.loc['sharp', 'AUROC']:.3f};" in spoken[0]
    for detector in DETECTORS:
        own = scores[scores["detector"] == detector]
        counts = confusion_matrix(own["label"], own["score"] > 1.5).ravel()
        assert f"{counts[1]} of 40 inside images raise an alarm" in page.text
        assert f"{counts[3]} of 40 outside images are found" in page.text
    assert "At α = 0.05" in page.text
    assert "each source of outside images" in page.text
    # Of pixels what is there.
    assert "pixels: how well" in page.text
    assert "0.912" in page.text
    assert "AUPRO" not in page.text


def test_drawings_are_slim_and_their_texts_whole(tmp_path: Path):
    scores = run_with_thresholds(tmp_path / "run").assign(detector='a class="b" 0.98765')
    chart = roc_chart(scores, "all 0.123456", ['a class="b" 0.98765'], {})
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg)
    assert "ROC: all 0.123456" in texts
    area = roc_auc_score(scores["label"], scores["score"])
    assert any(html.unescape(text) == f'{area:.3f}  a class="b" 0.98765' for text in texts)
    assert len(chart.svg) < 20_000
    assert not re.search(r"\d\.\d{3}", "".join(re.findall(r' d="([^"]*)"', chart.svg)))
    assert "var(--blue" in chart.svg
    assert "var(" not in chart.file


def test_bins_hold_all_images(tmp_path: Path):
    scores = run_with_thresholds(tmp_path / "run", threshold=50.0)
    page = Page(report(tmp_path / "run"))
    for chart in page.charts():
        if not chart["title"].startswith("sharp: All"):
            continue
        bins = pd.DataFrame(chart["layer"][0]["data"]["values"])
        assert bins["images"].sum() == (scores["detector"] == "sharp").sum()
        assert bins.groupby("name")["share"].sum().to_numpy() == pytest.approx(1, abs=1e-4)
        low, high = chart["layer"][0]["encoding"]["x"]["scale"]["domain"]
        assert low < bins["x"].max()
        assert high > 50  # the threshold is in sight


def test_runs_without_thresholds_have_no_decisions(tmp_path: Path):
    run_with_thresholds(tmp_path / "run", threshold=math.nan, alpha=math.nan, level=math.nan)
    page = Page(report(tmp_path / "run"))
    assert "raise an alarm (" not in page.text
    assert not [layer for chart in page.charts() for layer in chart["layer"] if layer["mark"]["type"] == "text"]
    assert [detector["threshold"] for detector in page.tables()[0]["detectors"]] == [None, None]


def test_the_decision_in_words_has_the_beta_interval_of_the_docs():
    samples = images()
    scores = samples.assign(score=samples["label"] * 2.0)
    scores.loc[:1, "score"] = 5.0
    known = {"threshold": 1.5, "alpha": 0.05, "level": 5 / 101, "calibration_images": 100}
    decision = decide(known, scores)
    assert decision.sentence().replace("\u00a0", " ") == (
        "At alpha = 0.05: 2 of 40 normal images raise an alarm (5 %; expected: at most 4.95 %, 2 to 8.92 % in 90 of "
        "100 calibrations on 100 images), 40 of 40 anomalous images are found (100 %)."
    )
    assert expectation(0.5, 1).endswith("in 90 of 100 calibrations on 1 image")
    page = (Path(__file__).parents[2] / "docs/decisions.md").read_text()
    assert "| 100 | 5.0 % | 2.0 % to 8.9 % |" in page
    console = Console(file=io.StringIO(), width=80)
    decision.show(console)
    said = console.file.getvalue()
    assert re.search(r"normal +38 +2 *\n", said)
    assert re.search(r"anomalous +0 +40 *\n", said)
    assert said.endswith("100 held-out normal images allow no level below 0.99 %; 1,000 would allow 0.1 %.\n")
    few = decide(known | {"level": 1 / 16, "calibration_images": 15}, scores)
    assert few.sentence().startswith(
        "At a level of 6.25\u00a0% (alpha = 0.05 takes more images to calibrate on): 2 of 40 normal"
    )
    # As the page says it, on which it was at 0.05.
    assert few.at("α") == "At a level of 6.25\u00a0% (α = 0.05 takes more images to calibrate on): "


def test_more_alarms_than_chance_gives_are_said_to_be_so():
    scores = images().assign(score=1.0)
    known = {"threshold": 0.5, "alpha": 0.05, "level": 5 / 101, "calibration_images": 100}
    text = decide(known, scores).sentence()
    assert "Chance does not give so many alarms (p < 1e-09): " in text
    assert "these normal images are unlike those that it was fitted to and calibrated on" in text
    scores.loc[scores.index[12:], "score"] = 0.0
    assert "Chance does not give so many alarms (p = " in decide(known, scores).sentence()
    scores.loc[scores.index[8:], "score"] = 0.0  # 8 of 40: 1 in 200 calibrations
    assert "Chance" not in decide(known, scores).sentence()
    twice = without_expectation(known, 40)
    assert "Chance" not in decide(twice, images().assign(score=1.0)).sentence()


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (1, "1 held-out normal image allows no level below 50 %; 20 would allow 5 %."),
        (20, "20 held-out normal images allow no level below 4.8 %; 100 would allow 1 %."),
        (5000, "5,000 held-out normal images allow no level below 0.02 %."),
    ],
)
def test_what_more_images_would_buy(count, said):
    assert conformal.more_images(count) == said


@pytest.mark.parametrize("labels", [True, False])
def test_a_prediction_ends_with_the_decision(labels, tmp_path, capsys):
    calibrated = ConformalPostProcessor()
    calibrated.calibrate(torch.arange(20.0))
    truth = torch.tensor([False, False, True]) if labels else None
    batch = ImageBatch(
        image=torch.rand(3, 3, 4, 4), pred_score=torch.tensor([1.0, 30.0, 40.0]), gt_label=truth, image_path=["a"] * 3
    )
    calibrated.post_process_batch(batch)
    path, findings = keep_predictions([batch], tmp_path, calibrated)
    table = pd.read_csv(path)
    out = capsys.readouterr().out
    assert findings["decision"] in out
    assert f"Drift: p = {findings['drift_p_value']:.2g}, " in out
    assert "20 held-out normal images allow no level below 4.8 %; 100 would allow 1 %." in out
    if labels:
        assert table["label"].tolist() == [0, 0, 1]
        assert "At alpha = 0.05: 1 of 2 normal images raise an alarm (50" in out
        assert "1 of 1 anomalous image is found (100" in out
    else:
        assert "label" not in table
        assert "Called anomalous: 2 of 3 images (66.7\u00a0%); if all were normal, expected: at most 4.76" in out


def test_a_p_value_below_the_least_number_is_not_said_to_be_0(tmp_path, capsys):
    calibrated = ConformalPostProcessor()
    calibrated.calibrate(torch.rand(600, generator=torch.Generator().manual_seed(0)))
    batch = ImageBatch(image=torch.zeros(3000, 3, 1, 1), pred_score=torch.full((3000,), 2.0), image_path=["a"] * 3000)
    calibrated.post_process_batch(batch)
    assert keep_predictions([batch], tmp_path, calibrated).findings["drift_p_value"] == 0
    assert "Drift: p < 1e-300, " in capsys.readouterr().out
    apart = torch.cat([torch.linspace(1, 2, 4000), torch.full((20,), 1e30)])
    assert "score far above the others (p < 1e-300). " in conformal.looks_contaminated(apart)


def test_raw_scores_of_a_table_have_the_p_values_beside_them(tmp_path):
    calibrated, scores = ConformalPostProcessor(), torch.randn(40, generator=torch.Generator().manual_seed(0))
    calibrated.calibrate(scores)
    batch = ImageBatch(image=torch.rand(40, 3, 4, 4), pred_score=scores, image_path=["a"] * 40)
    calibrated.post_process_batch(batch)
    table = pd.read_csv(keep_predictions([batch], tmp_path, calibrated).path)
    p_values = conformal.p_values(calibrated.calibration, torch.from_numpy(table["raw_score"].to_numpy()))
    assert p_values.tolist() == table["p_value"].tolist()


def test_names_of_images_are_printed_as_they_are(tmp_path, capsys):
    names = ["a:car:b.png", "[red]c.png"]
    batch = ImageBatch(image=torch.rand(2, 3, 4, 4), pred_score=torch.tensor([1.0, 2.0]), image_path=names)
    folder = tmp_path / "cam:on:1"
    keep_predictions([batch], folder, errors={"d:bee:.png": "d:bee:.png is broken"})
    out = capsys.readouterr().out
    for name in (*names, str(folder), "d:bee:.png is broken"):
        assert name in out


def test_a_threshold_that_nothing_exceeds_is_none_to_the_page():
    assert script_json({"threshold": math.inf, "scores": [1.5, math.nan]}) == '{"threshold":null,"scores":[1.5,null]}'


@pytest.mark.parametrize("rank", [0, 1])
def test_what_another_process_could_not_read_is_told_by_the_first_alone(rank, tmp_path, monkeypatch):
    batch = ImageBatch(image=torch.rand(1, 3, 4, 4), pred_score=torch.tensor([1.0]), image_path=["a.png"])
    monkeypatch.setattr(
        processes, "gathered_objects", lambda own: [own, {"b.png": "broken"}] if isinstance(own, dict) else [own]
    )
    monkeypatch.setattr(processes, "rank", lambda: rank)
    kept = keep_predictions([batch], tmp_path, errors={})
    assert (kept is None) == bool(rank)
    assert kept is None or kept.findings["unreadable"] == 1
    cli = SimpleNamespace(
        engine=SimpleNamespace(trainer=SimpleNamespace(default_root_dir=tmp_path)),
        model=SimpleNamespace(post_processor=None),
        _data_label=lambda: "parts",
        _write_record=lambda folder, _, **findings: folder / "run.json",
        _checkpoint=lambda: None,
    )
    assert ResultsCLI.keep_predictions(cli, [batch], {}) == (rank == 0)  # by which the command's status is 3


def test_a_prediction_by_a_trimmed_calibration_names_no_level(tmp_path):
    trimmed = ConformalPostProcessor(contamination=0.1)
    trimmed.calibrate(torch.arange(40.0))
    batch = ImageBatch(image=torch.rand(2, 3, 4, 4), pred_score=torch.tensor([1.0, 90.0]), image_path=["a"] * 2)
    trimmed.post_process_batch(batch)
    _, findings = keep_predictions([batch], tmp_path, trimmed)
    assert findings["decision"] == "Called anomalous: 1 of 2 images (50\u00a0%)."
