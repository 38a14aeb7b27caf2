# SPDX-License-Identifier: Apache-2.0
"""What a fit takes of memory and time as the number of images grows; each fit in a process of its own.

python -m benchmarks.scale.memory KIND DETECTOR IMAGES FOLDER    prints what one fit took
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anomalib_flowood import EmbeddingFlow, OneClass, models
from anomalib_flowood.look import GREY, PALETTE
from benchmarks.peak import Peak, anonymous

EMBEDDINGS, FILES = "embeddings", "files"
DIMS = 1280
SIDE = 64
"""Height and width of the images on the disk."""
BACKBONE = "test_efficientnet"
"""timm's network for tests, with random weights: what is measured is all but the backbone."""
FITS = ((EMBEDDINGS, "EmbeddingFlow"), (FILES, "EmbeddingFlow"), (FILES, "FeatureMapFlow"))
CACHE_GIB = EmbeddingFlow.cache_gib
BAR_GIB = CACHE_GIB + 1
_KINDS = 20
_SPARE = 0.01
"""Share of the images on the disk that is left for a test."""


class Row(NamedTuple):
    """What one fit took: ``gib`` above the process at rest, of memory that is mapped to no file."""

    kind: str
    detector: str
    images: int
    seconds: float
    gib: float


class Numbers(Dataset):
    """Stands for images by their numbers, a batch at a time."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> ImageBatch:
        numbers = torch.as_tensor(indices, dtype=torch.float32) + self.first
        label = torch.zeros(len(numbers), dtype=torch.bool)
        return ImageBatch(image=numbers[:, None, None, None].expand(-1, 3, 1, 1), gt_label=label)


class GivenEmbeddings(EmbeddingFlow):
    """EmbeddingFlow whose backbone gives synthetic embeddings: kinds of normal images, with a decaying spectrum."""

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(int(images[0, 0, 0, 0]))
        centres = torch.randn(_KINDS, DIMS, generator=torch.Generator().manual_seed(1))
        kinds = torch.randint(_KINDS, (len(images),), generator=generator)
        noise = torch.randn(len(images), DIMS, generator=generator)
        return (1 + 0.3 * centres[kinds] + noise * torch.arange(1, DIMS + 1) ** -0.5,)


def write_images(folder: Path, count: int) -> None:
    """Write small JPEG files, so many and some to spare, all of them normal: shades of several slopes with noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shades = np.linspace(0, 1, SIDE)
    written = math.ceil(count / (1 - _SPARE)) + 1
    for number in track(range(written), f"Writing {written:,} images"):
        slopes = rng.uniform(30, 90, (2, 1, 1, 3))
        image = 60 + slopes[0] * shades[:, None, None] + slopes[1] * shades[None, :, None]
        image = image + rng.normal(0, 8, (SIDE, SIDE, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06}.jpg", quality=85)


def fit(kind: str, name: str, images: int, folder: Path) -> Row:
    """Fit a detector in this process."""
    data: dict[str, Any]
    if kind == EMBEDDINGS:
        held_out = max(100, images // 100)
        detector: Any = GivenEmbeddings(pre_trained=False, layers=[], pre_processor=False)
        new_loader = lambda numbers: DataLoader(numbers, 1000, collate_fn=lambda batch: batch)  # noqa: E731
        data = {
            "train_dataloaders": new_loader(Numbers(0, images)),
            "val_dataloaders": new_loader(Numbers(images, held_out)),
        }
    else:
        own = {"map_layers": (1, 2), "score_layers": (2,)} if name == "FeatureMapFlow" else {}
        detector = getattr(models, name)(backbone=BACKBONE, pre_trained=False, image_size=(SIDE, SIDE), **own)
        module = OneClass(folder, "good", train_limit=images, val_split_ratio=0.01, test_split_ratio=_SPARE)
        data = {"datamodule": module}
    with TemporaryDirectory() as output, Peak(anonymous) as peak:
        engine = Engine(
            accelerator="cpu", devices=1, default_root_dir=output, logger=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        start = time.perf_counter()
        engine.fit(detector, **data)
        seconds = time.perf_counter() - start
    if kind == FILES and (have := len(module.train_data) + len(module.val_data)) != images:
        msg = f"There are {have:,} images in {folder} besides those of a test, not {images:,}."
        raise RuntimeError(msg)
    return Row(kind, name, images, seconds, (peak.above_rest or 0) / 2**30)


def measure(counts: dict[str, Sequence[int]], fits: Iterable[tuple[str, str]], folder: Path) -> list[Row]:
    """Fit all of them, one after another; images are taken from a folder."""
    points = [(kind, name, count) for kind, name in fits for count in counts[kind]]
    rows = []
    for kind, name, count in track(points, "Fitting"):
        command = [sys.executable, "-m", "benchmarks.scale.memory", kind, name, str(count), str(folder)]
        done = subprocess.run(  # noqa: S603
            command, check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            msg = f"{name} could not be fitted to {count:,} {kind}:\n{done.stderr[-3000:]}"
            raise RuntimeError(msg)
        rows.append(Row(**json.loads(done.stdout.splitlines()[-1])))
    return rows


def _series(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    names = dict.fromkeys((row.kind, row.detector) for row in rows)
    return [
        (f"{name}, {kind}", [row for row in rows if (row.kind, row.detector) == (kind, name)]) for kind, name in names
    ]


def slope(rows: Sequence[Row]) -> float:
    """By which power of their number the seconds of the larger half of the fits grow; NaN with fewer than two."""
    upper = rows[len(rows) // 2 - (len(rows) == 2) :]
    if len(upper) < 2:
        return float("nan")
    return float(np.polyfit(np.log([row.images for row in upper]), np.log([row.seconds for row in upper]), 1)[0])


def table(rows: Sequence[Row], said: str) -> str:
    """The Markdown table, under a line that says how it was measured."""
    lines = [
        said,
        "",
        f"| fit | images | seconds | ms per image | peak above rest, GiB | ≤ {BAR_GIB:g} |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, series in _series(rows):
        for row in series:
            held = "yes" if row.gib <= BAR_GIB else "**no**"
            lines.append(
                f"| {name} | {row.images:,} | {row.seconds:.1f} | {1000 * row.seconds / row.images:.2f} "
                f"| {row.gib:.2f} | {held} |"
            )
        lines.append(f"| {name} | seconds grow by the power | {slope(series):.2f} | | | |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw time and memory over the number of images."""
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for colour, (name, series) in zip(PALETTE, _series(rows), strict=False):
        counts = [row.images for row in series]
        time_axes.loglog(
            counts, [row.seconds for row in series], "o-", color=colour, label=f"{name} ({slope(series):.2f})"
        )
        memory_axes.semilogx(counts, [row.gib for row in series], "o-", color=colour, label=name)
    time_axes.set(xlabel="images", ylabel="seconds", title="A fit (in brackets the power at its end)")
    memory_axes.axhline(BAR_GIB, color=GREY, linestyle="--", label="cache_gib + 1")
    memory_axes.set(
        xlabel="images", ylabel="GiB above rest", title="Peak memory, files not counted", ylim=(0, 1.5 * BAR_GIB)
    )
    time_axes.legend()
    memory_axes.legend(loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(json.dumps(fit(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))._asdict()))
