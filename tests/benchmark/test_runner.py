# SPDX-License-Identifier: Apache-2.0
"""A benchmark from its configuration to its folder."""

import io
import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import yaml
from anomalib.pipelines.components.runners.serial import SerialExecutionError
from benchmark_helpers import DFM, PADIM, folder
from model_helpers import BACKBONE, idx_folder
from PIL import Image
from rich.console import Console
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_flowood.benchmark import (
    BenchmarkError,
    BenchmarkJob,
    BenchmarkJobGenerator,
    BenchmarkRunner,
    Results,
    results,
)
from anomalib_flowood.cli import main
from anomalib_flowood.files import held
from anomalib_flowood.report.run import read_run


def test_end_to_end_with_a_failing_entry(here, images, capsys):
    config = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 3,
            "model": {"grid": [DFM, PADIM]},
            "data": folder(images, num_workers={"grid": [0, -1]}),
        },
    }
    Path("bench.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(SystemExit) as exit_info:
        main(["benchmark", "--config", "bench.yaml", "--images", "2"])
    assert exit_info.value.code == 1
    out, err = capsys.readouterr()

    (run,) = (here / "runs" / "benchmark").iterdir()
    assert {file.name for file in run.iterdir()} == {
        "benchmark.log",
        "benchmark.yaml",
        "maps",
        "results.csv",
        "run.json",
        "scores.csv",
        "scores.png",
        "table.md",
    }
    results = pd.read_csv(run / "results.csv")
    assert list(results["detector"]) == ["DFM tiny", "DFM tiny", "Padim", "Padim"]
    assert list(results["error"].notna()) == [False, True, False, True]
    assert results["error"][1].startswith("ValueError: num_workers option should be non-negative")
    assert {"image_AUROC", "fit_duration", "model.init_args.layer", "model.init_args.n_features"} <= {*results.columns}
    assert not any("/" in column for column in results.columns)  # Folder names no sets

    scores = pd.read_csv(run / "scores.csv")
    assert list(scores.columns) == ["detector", "data", "seed", "image_path", "source", "label", "score"]
    assert set(scores["source"]) == {"good", "bad", "worse"}
    assert scores["score"].max() > 1  # raw: anomalib's post-processor would have clamped it
    for detector, group in scores.groupby("detector"):
        row = results[(results["detector"] == detector) & results["error"].isna()].iloc[0]
        assert row["AUROC"] == pytest.approx(roc_auc_score(group["label"], group["score"]), abs=1e-9)
        assert row["AUPROut"] == pytest.approx(average_precision_score(group["label"], group["score"]), abs=1e-9)
        assert row["images"] == len(group) == 10
        assert row["images_per_s"] > 0

    assert "Each outside set" not in out
    assert "[4/4] Padim on Folder (num_workers=-1), seed 3" in out
    assert "epoch 1/1" in out
    assert f"In runs/benchmark/{run.name}: run.json, results.csv" in out
    assert f"As a page: flowood report runs/benchmark/{run.name}" in out
    assert max(map(len, out.splitlines())) <= 100 + len(str(images))
    for detector, group in scores.groupby("detector"):
        shown = out.rpartition(f"{detector} on Folder (num_workers=0), seed 3")[2]
        sides = {label: side.sort_values("score")["score"] for label, side in group.groupby("label")}
        wrong = [*sides[0].iloc[:-3:-1], *sides[1].iloc[:2]]
        found = re.findall(r"(\S+) +(?:normal|anomalous) *$", shown, re.MULTILINE)
        assert found[:4] == [f"{score:.4g}" for score in wrong]
    assert "2 of 4 jobs failed" in err
    assert f"Full tracebacks: runs/benchmark/{run.name}/benchmark.log" in err
    assert "Traceback" not in err
    assert "Traceback" in (run / "benchmark.log").read_text()
    assert Image.open(run / "scores.png").size[0] > 300
    assert not list(here.rglob("images"))  # no picture for each test image

    record = json.loads((run / "run.json").read_text())
    assert record["command"] == "benchmark"
    assert record["versions"]["anomalib"] == version("anomalib")
    assert record["settings"] == {"seeds": [3], "accelerators": ["cpu"], "trainer": {}}
    assert record["detectors"] == {"DFM tiny": DFM, "Padim": PADIM}
    assert record["data"]["Folder (num_workers=0)"] == folder(images)

    main(["report", str(run)])
    page = (run / "report" / "index.html").read_text()
    # Every test image, each with its map: each detector has fewer than it would show.
    assert page.count('class="map" href="data:image/png') == 2 * 10
    assert page.count("failed: ValueError") == 2


def test_every_outside_set_has_its_own_columns_and_lines(here, capsys):
    idx_folder(here / "ramps", "plain", train=60, test=20)
    idx_folder(here / "squares", "square", seed=1, train=2, test=12)
    idx_folder(here / "others", "plain", seed=2, train=2, test=8)
    small = {"image_size": [12, 12], "channels": 1, "coupling_layers": 4, "hidden_channels": 16, "bottleneck_dim": 3}
    runner = BenchmarkRunner(BenchmarkJobGenerator(["cpu"]))
    results = runner.run(
        {
            "trainer": {"max_epochs": 1},
            "model": {"grid": [{"class_path": "PixelFlow", "name": "flow", "init_args": small}, DFM]},
            "data": {
                "class_path": "CrossDataset",
                "name": "ramps → two",
                "init_args": {
                    "in_distribution": "ramps",
                    "out_of_distribution": ["squares", "others"],
                    "val_split_ratio": 0.4,
                },
            },
        }
    )
    (run,) = (here / "runs" / "benchmark").iterdir()
    pd.testing.assert_frame_equal(pd.read_csv(run / "results.csv")[["AUROC/mean"]], results[["AUROC/mean"]])
    scores = pd.read_csv(run / "scores.csv")
    for _, row in results.iterrows():
        group = scores[scores["detector"] == row["detector"]]
        inside = group["label"] == 0
        for name in ("squares", "others"):
            pair = group[inside | (group["source"] == name)]
            assert row[f"AUROC/{name}"] == pytest.approx(roc_auc_score(pair["label"], pair["score"]), abs=1e-9)
            precision = average_precision_score(1 - pair["label"], -pair["score"])
            assert row[f"AUPRIn/{name}"] == pytest.approx(precision, abs=1e-9)
        for metric in ("AUROC", "FPR95", "AUPROut", "AUPRIn", "DetectionError"):
            assert row[f"{metric}/mean"] == pytest.approx((row[f"{metric}/squares"] + row[f"{metric}/others"]) / 2)
            assert 0 <= row[metric] <= 1
    assert list(results["BitsPerDim/inside"].notna()) == [True, False]  # DFM has no likelihood
    assert list(results["BitsPerDim/others"].notna()) == [True, False]

    out = capsys.readouterr().out
    lines = out[out.index("Each outside set") :].splitlines()
    shown = [line for line in lines if line.strip().startswith(("flow", "DFM tiny"))]
    assert [line.split("two")[1].split()[0] for line in shown] == ["others"] * 2 + ["squares"] * 2 + ["mean"] * 2
    assert max(map(len, lines)) <= 100
    table = (run / "table.md").read_text()
    assert table.index("| detector | data | AUROC") < table.index("| detector | data | outside | AUROC")


def test_results_are_written_after_each_job(here, images, monkeypatch):
    seen = []

    def run(self: BenchmarkJob, task_id: int | None = None) -> dict:
        files = list(here.glob("runs/benchmark/*/results.csv"))
        seen.append(len(pd.read_csv(files[0])) if files else 0)
        if self.seed == 3:
            raise KeyboardInterrupt
        columns = {"image_path": ["a/b.png", "c/d.png"], "source": ["a", "c"], "label": [0, 1], "score": [1.0, 2.0]}
        self.scores = pd.DataFrame(columns).assign(detector=self.detector, data=self.data, seed=self.seed)
        return {**self.row(), "AUROC": 1.0, "FPR95": 0.0, "fit_duration": 1.0, "images_per_s": 5.0}

    monkeypatch.setattr(BenchmarkJob, "run", run)
    monkeypatch.setattr(BenchmarkJob, "check", lambda self, counts: None)
    runner = BenchmarkRunner(BenchmarkJobGenerator(["cpu"]))
    with pytest.raises(KeyboardInterrupt):
        runner.run({"seed": {"grid": [1, 2, 3]}, "model": DFM, "data": folder(images)})
    assert seen == [0, 1, 2]
    (path,) = here.glob("runs/benchmark/*/scores.csv")
    assert len(pd.read_csv(path)) == 4
    assert (path.parent / "scores.png").exists()  # interrupted, and still drawn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {**DFM, "class_path": "Pixelflo"}}, "Unknown detector 'Pixelflo'. Did you mean 'pixelflow'"),
        ({"model": {**DFM, "class_path": "anomalib.models.Padm"}}, "'anomalib.models.Padm'. Did you mean 'padim'"),
        ({"model": {**DFM, "init_args": {"lyer": "layer1"}}}, "argument of Dfm 'lyer'. Did you mean 'layer'"),
        ({"model": {**DFM, "init_args": {"pca_level": "high"}}}, r"(?s)Dfm: .*pca_level.*float.*Got value: high"),
        ({"model": {**DFM, "init_arg": {"layer": "layer1"}}}, "'init_arg'. Did you mean 'init_args'"),
        ({"model": {"clas_path": "Padim"}}, "key in a model entry 'clas_path'. Did you mean 'class_path'"),
        ({"model": {"gird": [DFM]}}, "key in a model entry 'gird'. Did you mean 'grid'"),
        ({"model": {"grid": ["Padim"]}}, "needs a class_path, got 'Padim'"),
        ({"data": {"class_path": "Foldr"}}, "Unknown data module 'Foldr'. Did you mean"),
        ({"trainer": {"max_epoch": 1}}, "trainer argument 'max_epoch'. Did you mean 'max_epochs'"),
        ({"trainer": {"callbacks": []}}, "callbacks is set by the benchmark itself"),
        ({"trainer": {"max_epochs": {"grid": [1, 2]}}}, "grid is possible in seed, model and data only"),
        ({"trianer": {}}, "'trianer'. Did you mean 'trainer'"),
        ({"data": None}, "lacks data"),
        ({"seed": {"grid": [0, 2**32]}}, "benchmark.seed has to be an integer from 0 to 4294967295"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(here, images, change, message, monkeypatch):
    monkeypatch.setattr(BenchmarkJob, "run", lambda self: pytest.fail("a job was run"))
    with pytest.raises(ValueError, match=message):
        BenchmarkRunner(BenchmarkJobGenerator(["cpu"])).run({"model": DFM, "data": folder(images), **change})
    assert not (here / "runs").exists()


def test_a_wrong_value_in_the_last_entry_is_found_first(here, images, monkeypatch):
    monkeypatch.setattr(BenchmarkJob, "run", lambda self: pytest.fail("a job was run"))
    wrong = {"class_path": "PixelFlow", "init_args": {"mask": "cycel"}}
    with pytest.raises(ValueError, match=r"Job 2 of 2 \(PixelFlow on Folder, seed 42\) cannot run: .*cycel"):
        BenchmarkRunner(BenchmarkJobGenerator(["cpu"])).run({"model": {"grid": [DFM, wrong]}, "data": folder(images)})


PARTS = {"class_path": "OneClass", "init_args": {"dataset": "./data/parts"}}
ALPHA = {
    "class_path": "anomalib_flowood.models.components.ConformalPostProcessor",
    "init_args": {"alpha": 0.01},
}


def flow(**init_args: object) -> dict:
    return {"class_path": "PixelFlow", "init_args": {"image_size": [8, 8], "channels": 1, **init_args}}


def maps(**init_args: object) -> dict:
    return {"class_path": "FeatureMapFlow", "init_args": {"backbone": BACKBONE, "pre_trained": False, **init_args}}


def test_whatever_can_be_known_is_said_at_once_before_the_first_job(here, images, monkeypatch):
    """Too few images for the level and for the directions, folders and weights that are not there."""
    monkeypatch.setattr(BenchmarkJob, "run", lambda self: pytest.fail("a job was run"))
    for place, count in (("train/good", 8), ("test/good", 2), ("test/bad", 2)):
        (here / "data/parts" / place).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), 10 * number).save(here / "data/parts" / place / f"{number}.png")
    wide = maps(image_size=[32, 32], map_layers=[4], score_layers=[], subspace_dim=64)
    gone = maps(backbone="local-dir:gone")
    models = {"grid": [flow(), flow(post_processor=ALPHA), wide, gone]}
    data = {"grid": [PARTS, {"class_path": "OneClass", "init_args": {"dataset": "./lost"}}, folder(images, root="no")]}
    with pytest.raises(ValueError, match="5 things are wrong, and nothing was run") as caught:
        BenchmarkRunner(BenchmarkJobGenerator(["cpu"])).run({"seed": {"grid": [0, 1]}, "model": models, "data": data})
    said = str(caught.value)
    assert re.search(r"\(PixelFlow on lost, seed 0\) cannot run: There is no folder lost", said)
    assert re.search(r"\(PixelFlow on Folder, seed 0\) cannot run: Path does not exist", said)
    assert re.search(
        r"on parts, seed 0\) cannot run: alpha=0.01 takes at least 100 in-distribution .* there are 2", said
    )
    assert re.search(
        r"64 principal directions need more than 64 descriptors of layer .*, got 6: give more images", said
    )
    assert re.search(r"and 2 more cannot run: .*gone", said)
    assert not (here / "runs").exists()


