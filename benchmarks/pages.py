# SPDX-License-Identifier: Apache-2.0
"""Draw photographs of parts, train on them, and photograph the pages: the pictures of pages in docs/.

    python -m benchmarks.pages docs/pages

takes about two minutes on two cores, Chromium with its driver, and pdftoppm for what is printed. The parts are drawn,
so that nobody's photographs are in the documentation: washers of brushed metal, some of them scratched, stained or
chipped, with masks.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from anomalib_flowood.cli import main as flowood

SIDE = 256
COUNTS = {"train/good": 120, "test/good": 40, "test/scratch": 16, "test/stain": 16, "test/chip": 16}
_QUALITY = 62


def draw_part(kind: str, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw a washer and the mask of what is wrong with it."""
    light = rng.normal(150, 8)
    brushed = rng.normal(light, 26, (SIDE, 1)) + rng.normal(0, 9, (SIDE, SIDE))
    metal = Image.fromarray(brushed.clip(0, 255).astype(np.uint8)).rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
    metal = metal.filter(ImageFilter.GaussianBlur(0.8))
    middle = SIDE / 2 + rng.uniform(-4, 4, 2)
    ring = Image.new("L", (SIDE, SIDE), 0)
    pen = ImageDraw.Draw(ring)
    for radius, shade in ((0.40 * SIDE, 255), (0.16 * SIDE, 0)):
        pen.ellipse([*(middle - radius), *(middle + radius)], fill=shade)
    mask = Image.new("L", (SIDE, SIDE), 0)
    where = ImageDraw.Draw(mask)
    turn, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.22, 0.32) * SIDE
    spot = middle + far * np.array([np.cos(turn), np.sin(turn)])
    if kind == "scratch":
        along = rng.uniform(0, np.pi)
        reach = rng.uniform(14, 30) * np.array([np.cos(along), np.sin(along)])
        where.line([*(spot - reach), *(spot + rng.uniform(-5, 5, 2)), *(spot + reach)], fill=255, width=3)
    elif kind == "stain":
        for _ in range(5):
            size, shift = rng.uniform(4, 10), rng.uniform(-8, 8, 2)
            where.ellipse([*(spot + shift - size), *(spot + shift + size)], fill=255)
    elif kind == "chip":
        edge = middle + 0.40 * SIDE * np.array([np.cos(turn), np.sin(turn)])
        size = rng.uniform(9, 16)
        where.ellipse([*(edge - size), *(edge + size)], fill=255)
    shade = {"scratch": 225, "stain": 95, "chip": 40}.get(kind, 0)
    strength = 0.55 if kind == "stain" else 0.9
    soft = mask.filter(ImageFilter.GaussianBlur(1)).point(lambda value: int(value * strength))
    part = Image.composite(metal, Image.new("L", metal.size, 40), ring.filter(ImageFilter.GaussianBlur(1)))
    part = Image.composite(Image.new("L", metal.size, shade), part, soft)
    return part.convert("RGB"), mask


def draw_parts(folder: Path, seed: int = 0) -> None:
    """Write a folder as MVTec AD's are."""
    rng = np.random.default_rng(seed)
    for place, count in COUNTS.items():
        kind = Path(place).name
        (folder / place).mkdir(parents=True)
        if kind != "good":
            (folder / "ground_truth" / kind).mkdir(parents=True)
        for number in range(count):
            part, mask = draw_part(kind, rng)
            part.save(folder / place / f"{number:03d}.png")
            if kind != "good":
                mask.save(folder / "ground_truth" / kind / f"{number:03d}_mask.png")


