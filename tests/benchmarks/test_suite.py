# SPDX-License-Identifier: Apache-2.0
import inspect
import io
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown

import anomalib_flowood
from benchmarks.contest import plan as plans
from benchmarks.contest import tasks
from benchmarks.contest.contest import COLUMNS
from benchmarks.contest.data import HELD_OUT, IndustrialFolder, Together
from benchmarks.contest.stores import DIGEST
from benchmarks.results import append_rows, read_rows
from benchmarks.suite import __main__ as suite
from benchmarks.suite import bars, cells, report
from benchmarks.suite.selections import split_tasks


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
    root = tmp_path / "out"
    output = root / "none-48"
    options = ("--output", root, "--backbone", "local-dir:none", "--image-size", 48, "--detectors", *plans.DETECTORS)
    assert command(monkeypatch, "run", folder, unmasked, *options, "--parts", "industrial") == 0
    rows = read_rows(output).set_index(["task", "detector"])
    assert set(rows.index) == {(name, detector) for name in ("plates", "cups") for detector in plans.DETECTORS}
    maps = rows.xs("FeatureMapFlow", level="detector")[["aupro", "pixel_auroc"]]
    assert maps.loc["plates"].between(0.5, 1).all()
    assert maps.loc["cups"].isna().all()
    assert rows["auroc"].between(0, 1).all()
    assert (rows["train_images"] == 22).all()  # a tenth is held out
    assert (rows["held_out_images"] == 2).all()
    assert (rows["backbone"] == "none").all()
    assert (rows["image_size"] == 48).all()
    assert (rows[["backbone_s", "read_s"]] > 0).all(axis=None)
    assert rows[["images_per_s", "aupimo"]].isna().all(axis=None)  # what only the contest shows

    # What is finished is not run again; the part that is missing is.
    assert len(small_contest) == 4
    stored = {path: path.stat().st_size for path in root.glob("features/*/digests")}
    assert len(stored) == 2
    assert command(monkeypatch, "run", folder, unmasked, *options, "--parts", "industrial", "unified") == 0
    assert len(small_contest) == 6
    # The backbone has seen every image before, but not all damaged copies: an image's place in the data set says how.
    grown = sorted(path.stat().st_size - stored[path] for path in root.glob("features/*/digests"))
    assert grown == [0, DIGEST * 22]
    assert read_rows(output).set_index("part").loc["unified", "hits"].gt(0).all()
    rows = read_rows(output).set_index(["part", "task", "detector"]).loc["unified"]
    pooled = rows.loc["cups+plates"]  # all test images as one
    assert set(pooled.index) == set(plans.DETECTORS)
    assert (pooled["test_images"] == 22).all()
    assert pooled["auroc"].between(0, 1).all()
    assert pooled[["aupro", "pixel_auroc"]].isna().all(axis=None)
    rows = rows.drop("cups+plates", level="task")
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
    assert command(monkeypatch, "run", folder, *options, "--parts", "industrial", "--again") == 0
    assert len(small_contest) == 8
    assert "2 fits to run, 0 finished before" in capsys.readouterr().out


def test_few_images_of_a_folder_are_drawn_by_the_seed(tmp_path, folder, unmasked, small_contest, monkeypatch):
    monkeypatch.setattr(tasks, "FEW", 12)
    options = ("--backbone", "local-dir:none", "--image-size", 48, "--detectors", "KNN", "--seeds", 0, 1)
    assert command(monkeypatch, "run", folder, "--parts", "few", "--output", tmp_path, *options) == 0
    rows = read_rows(tmp_path / "none-48")
    assert list(rows["part"]) == ["few", "few"]  # KNN's only seed is that of the draw
    assert (rows["train_images"] + rows["held_out_images"] == 12).all()
    assert (rows["test_images"] == 11).all()


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
    cost = {"fit_s": 10.0, "train_images": 270, "held_out_images": 30, "backbone_s": 0.012, "read_s": 0.008}
    return {**dict.fromkeys(COLUMNS, ""), **key, **cost, **values}


def stored(tmp_path, rows, stand="net-224"):
    append_rows(tmp_path / stand, rows, COLUMNS)
    return report.tables(report.read_stands([tmp_path / stand]))


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
    text = stored(tmp_path, rows)
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
    assert "net, 224 pixels, seeds 0, 1." in text


