# SPDX-License-Identifier: Apache-2.0
import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from model_helpers import idx_folder

from anomalib_flowood.benchmark import Results, build
from anomalib_flowood.data import CrossDataset
from anomalib_flowood.metrics import DETECTION_METRICS, per_set
from anomalib_flowood.report.page import write_report
from anomalib_flowood.report.run import write_record

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="needs chromium and chromedriver; on Debian, as root: apt-get install chromium chromium-driver",
)

needs_pdftotext = pytest.mark.skipif(
    not shutil.which("pdftotext"), reason="needs pdftotext; on Debian, as root: apt-get install poppler-utils"
)

DETECTORS = {"good one": 3.0, "poor one": 0.5, "in between": 1.5}
"""Detectors by name, with how far they part inside from outside."""


def in_memory(root: Path, outside: int = 2) -> dict:
    """Configuration of a data module whose images are in idx files."""
    folders = [root / name for name in ("ramps", *(f"squares{number}" for number in range(outside)))]
    for number, folder in enumerate(folders):
        if not folder.exists():
            idx_folder(folder, "square" if number else "plain", test=12, seed=number)
    inside, *others = map(str, folders)
    return {"class_path": "CrossDataset", "init_args": {"in_distribution": inside, "out_of_distribution": others}}


def samples_of(entry: dict) -> pd.DataFrame:
    """The test images of a CrossDataset: image_path, source, label."""
    datamodule = CrossDataset(**entry["init_args"])
    datamodule.setup("test")
    samples = datamodule.test_data.samples
    return samples[["image_path", "source"]].assign(label=samples["label_index"])


def report(folder: Path, output: Path | None = None) -> Path:
    """The page of a run, as ``flowood report`` writes it."""
    return write_report(folder, partial(build, "data"), output)


def write_run(
    folder: Path,
    data: dict[str, pd.DataFrame],
    *,
    detectors: dict[str, float] = DETECTORS,
    seeds: tuple[int, ...] = (0,),
    entries: dict | None = None,
    failed: tuple[str, ...] = (),
) -> Path:
    """A run's folder, written by what a benchmark writes it with, around scores that are drawn at random."""
    folder.mkdir(parents=True)
    if entries is not None:
        models = {name: {"class_path": "PixelFlow", "init_args": {"channels": 1}} for name in detectors}
        write_record(folder, "benchmark", detectors=models, data=entries, settings={"seeds": list(seeds)})
    results = Results(folder)
    rng = np.random.default_rng(0)
    for seed in seeds:
        for detector, distance in detectors.items():
            for name, samples in data.items():
                row = {"detector": detector, "data": name, "seed": seed}
                if detector in failed:
                    results.add({**row, "error": "RuntimeError: <out of memory>"}, pd.DataFrame())
                    continue
                values = rng.normal(size=len(samples)) + distance * samples["label"].to_numpy()
                results.add(*job(row, samples.assign(score=values)))
    return folder


def job(row: dict, scores: pd.DataFrame) -> tuple[dict, pd.DataFrame]:
    """What a job hands over."""
    score, label = torch.tensor(scores["score"].to_numpy()), torch.tensor(scores["label"].to_numpy())
    metrics = {name: metric(score, label) for name, metric in DETECTION_METRICS.items()}
    for name, metric in DETECTION_METRICS.items():
        sets = per_set(metric, score, label, scores["source"].tolist())
        metrics |= {f"{name}/{key}": value for key, value in sets.items()}
    times = {"fit_duration": 10.0 + len(row["detector"]), "images_per_s": 1234.5}
    return {**row, **metrics, **times}, scores.assign(**row)


def headings_at_the_foot(browser, page: str, heights: Iterable[float]) -> list[str]:
    """Headings of a page that stand last on a sheet, what they head on the next one; on paper of several heights."""
    show(browser, page)
    texts = "return [...document.querySelectorAll('h1, h2, h3, h4, h5, summary')].map((one) => one.textContent)"
    headings = {" ".join(text.split()).casefold() for text in browser.execute_script(texts)}
    found = []
    for height in heights:
        printed = browser.execute_cdp_cmd("Page.printToPDF", {"paperHeight": height})
        done = subprocess.run(
            ["pdftotext", "-layout", "-", "-"], input=base64.b64decode(printed["data"]), capture_output=True, check=True
        )
        for sheet in done.stdout.decode().split("\f"):
            last = next((line.strip("▾ ") for line in reversed(sheet.splitlines()) if line.strip()), "")
            if last and all(part.strip().casefold() in headings for part in re.split(r" {3,}", last)):
                found.append(f"{height} inches: {last}")
    return found


class Page(HTMLParser):
    """A page's elements as ``(tag, attributes)``, its text, its data, and whether every element is closed."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self.open, self.data = "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        _, attributes = self.elements[-1] if self.elements else ("", {})
        if attributes.get("type") == "application/json" and self.open[-1] == "script":
            self.data.append(json.loads(text))
        elif not self.open or self.open[-1] not in {"script", "style"}:
            self.text += text

    def charts(self) -> list[dict]:
        """The specifications of the charts."""
        return [data for data in self.data if "layer" in data]

    def tables(self) -> list[dict]:
        """The test images of each data set."""
        return [data for data in self.data if "detectors" in data]

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def show(browser, address: str, width: int = 1280, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)