class Camera:
    """Chromium without a window, which photographs pages."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in ("headless", "disable-gpu", "hide-scrollbars", f"user-data-dir={profile}"):
            options.add_argument(f"--{argument}")
        if os.geteuid() == 0:  # Chromium's sandbox does not work for root
            options.add_argument("--no-sandbox")
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))

    def take(
        self,
        page: str,
        picture: Path,
        width: int,
        scheme: str,
        top: str,
        height: int,
        act: Callable[[Any], None] | None,
    ) -> None:
        """Photograph what begins with an element.

        Args:
            page: The page's address.
            picture: The file to write.
            width: Of the window.
            scheme: ``light`` or ``dark``.
            top: CSS selector of the element at the top.
            height: Of the picture.
            act: What is done before, with the driver.
        """
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(page)
        self.driver.execute_script("document.querySelector(arguments[0]).scrollIntoView()", top)
        if act is not None:
            act(self.driver)
        time.sleep(2)  # for charts
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
        image.save(picture, quality=_QUALITY, method=6)

    def print(self, page: str, picture: Path, sheets: int) -> None:
        """Print a page on A4 without backgrounds, as Chromium does by default; the first sheets, side by side."""
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        self.driver.get(page)
        time.sleep(2)
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": False}
        printed = base64.b64decode(self.driver.execute_cdp_cmd("Page.printToPDF", paper)["data"])
        command = ["pdftoppm", "-png", "-r", "75", "-l", str(sheets), "-", "sheet"]
        subprocess.run(command, input=printed, check=True)  # noqa: S603
        pages = [Image.open(path).convert("RGB") for path in sorted(Path().glob("sheet-*.png"))]
        width, height = pages[0].size
        together = Image.new("RGB", (len(pages) * (width + 8) - 8, height), (150, 150, 150))
        for place, sheet in enumerate(pages):
            together.paste(sheet, (place * (width + 8), 0))
        together.save(picture, quality=_QUALITY, method=6)


@contextmanager
def served(checkpoint: Path) -> Iterator[str]:
    """Let ``flowood serve`` serve a checkpoint, and return its page's address."""
    command = [sys.executable, "-m", "anomalib_flowood", "serve", str(checkpoint), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdout is not None
            yield next(line for line in process.stdout if "http://" in line).split(" on ")[1].split(". ")[0]
        finally:
            process.terminate()


def _open_first(driver: Any) -> None:
    """Open the first image of a defect."""
    driver.execute_script("document.querySelectorAll('.gallery .strip')[2].querySelector('.open').click()")


def _drop_images(driver: Any) -> None:
    """Have some images scored."""
    places = ["good/000", "scratch/001", "stain/002", "chip/003", "good/004", "chip/005"]
    files = [str(Path("parts", "test", f"{place}.png").resolve()) for place in places]
    driver.find_element("id", "files").send_keys("\n".join(files))
    summary = driver.find_element("id", "summary")
    WebDriverWait(driver, 60).until(lambda _: "normal" in summary.text and "to go" not in summary.text)


SHOTS: tuple[tuple[str, str, int, str, str, int, Callable[[Any], None] | None], ...] = (
    ("report", "report_light", 1280, "light", "body", 1500, None),
    ("report", "report_images", 1280, "dark", ".gallery", 1000, None),
    ("report", "report_phone", 390, "dark", "section", 1400, None),
    ("report", "report_opened", 1280, "light", ".gallery", 800, _open_first),
    ("maps", "explain_maps", 1280, "light", ".case", 1050, None),
    ("embeddings", "explain_embeddings", 390, "dark", ".case", 1400, None),
    ("serve", "serve_light", 1280, "light", "body", 900, _drop_images),
    ("serve", "serve_phone", 390, "dark", "body", 1400, _drop_images),
)
"""Page, picture, width, colours, what is at the top, height, and what is done before."""


def main() -> None:
    """Draw, train, photograph."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("into", type=Path, help="folder of the pictures")
    into = parser.parse_args().into.resolve()
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        draw_parts(Path("parts"))
        pages, checkpoints = {}, {}
        for name, detector in (("maps", "FeatureMapFlow"), ("embeddings", "EmbeddingFlow")):
            flowood(["train", "--data", "parts", "--model", detector, "--seed_everything", "0"])
            (checkpoints[name],) = Path("results").glob(f"{detector}/**/model.ckpt")
            flowood(["explain", "--data", "parts", "--ckpt_path", str(checkpoints[name]), "--output", name])
            pages[name] = Path(name, "index.html").resolve().as_uri()
        run = next(Path("results/FeatureMapFlow").rglob("results.csv")).parent
        flowood(["report", str(run), "--output", "report"])
        pages["report"] = Path("report/index.html").resolve().as_uri()
        camera = Camera(Path(work) / "profile")
        try:
            with served(checkpoints["maps"]) as pages["serve"]:
                for page, name, *how in SHOTS:
                    camera.take(pages[page], into / f"{name}.webp", *how)
                    print(into / f"{name}.webp")
            camera.print(pages["report"], into / "report_printed.webp", sheets=3)
            print(into / "report_printed.webp")
        finally:
            camera.driver.quit()


if __name__ == "__main__":
    main()
