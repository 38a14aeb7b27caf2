# SPDX-License-Identifier: Apache-2.0
import base64
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from report_helpers import DETECTORS, Page, in_memory, job, report, samples_of, write_run
from scipy.integrate import trapezoid
from sklearn.metrics import roc_auc_score

from anomalib_flowood.benchmark import Results
from anomalib_flowood.cli import main
from anomalib_flowood.data import CrossDataset
from anomalib_flowood.report.charts import histogram_chart, speed_chart
from anomalib_flowood.report.curves import roc_chart
from anomalib_flowood.report.plots import shown_names, source_colours
from anomalib_flowood.report.thumbnails import SIDE


@pytest.fixture
def samples() -> pd.DataFrame:
    """Test images that are nowhere."""
    count = 30
    names = [f"nowhere/{number}.png" for number in range(2 * count)]
    return pd.DataFrame(
        {"image_path": names, "source": ["in"] * count + ["out"] * count, "label": [0] * count + [1] * count}
    )


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def stored(page: Page) -> dict[str, dict]:
    """The images of a page, each of which stands in it once, by their identifiers."""
    return {image["id"]: image for image in page.all("image") if "id" in image}


def thumbnails(page: Page) -> list[dict]:
    """The images as they are shown, in order: their names and what they show."""
    tiles = [
        (tile, page.elements[place + 1]) for place, (_, tile) in enumerate(page.elements) if tile.get("class") == "tile"
    ]
    images = stored(page)
    assert all(tag == "use" for _, (tag, _) in tiles)
    return [{"alt": tile["aria-label"], "src": images[use["href"][1:]]["href"]} for tile, (_, use) in tiles]


def labels_of(page: Page) -> list[str]:
    """What charts say."""
    return [svg["aria-label"] for svg in page.all("svg") if svg.get("class") == "marks"]


def test_a_run_of_images_in_memory(tmp_path: Path) -> None:
    entry = in_memory(tmp_path)
    folder = write_run(tmp_path / "run", {"shapes": samples_of(entry)}, entries={"shapes": entry}, seeds=(0, 1))
    path = report(folder)
    assert path == folder / "report" / "index.html"
    page = Page(path)

    # Tables: all outside images together, and two sets with their mean.
    numbers = [float(cell["data-value"]) for cell in page.all("td") if "data-value" in cell and "class" not in cell]
    assert len(numbers) == 3 * 5 + 3 * 3 * 2 + 3 * 2 * 3  # the last: images, AUROC and median of each source
    results = pd.read_csv(folder / "results.csv")
    means = results.groupby("detector", sort=False)["AUROC"].mean()
    for name in DETECTORS:
        assert means[name] == pytest.approx(min(numbers, key=lambda value: abs(value - means[name])))
    assert page.all("strong")
    assert "each outside set" in page.text
    assert [head["data-first"] for head in page.all("th") if head.get("scope") == "col"][:4] == [
        "ascending",
        "descending",
        "ascending",
        "ascending",
    ]

    # Charts: three views with two curves and three histograms each, and two of speed; each is a file too.
    spoken = labels_of(page)
    assert sum(label.startswith("ROC curves, ") for label in spoken) == 3
    assert sum(label.startswith("Precision-recall curves, ") for label in spoken) == 3
    assert sum(label.startswith("Score histograms of ") for label in spoken) == 9
    assert sum(label.startswith("AUROC against ") for label in spoken) == 2
    assert f"good one {means['good one']:.3f} ± " in spoken[0]
    pictures = sorted((path.parent / "pictures").iterdir())
    assert len(pictures) == len(spoken)
    assert {ET.parse(picture).getroot().tag for picture in pictures} == {"{http://www.w3.org/2000/svg}svg"}

    # Thumbnails: the pixels of the images on which the first seed is most wrong, and of typical ones, in this order.
    scores = pd.read_csv(folder / "scores.csv").query("detector == 'good one' and seed == 0").sort_values("score")
    expected = []
    for paths in (
        scores.query("label == 0")["image_path"].tolist()[::-1],
        *(group["image_path"].tolist() for _, group in scores.query("label == 1").groupby("source")),
    ):
        assert len(paths) == 12
        expected += [*paths[:5], *paths[5:8]]  # the middle of 12 is the 6th and the 7th
    shown = thumbnails(page)
    assert len(shown) == 3 * 3 * 8
    assert [image["alt"] for image in shown[:24]] == expected
    assert len(stored(page)) == 36  # all test images, each of them once
    assert len({image["href"] for image in stored(page).values()}) == 36
    datamodule = CrossDataset(**entry["init_args"])
    datamodule.setup("test")
    for image in shown:
        place = datamodule.test_data.samples["image_path"].tolist().index(image["alt"])
        original = (datamodule.test_data[place].image * 255).round().numpy().transpose(1, 2, 0)
        assert np.array_equal(np.asarray(decoded(image["src"])), original)
    assert f"{scores.query('label == 0')['score'].max():,.4g}".replace("-", "−") in page.text
    assert "missing" not in page.text

    for text in ("anomalib-flowood", "Python", "class_path: PixelFlow", "out_of_distribution:", "seeds:"):
        assert text in page.text