def test_data_are_named_by_their_folders(here, images):
    def names(*entries: dict) -> list[str]:
        return [
            job.data
            for job in BenchmarkJobGenerator(["cpu"]).generate_jobs({"model": DFM, "data": {"grid": [*entries]}})
        ]

    cross = {
        "class_path": "CrossDataset",
        "init_args": {"in_distribution": "mnist", "out_of_distribution": ["./a/kinds"]},
    }
    kinds = [{"class_path": "OneClass", "init_args": {"dataset": "mnist", "normal_class": number}} for number in (1, 2)]
    other = {"class_path": "OneClass", "init_args": {"dataset": "./other/parts"}}
    assert names(PARTS, cross, {**cross, "name": "mine"}, folder(images)) == [
        "parts",
        "mnist → kinds",
        "mine",
        "Folder",
    ]
    assert names(*kinds) == ["mnist (normal_class=1)", "mnist (normal_class=2)"]
    assert names(PARTS, other) == ["parts (dataset=./data/parts)", "parts (dataset=./other/parts)"]


def test_the_error_is_anomalibs_too():
    assert issubclass(BenchmarkError, SerialExecutionError)


def test_an_interrupted_benchmark_goes_on(here, images, monkeypatch):
    """Finished jobs are kept to the last digit; the failed one and those that were not reached are run."""
    seeds, stops = [], True

    def run(self: BenchmarkJob, task_id: int | None = None) -> dict:
        seeds.append(self.seed)
        if stops and self.seed == 2:
            raise ValueError("broken")
        if stops and self.seed == 3:
            raise KeyboardInterrupt
        columns = {"image_path": ["a/b.png", "-c.png"], "source": ["=a", "NA"], "label": [0, 1]}
        scores = pd.DataFrame({**columns, "score": [0.1 + self.seed / 7, 1 / 3]})
        self.scores = scores.assign(detector=self.detector, data=self.data, seed=self.seed)
        return {**self.row(), "AUROC": 1 / 3, "FPR95": 0.0, "fit_duration": 1.0, "images_per_s": 5.0, "note": "-x"}

    monkeypatch.setattr(BenchmarkJob, "run", run)
    monkeypatch.setattr(BenchmarkJob, "check", lambda self, counts: None)
    section = {
        "seed": {"grid": [1, 2, 3]},
        "model": {**DFM, "name": "=DFM"},
        "data": folder(images),
    }
    Path("bench.yaml").write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": section}))
    with pytest.raises(SystemExit) as exit_info:
        main(["benchmark", "--config", "bench.yaml"])
    assert exit_info.value.code == 130
    (path,) = here.glob("runs/benchmark/*")
    before = pd.read_csv(path / "scores.csv")
    orphan = before.assign(seed=3)  # killed between the scores and the row of a job
    pd.concat([before, orphan]).to_csv(path / "scores.csv", index=False)

    stops = False
    Path("bench.yaml").unlink()
    main(["benchmark", "--resume", str(path)])
    assert seeds == [1, 2, 3, 2, 3]
    assert list(here.glob("runs/benchmark/*")) == [path]
    results, scores = pd.read_csv(path / "results.csv"), pd.read_csv(path / "scores.csv")
    assert list(results["seed"]) == [1, 2, 3]
    assert "error" not in results
    assert set(results["detector"]) == {"'=DFM"}
    assert set(results["note"]) == {"'-x"}
    pd.testing.assert_frame_equal(scores[:2], before, check_exact=True)
    assert list(scores["seed"]) == [1, 1, 2, 2, 3, 3]
    main(["benchmark", "--resume", str(path)])
    assert len(seeds) == 5


