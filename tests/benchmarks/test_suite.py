# SPDX-License-Identifier: Apache-2.0
import io
import shutil
import sys

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.contest import plan as plans
from benchmarks.contest.contest import COLUMNS
from benchmarks.contest.data import HELD_OUT, IndustrialFolder, Together
from benchmarks.results import append_rows, read_rows
from benchmarks.suite import __main__ as suite
from benchmarks.suite import report


@pytest.fixture
def unmasked(folder):
    """The same plates without masks, and turned upside down."""
    other = folder.parent / "cups"
    shutil.copytree(folder, other)
    shutil.rmtree(other / "ground_truth")
    for path in other.glob("*/*/*"):
        Image.open(path).rotate(180).save(path)
    return other


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["suite", *map(str, arguments)])
    return suite.main()


def test_folders_with_and_without_masks(tmp_path, folder, unmasked, small_contest, monkeypatch, capsys):
    output = tmp_path / "out"
    options = ("--output", output, "--backbone", "local-dir:none", "--image-size", 48, "--detectors", *plans.DETECTORS)
    assert command(monkeypatch, "run", folder, unmasked, *options, "--parts", "industrial") == 0
    rows = read_rows(output).set_index(["task", "detector"])
    assert set(rows.index) == {(name, detector) for name in ("plates", "cups") for detector in plans.DETECTORS}
    maps = rows.xs("FeatureMapFlow", level="detector")[["aupro", "pixel_auroc"]]
    assert maps.loc["plates"].between(0.5, 1).all()
    assert maps.loc["cups"].isna().all()
    assert rows["auroc"].between(0, 1).all()
    assert (rows["train_images"] == 22).all()  # a tenth is held out
    assert rows[["images_per_s", "aupimo"]].isna().all(axis=None)  # what only the contest shows

    # What is finished is not run again; the part that is missing is.
    assert len(small_contest) == 4
    assert command(monkeypatch, "run", folder, unmasked, *options) == 0
    assert len(small_contest) == 6
    rows = read_rows(output).set_index(["part", "task", "detector"]).loc["unified"]
    assert set(rows.index) == {
        (f"cups+plates: {name}", detector) for name in ("plates", "cups") for detector in plans.DETECTORS
    }
    assert (rows["train_images"] == 44).all()
    assert (rows["test_images"] == 11).all()
    assert rows.loc[("cups+plates: plates", "FeatureMapFlow"), "aupro"] > 0.5
    assert rows.loc["cups+plates: cups", "aupro"].isna().all()
    shown = capsys.readouterr().out
    assert "One model for all folders" in shown
    assert "2 fits to run, 4 finished before" in shown


def test_what_is_held_out_of_many_folders_is_what_is_held_out_of_each(folder, unmasked):
    folders = [IndustrialFolder(path.parent, path.name, **HELD_OUT) for path in (folder, unmasked)]
    together = Together(folders)
    together.setup()
    held_out = set(together.val_data.samples["image_path"])
    for alone in folders:
        alone.setup()
        assert set(alone.val_data.samples["image_path"]) == {path for path in held_out if f"/{alone.category}/" in path}
    assert len(held_out) == 4
    assert not held_out & set(together.train_data.samples["image_path"])
    assert len(together.train_data) == 44
    batch = next(iter(together.test_of(0)))
    assert batch.gt_mask.any()
    assert next(iter(together.test_of(1))).gt_mask is None


def test_masks_by_name_not_by_place(folder):
    """Of ``1.jpg`` and ``10.jpg`` the masks ``1_mask.png`` and ``10_mask.png`` sort the other way round."""
    for place, ending in (("test/spot", ".jpg"), ("ground_truth/spot", "_mask.png")):
        for old, new in (("000", "1"), ("001", "10")):
            (path,) = (folder / place).glob(f"{old}.*")
            path.rename(path.with_name(f"{new}{ending}"))
    data = IndustrialFolder(folder.parent, folder.name, **HELD_OUT)
    data.setup()
    samples = data.test_data.samples.set_index("image_path")["mask_path"]
    spot = folder / "test/spot"
    assert samples[str(spot / "10.jpg")].endswith("ground_truth/spot/10_mask.png")
    assert samples[str(spot / "1.jpg")].endswith("ground_truth/spot/1_mask.png")
    assert samples[str(spot / "002.jpg")].endswith("ground_truth/spot/002.png")


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("ground_truth/spot/003.png", "003.jpg has no mask"),
        ("test/good", "no images in .*test/good"),
        ("test/spot", "no images in .*test/KIND"),
        ("train", "no images in .*train/good"),
    ],
)
def test_a_folder_is_refused_before_anything_is_fitted(tmp_path, folder, monkeypatch, capsys, gone, said):
    path = folder / gone
    path.unlink() if path.is_file() else shutil.rmtree(path)
    assert command(monkeypatch, "run", folder, "--output", tmp_path / "out") == 2
    assert pd.Series([" ".join(capsys.readouterr().err.split())]).str.contains(said).all()