def test_the_page_fetches_nothing_and_is_well_formed(tmp_path: Path) -> None:
    entry = in_memory(tmp_path)
    data = {"a/b": samples_of(entry), "c": samples_of(entry)}
    folder = write_run(tmp_path / "run", data, detectors={"a": 1.0}, entries={"a/b": entry, "c": entry})
    page = Page(report(folder))
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    text = (tmp_path / "run" / "report" / "index.html").read_text(encoding="utf-8")
    referred = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert referred <= set(identifiers)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert max(np.diff(levels)) == 1  # no level is skipped
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")


def test_names_cannot_break_the_page(tmp_path: Path, samples: pd.DataFrame) -> None:
    name = "<script>alert(1)</script> $x_1$ & \"q\" 'a' _"
    samples = samples.assign(source=samples["source"] + "<b>&$", image_path='"><img src=x>' + samples["image_path"])
    folder = write_run(tmp_path / "run", {name: samples}, detectors={name: 1.0, "_b": 1.0}, entries={name: None})
    path = report(folder)
    page = Page(path)
    kinds = [script.get("type", "") for script in page.all("script")]
    assert sorted(set(kinds)) == ["", "application/json", "module"]
    assert kinds.count("") == kinds.count("module") == 1  # the charts' library, and what makes the page move
    assert page.all("b")
    assert all("out<b>" not in attributes for _, attributes in page.elements)
    assert name in page.text
    assert any(name in label for label in labels_of(page))
    assert not page.all("img")
    assert not page.all("image")
    assert next(item["aria-label"] for item in page.all("span") if item.get("role") == "img").startswith(
        'missing: "><img'
    )
    for picture in (path.parent / "pictures").iterdir():
        root = ET.parse(picture).getroot()
        assert name in root.attrib["aria-label"] or "out<b>&$" in root.attrib["aria-label"]