def test_names_that_look_like_nothing_outlive_an_interruption(here, images, monkeypatch):
    """A detector called "nan" lost its name, was run again, and a class "007" was 7."""
    ran, stops = [], True

    def run(self: BenchmarkJob, task_id: int | None = None) -> dict:
        if stops and self.seed == 2:
            raise KeyboardInterrupt
        ran.append((self.detector, self.seed))
        columns = {"image_path": ["nan", "b.png"], "source": ["NaN", " 1e5"], "label": [0, 1], "score": [0.0, 1.0]}
        self.scores = pd.DataFrame(columns).assign(detector=self.detector, data=self.data, seed=self.seed)
        return {**self.row(), "AUROC": 1.0, "FPR95": 0.0, "fit_duration": 1.0, "images_per_s": 5.0, **settings}

    settings = {
        "model.init_args.a": "007",
        "data.init_args.b": "1e5",
        "data.init_args.c": "nan",
        "model.init_args.d": -1,
    }
    monkeypatch.setattr(BenchmarkJob, "run", run)
    monkeypatch.setattr(BenchmarkJob, "check", lambda self, counts: None)
    section = {
        "seed": {"grid": [1, 2]},
        "model": {"grid": [{**DFM, "name": "nan"}, {**DFM, "name": "1e5"}]},
        "data": {**folder(images), "name": "NA"},
    }
    Path("bench.yaml").write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": section}))
    with pytest.raises(SystemExit):
        main(["benchmark", "--config", "bench.yaml"])
    (path,) = here.glob("runs/benchmark/*")
    before = {file: (path / file).read_text() for file in ("results.csv", "scores.csv")}
    stops = False
    main(["benchmark", "--resume", str(path)])
    assert ran == [("nan", 1), ("1e5", 1), ("nan", 2), ("1e5", 2)]
    assert all((path / file).read_text().startswith(text) for file, text in before.items())
    read = read_run(path)
    assert list(read.results["detector"]) == ["nan", "1e5"] * 2
    assert set(read.scores["source"]) == {"NaN", " 1e5"}
    assert set(read.scores["image_path"]) == {"nan", "b.png"}