def test_nothing_is_finished_on_every_folder(tmp_path):
    text = stored(tmp_path, [row("bolts", "KNN", 0.5), row("cups", "PPCA", 0.6)])
    assert "| KNN | – | – | – | – | – | – |\n" in text
    assert "| KNN | **0.500** | – |\n" in text
    assert "for want of a folder: KNN, PPCA." in text


def test_tables_fit_into_a_terminal(tmp_path):
    names = ["FeatureMapFlow", "Mahalanobis", "KNN"]
    rows = [row(f"magnetic_tile_{number}", name, 0.5) for number in range(15) for name in names]
    text = stored(tmp_path, [*rows, *(row("mtoc", name, 0.5, aupro=0.7, pixel_auroc=0.9) for name in names)])
    heads = [line for line in text.splitlines() if line.startswith("| detector")]
    assert [line.count("magnetic") for line in heads] == [0, 0, 0, 3, 3, 3, 3, 3, 0]
    console = Console(width=cells.WIDTH, file=io.StringIO())
    console.print(Markdown(text))
    shown = console.file.getvalue()
    assert "…" not in shown
    assert shown.count("Mahalanobis") == len(heads)
    assert all(f"magnetic_tile_{number} " in shown for number in range(15))


def by_name(text):
    """Lines of tables by their first cell."""
    lines = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return {line[0]: line[1:] for line in lines}


def test_figures_in_short(tmp_path):
    rows = [
        *(row("bolts", "FeatureMapFlow", value, seed, fit_s=12.0) for seed, value in enumerate((0.9, 0.92))),
        *(row("cups", "FeatureMapFlow", 0.7, seed, train_images=54) for seed in (0, 1)),
        row("bolts", "KNN", 0.95),
        row("cups", "KNN", 0.6),
        row("bolts", "Padim", 0.93),
        row("cups", "Padim", 0.73, fit_s=1000.0, train_images=54),
        *(row(name, "FeatureMapFlow", 0.65, seed, part="few") for name in ("bolts", "cups") for seed in (0, 1)),
        *(row(f"bolts+cups: {name}", "FeatureMapFlow", 0.75, part="unified") for name in ("bolts", "cups")),
        *(row(f"bolts+lamps: {name}", "FeatureMapFlow", 0.1, part="unified") for name in ("bolts", "lamps")),
        *(row("bolts+cups", "FeatureMapFlow", value, seed, part="unified") for seed, value in enumerate((0.5, 0.6))),
    ]
    short = stored(tmp_path, rows).partition("###")[2].partition("###")[0]
    scores, costs = (by_name(part) for part in short.split("A fit to about 300 images"))
    lines = {name: [*cells, *costs[name]] for name, cells in scores.items()}
    # Two passes are 2 x 300 images of 20 ms; the folder with fewer images does not count.
    assert lines["FeatureMapFlow"] == ["0.805", "0.650", "0.750", "0.550", "−0.040", "12.0", "2.00"]
    assert lines["KNN"] == ["0.775", "–", "–", "–", "−0.130", "10.0", "1.67"]
    assert lines["Padim"] == ["0.830", "–", "–", "–", "−0.020", "10.0", "1.67"]
    text = stored(tmp_path, rows)
    assert "Farthest below the best rival: FeatureMapFlow on bolts (−0.040)." in text


def test_what_the_flow_brings(tmp_path):
    trained, without = "FeatureMapFlow (flow)", "FeatureMapFlow (no bank)"
    rows = [
        *(row("bolts", trained, value, seed, aupro=0.6) for seed, value in enumerate((0.9, 0.92))),
        *(row("bolts", without, value, seed, aupro=0.61) for seed, value in enumerate((0.89, 0.89))),
        *(row("cups", trained, 0.7, seed) for seed in (0, 1)),
        row("cups", without, 0.75),
        row("cups", without, "", 1, error="ValueError: broken"),
    ]
    lines = by_name(stored(tmp_path, rows).partition("What the flow brings")[2])
    assert lines["bolts"] == ["+0.020 ± 0.014", "−0.010 ± 0.000"]
    assert lines["cups"] == ["−0.050", "–"]
    assert lines["mean"] == ["−0.020", "−0.010 ± 0.000"]  # of the seed that has every folder