def test_images_from_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        if number == 0:
            path.write_bytes(b"no picture")
        elif number == 1:  # 16 bits, too large
            Image.fromarray(rng.integers(0, 2**16, (300, 150)).astype(np.uint16)).save(path)
        elif number != 2:  # which is gone
            Image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(path)
        rows.append({"image_path": str(path), "source": "files", "label": number % 2})
    page = Page(report(write_run(tmp_path / "run", {"d": pd.DataFrame(rows)}, detectors={"a": 1.0})))
    shown = {Path(image["alt"]).name: decoded(image["src"]) for image in thumbnails(page)}
    assert shown.keys() == {"1.png", "3.png", "4.png", "5.png"}
    assert shown["1.png"].size == (SIDE // 2, SIDE)
    assert np.array_equal(np.asarray(shown["3.png"]), np.asarray(Image.open(tmp_path / "3.png")))
    assert "2 of 6 images are missing" in page.text
    assert sum(item.get("role") == "img" for item in page.all("span")) == 2


def test_data_that_are_gone_leave_a_sentence(tmp_path: Path, samples: pd.DataFrame) -> None:
    gone = {"class_path": "CrossDataset", "init_args": {"in_distribution": "./gone", "out_of_distribution": ["mnist"]}}
    other = in_memory(tmp_path)
    data = {"gone": samples, "other": samples}
    entries = {"gone": gone, "other": other}
    page = Page(report(write_run(tmp_path / "run", data, detectors={"a": 1.0}, entries=entries)))
    assert "images are missing: the data could not be read again (There is no folder gone" in page.text
    assert "images are missing: neither a file nor the data as they are now hold nowhere/" in page.text
    assert not thumbnails(page)
    assert sum(item.get("role") == "img" for item in page.all("span")) == 2 * 16


def test_an_older_folder_without_a_record(tmp_path: Path, samples: pd.DataFrame) -> None:
    page = Page(report(write_run(tmp_path / "run", {"d": samples}), tmp_path / "elsewhere" / "page"))
    assert "no run.json" in page.text
    assert "the run did not keep how its data were made" in page.text
    assert (tmp_path / "elsewhere" / "page" / "index.html").is_file()
    assert not (tmp_path / "run" / "report").exists()


@pytest.mark.parametrize("failed", [("poor one",), tuple(DETECTORS)])
def test_failed_jobs_are_in_the_table(tmp_path: Path, samples: pd.DataFrame, failed: tuple[str, ...]) -> None:
    folder = write_run(tmp_path / "run", {"d": samples}, entries={"d": None}, failed=failed)
    page = Page(report(folder))
    assert page.text.count("failed: RuntimeError: <out of memory>") == len(failed)
    assert f"{len(failed)} of 3 jobs failed" in page.text
    assert ("every job failed" in page.text) == (len(failed) == 3)
    assert sum(label.startswith("Score histograms") for label in labels_of(page)) == 3 - len(failed)
    assert sum("data-value" not in cell and not cell for cell in page.all("td")) == 4 * len(failed)


def test_many_sets_are_shown_together(tmp_path: Path, samples: pd.DataFrame) -> None:
    many = samples.assign(source=[f"class {number % 15}" for number in range(len(samples))])
    page = Page(report(write_run(tmp_path / "run", {"d": many})))
    assert sum(label.startswith("ROC curves, All 15 outside sets") for label in labels_of(page)) == 1
    assert len(page.all("details")) == 1 + 3
    several = samples.assign(source=[f"class {number % 8}" for number in range(len(samples))])
    page = Page(report(write_run(tmp_path / "several", {"d": several}, detectors={"a": 1.0})))
    closed = [details for details in page.all("details") if "open" not in details]
    assert len(closed) == 8  # each set waits below all of them together


def test_one_class_alone_has_no_roc_curve(tmp_path: Path, samples: pd.DataFrame) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    row = {"detector": "a", "data": "d", "seed": 0}
    inside = samples[samples["label"] == 0].assign(score=np.arange(30.0))
    Results(folder).add({**row, "AUROC": np.nan, "FPR95": np.nan}, inside.assign(**row))
    page = Page(report(folder))
    assert "All test images are inside" in page.text
    assert page.text.count("not defined") == 2
    assert [label.partition(" ")[0] for label in labels_of(page)] == ["Score"]


def test_infinite_and_constant_scores(tmp_path: Path, samples: pd.DataFrame) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    results = Results(folder)
    values = np.linspace(-1, 1, len(samples))
    values[-3:] = np.inf
    for detector, score in (("infinite", values), ("constant", np.ones(len(samples)))):
        results.add(*job({"detector": detector, "data": "d", "seed": 0}, samples.assign(score=score)))
    page = Page(report(folder))
    assert "infinite 1.000; constant 0.500." in labels_of(page)[0]
    assert len(labels_of(page)) == 2 + 2 + 2


def test_the_roc_curve_of_several_seeds_has_their_mean_area() -> None:
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], 40)
    frames = [
        pd.DataFrame({"detector": "a", "seed": seed, "label": label, "score": rng.normal(size=80) + label})
        for seed in range(3)
    ]
    areas = [roc_auc_score(label, frame["score"]) for frame in frames]
    svg = roc_chart(pd.concat(frames), "x", ["a"], {}).svg
    assert f"AUROC: a {np.mean(areas):.3f} ± {np.std(areas, ddof=1):.3f}." in svg
    # The curve as drawn, in its own coordinates: the diagonal gives the axes' ends.
    paths = [
        np.array(re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", path), dtype=float)
        for path in re.findall(r' d="([^"]+)"', svg)
    ]
    curve = max(paths, key=len)
    (left, bottom), (right, top) = next(path for path in paths if len(path) == 2 and (path[0] != path[1]).all())
    false, true = (curve[:, 0] - left) / (right - left), (curve[:, 1] - bottom) / (top - bottom)
    assert trapezoid(true, false) == pytest.approx(np.mean(areas), abs=0.005)


def test_names_that_begin_alike_are_told_apart_in_charts() -> None:
    """All had one name in the legends, and in the chart of speed one colour and one shape."""
    names = ["A detector with a long name that is trained for " + end for end in ("twenty epochs", "thirty epochs")]
    summary = pd.DataFrame({"detector": names, "AUROC": [0.9, 0.8], "fit_duration": [0.21, 0.24]})
    chart = speed_chart(summary, "fit_duration", "seconds of fitting", names)
    assert chart is not None
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", chart.svg)
    assert "0.2" in texts
    assert "200m" not in texts
    legend = [text for text in texts if text.endswith("ty epochs")]
    assert [text.split()[-2] for text in legend] == ["twenty", "thirty"]
    assert {len(text.removeprefix("0.2")) for text in legend} <= set(range(44))
    assert len(set(chart.spec["layer"][0]["encoding"]["color"]["scale"]["domain"])) == 2

    sets = ["shapes corrupted by noise, strong", "shapes corrupted by noise, weak"]
    rows = {"source": ["good"] * 4 + sets * 2, "label": [0] * 4 + [1] * 4, "score": np.arange(8.0)}
    frame = pd.DataFrame(rows)
    svg = histogram_chart(frame, f"{names[0]}: all", source_colours(frame)).svg
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert {text.split()[-1] for text in texts if text.startswith("…")} == {"strong", "weak"}
    title = {"A detector with a long name that is trained", "for twenty epochs: all"}
    assert title <= {*re.findall(r">([^<>]+)</t", svg)}


def test_a_set_that_is_called_as_the_inside_is_drawn_beside_it() -> None:
    rows = {"source": ["good"] * 4 + ["in-distribution"] * 4, "label": [0] * 4 + [1] * 4, "score": np.arange(8.0)}
    frame = pd.DataFrame(rows)
    colours = source_colours(frame)
    assert list(colours) == ["in-distribution", "in-distribution (set)"]
    assert shown_names(frame, colours).tolist() == ["in-distribution"] * 4 + ["in-distribution (set)"] * 4


def broken(folder: Path, **changes: object) -> None:
    """Break a table: ``results=None`` removes it, a function changes it."""
    for name, change in changes.items():
        path = folder / f"{name}.csv"
        if change is None:
            path.unlink()
        elif isinstance(change, str):
            path.write_text(change, encoding="utf-8")
        else:
            change(pd.read_csv(path)).to_csv(path, index=False)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"results": None}, "There is no results.csv in"),
        ({"scores": None}, "There is no scores.csv in"),
        ({"results": ""}, "is no table that can be read"),
        ({"results": lambda frame: frame.drop(columns="AUROC")}, "results.csv lacks the columns AUROC."),
        ({"results": lambda frame: frame[:0]}, "results.csv has no rows: no job has finished."),
        ({"results": lambda frame: frame.assign(AUROC="high")}, "the column AUROC has to hold numbers"),
        ({"scores": lambda frame: frame.drop(columns=["label", "source"])}, "lacks the columns source, label."),
        (
            {"scores": lambda frame: frame.assign(score=[np.nan, *frame["score"][1:]])},
            "the first of good one on d.",
        ),
        ({"scores": lambda frame: frame.assign(label=2)}, "a label has to be 0 (in-distribution) or 1"),
        ({"scores": lambda frame: frame[frame["detector"] != "poor one"]}, "has no scores of poor one on d, seed 0."),
    ],
)
def test_a_broken_folder_is_one_message(
    changes: dict, message: str, tmp_path: Path, samples: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", {"d": samples})
    broken(folder, **changes)
    with pytest.raises(SystemExit) as exit_info:
        main(["report", str(folder)])
    assert exit_info.value.code == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (folder / "report").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [("{", "is no JSON file"), ("[]", "lacks command, date"), ('{"command": "test"}', "lacks date")],
)
def test_a_broken_record_is_one_message(tmp_path: Path, samples: pd.DataFrame, record: str, message: str) -> None:
    folder = write_run(tmp_path / "run", {"d": samples})
    (folder / "run.json").write_text(record, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        report(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone is no folder. Give the one that `flowood benchmark`"):
        report(tmp_path / "gone")


def test_the_command_says_where_the_page_is(
    tmp_path: Path, samples: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", {"d": samples}, detectors={"a": 1.0})
    stale = folder / "report" / "pictures" / "data-9-old.svg"
    stale.parent.mkdir(parents=True)
    stale.touch()
    main(["report", str(folder)])
    assert f"Page: {folder / 'report' / 'index.html'}\n" in capsys.readouterr().out
    assert not stale.exists()
    main(["report", str(folder), "--output", str(tmp_path / "page")])
    assert (tmp_path / "page" / "index.html").read_bytes() == (folder / "report" / "index.html").read_bytes()
