# SPDX-License-Identifier: Apache-2.0
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from model_helpers import BACKBONE, idx_folder

from anomalib_flowood import CrossDataset
from benchmarks.contest import contest, data, detectors, report, tasks
from benchmarks.contest import plan as plans
from benchmarks.contest.data import HELD_OUT, IndustrialFolder
from benchmarks.contest.memo import Memo
from benchmarks.contest.plan import Job
from benchmarks.contest.tasks import Options, Task


def test_run_report_resume_retry(tmp_path, folder, small_contest, monkeypatch):
    into, output = tmp_path / "into", tmp_path / "out"
    into.mkdir()
    (into / "README.md").write_text("before\n<!-- contest: begin -->\nold\n<!-- contest: end -->\nafter\n")
    options = Options(output, ("industrial",), [folder], seeds=(0,), backbone="local-dir:none")
    good = plans.DETECTORS["KNN"]

    def broken(*_):
        raise RuntimeError("out of order\nand more")

    monkeypatch.setitem(plans.DETECTORS, "KNN", replace(good, build=broken))
    rows = contest.run(options).set_index("detector")
    assert rows.loc["KNN", "error"] == "RuntimeError: out of order"
    assert "out of order" in (output / "errors.log").read_text()
    flow = rows.loc["FeatureMapFlow"]
    assert flow["train_images"] == 22  # two are held out
    assert flow["test_images"] == 11
    assert 0 <= flow["auroc"] <= 1
    assert flow["pixel_auroc"] > 0.5
    assert flow["epochs"] == 1
    assert flow["images_per_s"] > 0

    monkeypatch.setitem(plans.DETECTORS, "KNN", good)
    rows = contest.run(options).set_index("detector")
    assert small_contest == ["flow", "knn"]  # the finished row was not run again, the failed one was
    assert rows["error"].isna().all()
    assert len(rows) == 2
    contest.run(options)
    assert small_contest == ["flow", "knn"]

    written = report.write(output, into)
    assert into / "maps.png" in written
    text = (into / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| FeatureMapFlow |" in text
    assert "![plates" in text
    assert "old" not in text
    report.write(output, into)
    assert (into / "README.md").read_text() == text


def test_a_folder_without_masks(tmp_path, folder, small_contest):
    """All that the contest shows beside the suite, pictures included, can do without masks."""
    shutil.rmtree(folder / "ground_truth")
    output = tmp_path / "out"
    options = Options(output, ("industrial",), [folder], seeds=(0,), backbone="local-dir:none")
    rows = contest.run(options)
    assert rows["error"].isna().all()
    assert rows["auroc"].between(0, 1).all()
    assert rows["images_per_s"].gt(0).all()
    assert rows[["pixel_auroc", "aupro", "aupimo"]].isna().all(axis=None)
    written = report.write(output, tmp_path / "into")
    assert tmp_path / "into/cost.png" in written
    assert not list(tmp_path.glob("into/maps*"))


def as_visa(folder, root, category="candle"):
    """The images of ``folder`` as VisA is laid out before anomalib splits it."""
    lines = ["object,split,label,image,mask"]
    for place, label, kind in (
        ("train/good", "normal", "Normal"), ("test/good", "normal", "Normal"), ("test/spot", "anomaly", "Anomaly"),
    ):  # fmt: skip
        split = place.partition("/")[0]
        for path in sorted((folder / place).iterdir()):
            image = Path(category, "Data/Images", kind, f"{split}_{path.name}")
            (root / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / image)
            mask = ""
            if kind == "Anomaly":
                mask = Path(category, "Data/Masks/Anomaly", f"{split}_{path.stem}.png")
                (root / mask).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / "ground_truth/spot" / f"{path.stem}.png", root / mask)
            lines.append(f"{category},{split},{label},{image},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def test_mvtec_and_visa(folder, tmp_path, small_contest):
    mvtec = tmp_path / "MVTecAD"
    for category in ("bottle", "cable"):
        shutil.copytree(folder, mvtec / category)
    options = Options(
        tmp_path / "out", ("industrial",), seeds=(0,), categories=("bottle", "candle"), backbone="local-dir:none",
        mvtec=mvtec, visa=as_visa(folder, tmp_path / "visa"),
    )  # fmt: skip
    rows = contest.run(options)
    assert rows["error"].isna().all()
    assert sorted(set(rows["task"])) == ["mvtec/bottle", "visa/candle"]
    assert (rows["train_images"] == 22).all()  # a tenth of 24 is held out
    assert (rows["test_images"] == 11).all()
    assert rows[["auroc", "pixel_auroc", "aupro"]].loc[rows["detector"] == "FeatureMapFlow"].notna().all(axis=None)


def test_one_class_rows_for_another_data_set(tmp_path, small_contest, monkeypatch):

    idx_folder(tmp_path / "a", "plain")
    for name, texture in (("fashion_mnist", "plain"), ("mnist", "square")):
        if not (tmp_path / name).exists():
            idx_folder(tmp_path / name, texture, seed=len(name))
    inside, outside = CrossDataset, str(tmp_path / "mnist")
    task = Task(
        "one_class",
        "ramps class 0",
        "one_class",
        partial(inside, tmp_path / "fashion_mnist", [tmp_path / "a"]),
        tasks.shown("ramps class 0", "mnist"),
    )
    monkeypatch.setattr(data, "CrossDataset", lambda first, others, root, test_limit: inside(outside, [tmp_path / "a"]))
    job = Job(task, plans.DETECTORS["KNN"], 0)
    with Memo(tmp_path) as memo:
        rows = contest.run_job(job, "local-dir:none", memo, Options(tmp_path, ("one_class", "cross")))
    assert [row["part"] for row in rows] == ["one_class", "cross"]
    assert rows[1]["task"] == "ramps class 0 -> mnist"
    assert rows[1]["test_images"] == 80
    assert rows[1]["auroc"] > 0.9


def test_training_stops_in_time(tmp_path, folder, monkeypatch):
    """FastFlow and its kind on a network without weights: the rule ends them, and the loss is a number."""
    build = partial(detectors.DETECTORS["Patchflow"].build, BACKBONE, 64, "industrial")
    create = detectors.timm.create_model
    monkeypatch.setattr(
        detectors.timm, "create_model", lambda *args, **kw: create(*args, **{**kw, "pretrained": False})
    )
    detector = replace(detectors.DETECTORS["Patchflow"], build=lambda *_: build())
    task = Task("industrial", "plates", "industrial", partial(IndustrialFolder, folder.parent, "plates"))
    task = replace(task, data=partial(IndustrialFolder, folder.parent, "plates", **HELD_OUT))
    options = Options(tmp_path, ("industrial",), cap=0.0)
    with Memo(tmp_path) as memo:
        (row,) = contest.run_job(Job(task, detector, 1), "", memo, options)
    assert row["stopped_by"] == "time"
    assert 0 < row["epochs"] <= 1