def test_what_rotations_bring(tmp_path):
    turned, without = "EmbeddingFlow", "EmbeddingFlow (no rotations)"
    rows = [
        *(row("bolts", turned, value, seed, part="few") for seed, value in enumerate((0.9, 0.92))),
        *(row("bolts", without, value, seed, part="few") for seed, value in enumerate((0.89, 0.89))),
        row("bolts", turned, 0.95),
        row("bolts", without, 0.96),
    ]
    text = stored(tmp_path, rows)
    lines = by_name(text.partition("What rotations bring")[2])
    assert lines["bolts"] == ["−0.010", "+0.020 ± 0.014"]
    assert "What the flow brings" not in text


def test_what_kinds_bring(tmp_path):
    rows = [row("bolts+cups: bolts", "FeatureMapFlow (no rotations)", 0.9, part="unified")]
    rows += [row("bolts+cups: bolts", "FeatureMapFlow (one kind)", 0.85, part="unified")]
    lines = by_name(stored(tmp_path, rows).partition("What kinds bring")[2])
    assert lines["bolts"] == ["+0.050"]


def test_what_the_memory_bank_brings(tmp_path):
    rows = [row("bolts", "FeatureMapFlow (no rotations)", value, seed) for seed, value in enumerate((0.9, 0.92))]
    rows += [row("bolts", "FeatureMapFlow (no bank)", 0.85, seed) for seed in (0, 1)]
    lines = by_name(stored(tmp_path, rows).partition("What the memory bank brings")[2])
    assert lines["bolts"] == ["+0.060 ± 0.014"]


def test_bars(tmp_path):
    folders = {"casting": 0.99, "elpv_mono": 0.95, "magnetic_tile": 0.99, "mtoc": 0.902, "deeppcb": 0.55}
    rows = [row(name, "FeatureMapFlow", value, aupro=0.88) for name, value in folders.items()]
    rows += [row(name, "PPCA", value - 0.01) for name, value in folders.items() if name != "deeppcb"]
    rows += [row("deeppcb", "PPCA", 0.57)]
    trained = "FeatureMapFlow (flow)"
    rows += [row(name, trained, value + 0.03, aupro=0.87) for name, value in folders.items()]
    rows += [row(name, "FeatureMapFlow (no bank)", value, aupro=0.88) for name, value in folders.items()]
    rows += [row(name, "FeatureMapFlow", value - 0.02, part="few") for name, value in folders.items()]
    for name in folders:
        together = "+".join(sorted(folders))
        rows += [row(f"{together}: {name}", "FeatureMapFlow", 0.86, part="unified")]
        rows += [row(f"{together}: {name}", "PPCA", 0.8, part="unified")]
    for number in range(10):
        rows += [row(f"mnist class {number}", "EmbeddingFlow", 0.991, part="one_class")]
        rows += [row(f"mnist class {number}", "KNN", 0.989, part="one_class")]
    found = {bar.figure: (bar.reached, bar.held) for bar in bars.bars(split_tasks(read(tmp_path, rows)))}
    means = [figure for figure in found if "mean over" in figure]
    assert [found[figure] for figure in means] == [("0.958 (PPCA 0.948)", True)]
    assert found["FeatureMapFlow: image AUROC, how far below the best rival on any folder"] == (
        "0.020 (deeppcb, PPCA)", False,
    )  # fmt: skip
    assert found["FeatureMapFlow: AUPRO on mtoc"] == ("0.880", True)
    assert found["FeatureMapFlow: AUPRO on magnetic_tile"] == ("0.880", False)
    assert found["FeatureMapFlow: image AUROC lost with 40 training images"] == ("+0.020 (0.876 to 0.856)", True)
    against = f"{trained} against FeatureMapFlow (no bank)"
    assert found[f"{against}: mean gain of image AUROC"] == ("+0.030", True)
    assert found[f"{against}: least gain on any folder"][0].startswith("−0.010 (AUPRO on")
    assert found["FeatureMapFlow, one model for all: above every rival by image AUROC"] == (
        "+0.060 (0.860, PPCA 0.800)", False,
    )  # fmt: skip
    assert found["FeatureMapFlow, one model for all: below a model for each by"][1]
    assert found["EmbeddingFlow: mnist, one class"] == ("0.991 (KNN 0.989)", True)
    assert found["FeatureMapFlow: seconds of a fit to 300 images"] == ("10", True)
    assert bars.bars(split_tasks(read(tmp_path / "other", [row("bolts", "KNN", 0.5)]))) == []


