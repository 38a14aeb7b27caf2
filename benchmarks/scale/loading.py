# SPDX-License-Identifier: Apache-2.0
"""Whether photographs are read as fast as the backbone takes them."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_flowood import EmbeddingFlow, OneClass
from anomalib_flowood.data.decoding import read_image
from benchmarks.fits import quiet, quiet_engine
from benchmarks.memory import write_photographs
from benchmarks.tables import markdown

BAR = 0.9
"""The least share of the backbone's images a second."""
WORKERS = (0, 1, 2)
SIZE = (1224, 1632)
"""Height and width of the photographs: 2 megapixels."""
_DIFFERENT = 32
"""Photographs that differ; the others are links to them, which cost as much to read."""
_BATCH = 32
"""Images in a batch, of a fit and of the backbone alone."""


def write(folder: Path, images: int) -> None:
    """Write photographs, all of them normal."""
    write_photographs(folder, min(images, _DIFFERENT), SIZE)
    written = sorted(folder.iterdir())
    for number in range(len(written), images):
        (folder / f"{number:04d}.jpg").hardlink_to(written[number % len(written)])


class Stopwatch(Callback):
    """Takes the time of an extraction, from its first batch, which has been read by then, to its last."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def on_extract(self, what: str, number: int, total: int) -> None:
        """Called before every batch is given to the backbone."""
        del total, number
        if what == "training":
            self.wall.append(time.perf_counter())
            self.processor.append(_processor_seconds())


def _processor_seconds() -> float:
    """Of this process, all its threads; that of workers is counted when they have ended."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _alone(detector: EmbeddingFlow, images: int) -> dict[str, Any]:
    """Extract features of images that are in memory, resized."""
    batch = torch.rand(_BATCH, 3, *detector.model.embedding.image_size)
    batches = max(1, images // _BATCH)
    with torch.no_grad():
        detector.eval().extract(batch)
        start, used = time.perf_counter(), _processor_seconds()
        for _ in range(batches):
            detector.extract(batch)
    return {
        "images_per_second": batches * _BATCH / (time.perf_counter() - start),
        "milliseconds": 1000 * (_processor_seconds() - used) / (batches * _BATCH),
    }


def _loaded(detector: EmbeddingFlow, folder: Path, workers: int) -> dict[str, Any]:
    """Fit to photographs; what the extraction of their features took."""
    data = OneClass(folder.parent, folder.name, num_workers=workers, train_batch_size=_BATCH)
    watch = Stopwatch()
    with TemporaryDirectory() as output, quiet():
        quiet_engine(output, [watch]).fit(detector, datamodule=data)
    images = _BATCH * (len(watch.wall) - 1)  # the last batch may be smaller, and is not waited for
    return {
        "images_per_second": images / (watch.wall[-1] - watch.wall[0]),
        "milliseconds": 1000 * (watch.processor[-1] - watch.processor[0]) / images if workers == 0 else float("nan"),
    }


def measure(folder: Path, rounds: int) -> pd.DataFrame:
    """Alternate between the backbone alone and fits with more and more workers.

    Args:
        folder: Of photographs, all of them normal.
        rounds: How often.

    Returns:
        ``round``, ``workers`` (-1 for the backbone alone), ``images_per_second`` and the ``milliseconds`` of all
        processors together for an image, which are not known of workers.
    """
    rows = []
    images = len(list(folder.iterdir()))
    for number in range(rounds):
        rows.append({"round": number, "workers": -1, **_alone(EmbeddingFlow(), images)})
        rows += [
            {"round": number, "workers": workers, **_loaded(EmbeddingFlow(), folder, workers)} for workers in WORKERS
        ]
    return pd.DataFrame(rows)


def stages(folder: Path) -> dict[str, float]:
    """What the steps of reading take of one processor, each with all before it; milliseconds per image."""
    data = OneClass(folder.parent, folder.name)
    data.prepare_data()
    data.setup()
    images: Any = data.train_data
    size = EmbeddingFlow().model.embedding.image_size
    images.augmentations = Resize(size, antialias=True)
    steps: dict[str, Callable[[int], object]] = {
        "decoded by Pillow": lambda place: _decoded(images.samples.image_path[place]),
        "the same, leaving details out (`draft`)": lambda place: _decoded(images.samples.image_path[place], size),
        "read": lambda place: read_image(images.samples.image_path[place]),
        "read, as floats, resized": lambda place: images[place],
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for step, run in steps.items():
        run(0)
        taken = []
        for place in range(_DIFFERENT):
            used = _processor_seconds()
            run(place)
            taken.append(_processor_seconds() - used)
        found[step] = 1000 * statistics.median(taken)
    torch.set_num_threads(threads)
    return found


def _decoded(path: str, size: tuple[int, int] | None = None) -> None:
    with Image.open(path) as image:
        if size is not None:
            image.draft("RGB", size)
        image.load()


def table(rows: pd.DataFrame, spent_on: dict[str, float], said: str) -> str:
    """What was measured, in Markdown: medians over rounds, of ratios, too.

    Args:
        rows: As :func:`measure` returns them.
        spent_on: As :func:`stages` returns it.
        said: The command and the machine.
    """
    speeds = rows.pivot_table(index="round", columns="workers", values="images_per_second")
    spent = rows.groupby("workers")["milliseconds"].median()
    head = ["workers", "images/s", "of the backbone's", f"≥ {BAR}", "processor time, ms per image"]
    lines = [["backbone alone", f"{speeds[-1].median():.1f}", "1", "", f"{spent[-1]:.1f}"]]
    for workers in WORKERS:
        ratio = float((speeds[workers] / speeds[-1]).median())
        held = "held" if ratio >= BAR else "**not held**"
        of_all = f"{spent[workers]:.1f}" if spent[workers] == spent[workers] else "–"
        lines.append([str(workers), f"{speeds[workers].median():.1f}", f"{ratio:.2f}", held, of_all])
    steps = markdown(["a photograph", "processor time, ms"], [[step, f"{ms:.1f}"] for step, ms in spent_on.items()])
    return f"{said}\n\n{markdown(head, lines)}\n\n{steps}\n"
