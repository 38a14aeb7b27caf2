# SPDX-License-Identifier: Apache-2.0
"""Anomaly maps: which are kept, how they are written, and what a page shows of them."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from report_helpers import Page, job, report
from test_decisions import images

from anomalib_flowood.benchmark import Results
from anomalib_flowood.report import gallery
from anomalib_flowood.report.maps import Kept, MapKeeper, map_uri, outline, read_maps, shown_images


def scored() -> pd.DataFrame:
    samples = images()
    return samples.assign(score=np.arange(len(samples), dtype=float))


def test_the_worst_and_typical_images_of_each_set():
    chosen = shown_images(scored())
    scores = {title: rows["score"].tolist() for title, rows in chosen.items()}
    assert scores == {
        "The most anomalous inside": [39, 38, 37, 36, 35],
        "Typical inside": [20, 19, 18],
        "The least anomalous outside: hole": [40, 41, 42, 43, 44],
        "Typical outside: hole": [46, 47, 48],
        "The least anomalous outside: scratch": [55, 56, 57, 58, 59],
        "Typical outside: scratch": [66, 67, 68],
    }
    assert list(shown_images(scored().query("label == 0"))) == ["The most anomalous inside", "Typical inside"]
    few = shown_images(scored().query("source != 'scratch'").iloc[-3:])
    assert {title: len(rows) for title, rows in few.items()} == {"The least anomalous outside": 3}
    many = scored().assign(source=[f"kind {number}" for number in range(80)])
    assert list(shown_images(many))[2:] == ["The least anomalous outside", "Typical outside"]


def test_maps_are_kept_small_and_written_whole(tmp_path: Path):
    keeper = MapKeeper()
    maps = torch.rand(3, 1, 128, 256, generator=torch.Generator().manual_seed(0))
    maps[2, 0, 0, 0] = torch.inf
    masks = torch.zeros(3, 128, 256)
    masks[1, 32:64, 64:128] = 1
    keeper.add(["a.png", "b.png", ""], maps, masks)
    keeper.add(["c.png"], None, None)
    kept = keeper.of(["b.png", "a.png", "c.png", ""])
    assert list(kept) == ["b.png", "a.png"]
    assert kept["a.png"][0].shape == (32, 64)
    assert kept["a.png"][1] is None  # nothing is anomalous
    assert kept["b.png"][1].shape == (64, 128)
    assert kept["b.png"][0] == pytest.approx(maps[1, 0].reshape(32, 4, 64, 4).mean((1, 3)).numpy(), abs=1e-3)

    row = {"detector": "d", "data": "=x", "seed": 3}
    Results(tmp_path).add(*job(row, scored().assign(source="s")), kept)
    (read,) = read_maps(tmp_path).items()
    assert read[0] == ("d", "=x", "3")
    assert read[1].maps["b.png"] == pytest.approx(kept["b.png"][0])
    assert list(read[1].masks) == ["b.png"]

    (path,) = (tmp_path / "maps").glob("*.npz")
    whole = path.read_bytes()
    for broken in (b"broken", b"", whole[:200], whole[:300] + bytes(len(whole) - 600) + whole[-300:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="holds no anomaly maps of a test"):
            read_maps(tmp_path)


def test_maps_are_clear_where_they_are_low():
    uri = map_uri(np.array([[0.0, 1.0], [5.0, np.nan]]), (0.0, 2.0))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))).convert("RGBA"))
    assert pixels[0, 0, 3] == 0
    assert 0 < pixels[0, 1, 3] < pixels[1, 0, 3]
    assert pixels[1, 0].tolist() == pixels[1, 1].tolist()  # what is not known is not taken for normal


def test_the_outline_goes_round_the_mask():
    mask = np.zeros((64, 128), np.uint8)
    mask[16:32, 64:96] = 255
    path = outline(mask, (256, 128))
    points = np.array(re.findall(r"([\d.]+) ([\d.]+)", path), dtype=float)
    assert points.min(0) == pytest.approx([128, 32], abs=2)
    assert points.max(0) == pytest.approx([192, 64], abs=2)
    assert path.count("M") == 1
    mask[50:60, :10] = 255  # at the border
    assert outline(mask, (256, 128)).count("Z") == 2


def test_the_page_lays_maps_and_outlines_over_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scores = scored()
    rng = np.random.default_rng(0)
    maps = {}
    for place, path in enumerate(scores["image_path"]):
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)).save(file)
        mask = np.zeros((40, 60), np.uint8)
        mask[10:20, 10:20] = 255
        maps[str(file)] = Kept(rng.random((20, 30)).astype(np.float16), mask if scores["label"][place] else None)
    scores["image_path"] = [str(tmp_path / path) for path in scores["image_path"]]
    folder = tmp_path / "run"
    folder.mkdir()
    results = Results(folder)
    for detector in ("with maps", "without"):
        row = {"detector": detector, "data": "parts", "seed": 0}
        results.add(*job(row, scores), maps if detector == "with maps" else {})
    page = Page(report(folder))
    tiles = [image for image in page.all("image") if image.get("class") == "map"]
    assert len(tiles) == 3 * 8  # one detector, three sets
    assert {(tile["width"], tile["height"]) for tile in tiles} == {("60", "40")}
    outlines = [path for path in page.all("path") if path.get("class") == "truth"]
    assert len(outlines) == 2 * 8  # of the outside sets
    assert {box["class"] for box in page.all("input")} == {"layer-maps", "layer-truth"}
    stored = [image for image in page.all("image") if "id" in image]
    assert len(stored) == 80  # all of them, once, though two detectors show some
    (table,) = page.tables()
    assert len(table["lists"][0]["pictures"]) == 80

    monkeypatch.setattr(gallery, "_ALL", 79)
    page = Page(report(folder))
    assert len([image for image in page.all("image") if "id" in image]) == 24  # of many, those in a row alone
    (table,) = page.tables()
    assert len(table["lists"][0]["pictures"]) == 24