def read(tmp_path, rows, stand="net-224"):
    append_rows(tmp_path / stand, rows, COLUMNS)
    return report.read_stands([tmp_path / stand])


def test_readmes_get_the_tables_of_two_backbones(tmp_path):
    for stand, better in (("net-224", 0.0), ("other_net-240", 0.05)):
        rows = [row(name, "KNN", 0.9 + better) for name in ("bolts", "cups")]
        append_rows(
            tmp_path / stand, [*rows, row("bolts", "Padim", 0.8, aupro=0.7), row("cups", "Padim", 0.7)], COLUMNS
        )
    folder, alone, bare = tmp_path / "page", tmp_path / "alone.md", tmp_path / "bare.md"
    folder.mkdir()
    page = folder / "README.md"
    page.write_text("rules\n<!-- suite: begin -->\nstale\n<!-- suite: end -->\nend\n", encoding="utf-8")
    alone.write_text("first\n<!-- all sets: begin -->\n<!-- all sets: end -->\nlast\n", encoding="utf-8")
    bare.write_text("nothing\n", encoding="utf-8")
    stands = [tmp_path / "net-224", tmp_path / "other_net-240"]
    written = report.write(stands, [folder, alone])
    assert {page, alone, folder / "results.csv"} <= set(written)
    assert set(pd.read_csv(folder / "results.csv")["stand"]) == {"net, 224", "other_net, 240"}
    shown = page.read_text(encoding="utf-8")
    assert "stale" not in shown
    assert report.tables(pd.read_csv(folder / "results.csv")) in shown
    means, _, worst = shown.partition("Another backbone")[2].partition("The same")
    assert by_name(means)["detector"] == ["net, 224", "other_net, 240"]
    assert by_name(means)["KNN"] == ["0.900", "0.950"]
    assert by_name(worst.partition("Mean AUPRO")[0])["Padim"] == ["−0.200", "−0.250"]
    short = alone.read_text(encoding="utf-8")
    assert short.startswith("first\n<!-- all sets: begin -->\n\nImage AUROC")
    assert max(len(line) for line in short.splitlines() if not line.startswith("|")) <= 120
    assert short.endswith("<!-- all sets: end -->\nlast\n")
    assert by_name(short)["KNN"] == ["0.900", "0.900", "0.900", "10.0"]
    assert by_name(short.partition("AUPRO")[2])["Padim"] == ["0.700"]
    with pytest.raises(ValueError, match="bare.md has neither the marker"):
        report.write(stands, [bare])
    with pytest.raises(FileNotFoundError, match="no rows"):
        report.write([tmp_path / "none-9"])


def test_the_published_page_is_that_of_the_published_rows():
    here = Path(report.__file__).parent
    page = (here / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- suite: begin -->", "<!-- suite: end -->"
    shown = page.partition(begin)[2].partition(end)[0].strip()
    rows = here / "results.csv"
    assert shown == (report.tables(pd.read_csv(rows)).strip() if rows.is_file() else "")


@pytest.mark.parametrize(
    ("folder", "size"),
    [
        ("embedding_flow", 224),  # that of its default backbone
        ("feature_map_flow", inspect.signature(anomalib_flowood.FeatureMapFlow).parameters["image_size"].default[0]),
    ],
)
def test_the_page_of_a_detector_is_of_its_own_size(folder, size):
    page = (Path(anomalib_flowood.__file__).parent / f"models/{folder}/README.md").read_text(encoding="utf-8")
    begin, end = f"<!-- {report.SETS_MARKER}: begin -->", f"<!-- {report.SETS_MARKER}: end -->"
    shown = page.partition(begin)[2].partition(end)[0].strip()
    rows = split_tasks(pd.read_csv(Path(report.__file__).with_name("results.csv")))
    assert shown == report.all_sets(rows[rows["stand"] == f"tf_efficientnet_lite0, {size}"]).strip()