def test_two_folders_of_one_name_are_refused(tmp_path, folder, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "more/plates")
    assert command(monkeypatch, "run", folder, tmp_path / "more/plates", "--output", tmp_path / "out") == 2
    assert "Two folders are called 'plates'" in capsys.readouterr().err


def row(task, detector, auroc, seed=0, part="industrial", **values):
    key = {"part": part, "task": task, "detector": detector, "seed": seed, "auroc": auroc}
    return {**dict.fromkeys(COLUMNS, ""), **key, "fit_s": 10.0, **values}


def test_ranks_means_and_what_is_missing(tmp_path):
    rows = [
        *(row("bolts", "FeatureMapFlow", value, seed, aupro=0.8) for seed, value in enumerate((0.9, 0.92))),
        *(row("cups", "FeatureMapFlow", value, seed) for seed, value in enumerate((0.7, 0.72))),
        row("bolts", "KNN", 0.95),
        row("cups", "KNN", 0.71),
        row("bolts", "PPCA", 0.5),
        row("cups", "PPCA", 0.6),
        row("bolts", "Dfm", 0.99),
        row("cups", "Dfm", "", error="ValueError: broken"),
        row("bolts+cups: bolts", "KNN", 0.65, part="unified"),
        row("bolts+cups: cups", "KNN", 0.75, part="unified"),
        *(row(f"{letter}+many: {letter}", "KNN", 0.5, part="unified") for letter in "ab"),
    ]
    append_rows(tmp_path, rows, COLUMNS)
    text = report.tables(read_rows(tmp_path))
    assert "| KNN | **0.830** | – | 1.2 | – | – | 10.0 |\n" in text
    assert "| KNN | 0.950 | **0.710** |\n" in text
    assert "| FeatureMapFlow | 0.810 | 0.014 | 1.8 | **0.800** | – | 10.0 |\n" in text
    assert "| FeatureMapFlow | 0.910 | **0.710** |\n" in text
    assert "| PPCA | 0.550 | – | 3.0 |" in text
    assert text.index("| KNN") < text.index("| FeatureMapFlow") < text.index("| PPCA")
    assert "| Dfm | – | – | – | – | – | – |\n" in text
    assert "| Dfm | **0.990** | – |\n" in text
    assert "Without a mean, for want of a folder: Dfm." in text
    assert "Failed: Dfm on cups (industrial)." in text
    assert "| KNN | **0.700** | – | 1.0 | – | – | 10.0 |\n" in text
    assert "| KNN | **0.650** | **0.750** |\n" in text
    assert text.count("One model for all folders") == 3
    into = tmp_path / "into"
    into.mkdir()
    (into / "README.md").write_text("rules\n<!-- suite: begin -->\n<!-- suite: end -->\n", encoding="utf-8")
    report.write(tmp_path, into)
    assert "| PPCA | 0.550 |" in (into / "README.md").read_text(encoding="utf-8")


def test_nothing_is_finished_on_every_folder(tmp_path):
    append_rows(tmp_path, [row("bolts", "KNN", 0.5), row("cups", "PPCA", 0.6)], COLUMNS)
    text = report.tables(read_rows(tmp_path))
    assert "| KNN | – | – | – | – | – | – |\n" in text
    assert "| KNN | **0.500** | – |\n" in text
    assert "for want of a folder: KNN, PPCA." in text


def test_tables_fit_into_a_terminal(tmp_path):
    names = ["FeatureMapFlow", "GaussianMixture", "KNN"]
    rows = [row(f"magnetic_tile_{number}", name, 0.5) for number in range(15) for name in names]
    append_rows(tmp_path, [*rows, *(row("mtoc", name, 0.5, aupro=0.7, pixel_auroc=0.9) for name in names)], COLUMNS)
    text = report.tables(read_rows(tmp_path))
    heads = [line for line in text.splitlines() if line.startswith("| detector")]
    assert [line.count("magnetic") for line in heads] == [0, 3, 3, 3, 3, 3, 0]
    console = Console(width=report.WIDTH, file=io.StringIO())
    console.print(Markdown(text))
    shown = console.file.getvalue()
    assert "…" not in shown
    assert shown.count("GaussianMixture") == len(heads)
    assert all(f"magnetic_tile_{number} " in shown for number in range(15))