def test_two_processes_do_not_write_to_one_folder(here, images, monkeypatch, capsys):
    """Each ran all jobs, and each image was in the scores twice."""
    section = {"model": DFM, "data": folder(images)}
    Path("there").mkdir()
    Path("there/benchmark.yaml").write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": section}))
    with held(Path("there")), pytest.raises(SystemExit) as exit_info:
        main(["benchmark", "--resume", "there"])
    assert exit_info.value.code == 1
    assert "Another process writes to there" in capsys.readouterr().err
    main(["benchmark", "--resume", "there"])
    assert len(pd.read_csv("there/results.csv")) == 1


def test_of_several_processes_the_first_alone_writes_and_speaks(here, images, monkeypatch, capsys):
    """Lightning starts the command once more for each; all go through the same jobs."""
    seeds = []

    def run(self: BenchmarkJob, task_id: int | None = None) -> dict:
        seeds.append(self.seed)
        if self.seed == 2:
            raise ValueError("broken")
        self.scores = pd.DataFrame({"image_path": ["a.png"], "source": ["a"], "label": [0], "score": [1.0]})
        self.scores = self.scores.assign(detector=self.detector, data=self.data, seed=self.seed)
        return {**self.row(), "AUROC": 0.5, "FPR95": 0.5, "fit_duration": 1.0, "images_per_s": 5.0}

    monkeypatch.setattr(BenchmarkJob, "run", run)
    monkeypatch.setattr(BenchmarkJob, "check", lambda self, counts: None)
    section = {"seed": {"grid": [1, 2]}, "model": DFM, "data": folder(images)}
    with pytest.raises(BenchmarkError):
        BenchmarkRunner(BenchmarkJobGenerator(["cpu"])).run(section)
    (written,) = here.glob("runs/benchmark/*")
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    capsys.readouterr()

    monkeypatch.setenv("LOCAL_RANK", "1")
    for resumed in (None, written):
        runner = BenchmarkRunner(BenchmarkJobGenerator(["cpu"]))
        runner.resumed = resumed
        runner.run(section)  # Lightning would kill the first one for an error's exit status of another
    assert seeds == [1, 2, 1, 2, 2]
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before
    assert capsys.readouterr().out == ""


