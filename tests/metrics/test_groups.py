# SPDX-License-Identifier: Apache-2.0
"""Near and far sets, as OpenOOD has them: an average for each group, in tests, benchmarks and tables."""

import pandas as pd
import pytest
import torch
from model_helpers import engine, idx_folder, pixel_flow

from anomalib_flowood import CrossDataset
from anomalib_flowood.benchmark import BenchmarkJobGenerator
from anomalib_flowood.metrics import MOST_SETS, auroc, per_set
from anomalib_flowood.metrics.functional import DETECTION_METRICS as METRICS
from anomalib_flowood.report.table import set_markdown, set_table, summarise_sets

SOURCES = ["in", "in", "in", "in", "near: a", "near: b", "near: b", "far: c"]
SCORES, LABELS = torch.tensor([0.0, 1, 2, 3, 1.5, 4, 2.5, 5]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def test_a_group_has_the_unweighted_average_of_its_sets():
    values = per_set(auroc, SCORES, LABELS, SOURCES)
    alone = {"far: c": 1.0, "near: a": 0.5, "near: b": 0.875}
    assert values == {**alone, "far": 1.0, "near": 0.6875, "mean": pytest.approx(2.375 / 3)}
    assert [*values] == ["far: c", "near: a", "near: b", "far", "near", "mean"]


@pytest.mark.parametrize("name", METRICS)
def test_numbers_may_be_those_of_numpy(name):
    """A loaded detector's scores are."""
    scores, labels = SCORES.numpy(), LABELS.numpy()
    assert METRICS[name](scores, labels) == METRICS[name](SCORES, LABELS)
    assert per_set(METRICS[name], scores, labels, SOURCES) == per_set(METRICS[name], SCORES, LABELS, SOURCES)


def test_a_set_that_is_called_as_a_group_is_kept_apart():
    values = per_set(auroc, SCORES, LABELS, [source.replace("far: c", "near") for source in SOURCES])
    assert values["near (set)"] == 1.0
    assert values["near"] == 0.6875


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for number, (name, texture) in enumerate((("ramps", "plain"), ("others", "plain"), ("squares", "square"))):
        idx_folder(root / name, texture, seed=number, test=20)
    idx_folder(root / "more", "square", seed=5, test=10)
    return root


def test_a_test_logs_each_set_each_group_and_all(folder, tmp_path):
    groups = {"near": [folder / "others"], "far": [str(folder / "squares"), folder / "more"]}
    data = CrossDataset(folder / "ramps", groups, eval_batch_size=16, val_split_ratio=0.2)
    assert data.category == "ramps-others+squares+more"
    data.setup()
    assert set(data.test_data.samples["source"]) == {"ramps", "near: others", "far: squares", "far: more"}
    detector = pixel_flow(max_epochs=1)
    run = engine(tmp_path)
    run.fit(detector, datamodule=data)
    (found,) = run.test(detector, datamodule=data, verbose=False)
    assert found["AUROC/near"] == found["AUROC/near: others"]
    assert found["AUROC/far"] == pytest.approx((found["AUROC/far: squares"] + found["AUROC/far: more"]) / 2)
    averages = {f"{metric}/{name}" for metric in ("FPR95", "BitsPerDim") for name in ("near", "far", "mean")}
    assert averages <= found.keys()


@pytest.mark.parametrize("sets", [3, MOST_SETS + 1])
def test_the_tables_have_the_averages(sets):
    names = [f"far: {number}" for number in range(sets - 1)] + ["near: x"]
    row = {f"{metric}/{name}": 0.25 for metric in ("AUROC", "FPR95") for name in [*names, "near", "far", "mean"]}
    row |= {"detector": "D", "data": "x", "seed": 0, "error": "", "AUROC": 0.5, "FPR95": 0.5}
    results = pd.DataFrame([{**row, "fit_s": 1.0, "images_per_s": 1.0}])
    shown = summarise_sets(results)["set"].tolist()
    # Of many sets the averages alone.
    assert shown == [*(names if sets <= MOST_SETS else []), "far", "near", "mean"]
    assert set_table(results).row_count == len(shown)
    assert "| D | x | near | **0.250** | 0.250 |" in set_markdown(results)


@pytest.mark.parametrize("group", ["", "mean", "outside", "a: b", "a/b"])
def test_a_group_cannot_be_called_so(group, folder):
    with pytest.raises(ValueError, match="A group of out_of_distribution cannot be called"):
        CrossDataset(folder / "ramps", {group: [folder / "others"]})


def test_groups_have_to_hold_something(folder):
    with pytest.raises(ValueError, match="The group 'far' of out_of_distribution names no data set"):
        CrossDataset(folder / "ramps", {"near": [folder / "others"], "far": []})
    with pytest.raises(ValueError, match="twice: the data sets have to differ"):
        CrossDataset(folder / "ramps", {"near": [folder / "others"], "far": [folder / "others"]})


def test_a_benchmark_names_its_data_by_all_sets(folder):
    data = {
        "class_path": "CrossDataset",
        "init_args": {
            "in_distribution": str(folder / "ramps"),
            "out_of_distribution": {"near": [str(folder / "others")], "far": [str(folder / "squares")]},
        },
    }
    small = {"image_size": [12, 12], "channels": 1, "coupling_layers": 4, "hidden_channels": 16, "bottleneck_dim": 3}
    section = {"seed": 0, "model": {"class_path": "PixelFlow", "init_args": small}, "data": data}
    (job,) = BenchmarkJobGenerator(["cpu"]).generate_jobs(section)
    assert job.data == "ramps → others, squares"