def test_the_table_does_not_wait_for_the_picture(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "score_histograms", interrupted)
    row = {"detector": "flow", "data": "parts", "seed": 0, "AUROC": 0.875, "FPR95": 0.5}
    scores = pd.DataFrame({"image_path": ["a.png"], "source": ["a"], "label": [0], "score": [1.0]})
    record = Results(tmp_path)
    record.add(row, scores.assign(detector="flow", data="parts", seed=0))
    console = Console(file=io.StringIO(), width=100)
    with pytest.raises(KeyboardInterrupt):
        record.finish(console)
    assert "0.875" in console.file.getvalue()


def test_jobs_that_saw_other_test_images_are_said_not_to_be_comparable(tmp_path):
    """As of a benchmark that was resumed after its folder had changed: their mean was shown, without a word."""
    record = Results(tmp_path)
    for data, seed, images in (("parts", 0, 22), ("parts", 1, 1023), ("others", 0, 5), ("others", 1, 5)):
        record.add(
            {"detector": "d", "data": data, "seed": seed, "AUROC": 0.5, "FPR95": 0.5, "images": images}, pd.DataFrame()
        )
    record.add({"detector": "d", "data": "parts", "seed": 2, "error": "failed"}, pd.DataFrame())
    console = Console(file=io.StringIO(), width=100)
    record.finish(console)
    assert "parts: some jobs were tested on 22 images, others on 1,023, so that" in console.file.getvalue()
    assert "others: some" not in console.file.getvalue()


def test_what_is_to_be_typed_next_can_be_typed(tmp_path):
    (tmp_path / "of mine").mkdir()
    results = Results(tmp_path / "of mine")
    results.add({"detector": "d", "data": "parts", "seed": 0, "error": "none"}, pd.DataFrame())
    console = Console(file=io.StringIO(), width=100)
    results.finish(console, 0)
    command = console.file.getvalue().partition("As a page: ")[2]
    assert shlex.split(command) == ["flowood", "report", str(tmp_path / "of mine")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --config FILE"),
        (["--config", "a.yaml", "--resume", "b"], "either --config FILE"),
        (["--resume", "gone"], "no configuration file gone/benchmark.yaml. --resume takes the folder"),
    ],
)
def test_a_benchmark_is_new_or_goes_on(here, arguments, message, capsys):
    (here / "a.yaml").touch()
    with pytest.raises(SystemExit) as exit_info:
        main(["benchmark", *arguments])
    assert exit_info.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())
