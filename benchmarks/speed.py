# SPDX-License-Identifier: Apache-2.0
"""What anomalib's engine and our densities cost: ratios to the bare work, measured in the same run.

    python benchmarks/speed.py [--rounds 5] [--rows engine fit maps-fit backbone infer]

- engine: images/s that `PixelFlow` (default) trains in anomalib's engine, over a bare loop on tensors in memory;
- fit: seconds of a whole `EmbeddingFlow` fit on 5,000 images, over one bare pass of its backbone over as many;
- maps-fit: the same of `FeatureMapFlow`, without a flow as it is by default, on 300 images, of which the backbone sees
  four rotations by default, and none but their own with `rotations: false`;
- backbone: seconds of the default backbone as timm has it, over those of `run_backbone`, which folds batch norms;
- infer: seconds in which the models of both score 1 and 32 images, fitted to 300, over those of their backbones.

The bare pass is the fastest that the backbone has on a CPU (`run_backbone`: few images at once, channels last, batch
norms folded into convolutions). Rounds alternate rows and sides, so that a noisy neighbour meets all; the median ratio
counts. `OMP_NUM_THREADS` sets threads.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from anomalib.engine import Engine
from rich.console import Console
from rich.table import Table

from anomalib_flowood import CrossDataset, EmbeddingFlow, FeatureMapFlow, PixelFlow
from anomalib_flowood.features import run_backbone

IMAGES = 5_000
FEW_IMAGES = 300
BATCH = 128
EPOCHS = 4
SCORED = 32
"""Images that each round scores, whatever the batch."""


class Row(NamedTuple):
    """What is measured.

    Attributes:
        part: Its name on the command line.
        name: What the table calls it.
        measure: Returns what the detector takes or does, and the bare work.
        bar: Where the ratio is to be.
        least: Whether the bar is the least ratio, as of images/s, or the most, as of seconds.
    """

    part: str
    name: str
    measure: Callable[[], tuple[float, float]]
    bar: float
    least: bool = False


def data(images: int) -> CrossDataset:
    module = CrossDataset("fashion_mnist", ["mnist"], train_limit=images, test_limit=10, train_batch_size=BATCH)
    module.prepare_data()
    module.setup()
    return module


def fit(detector: PixelFlow | EmbeddingFlow | FeatureMapFlow, module: CrossDataset) -> float:
    with TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, accelerator="cpu", devices=1, enable_model_summary=False)
        start = time.perf_counter()
        engine.fit(detector, datamodule=module)
        return time.perf_counter() - start


def bare_training(images: torch.Tensor) -> float:
    """The same steps on the same number of images, without engine, data loader, logging and validation."""
    detector = PixelFlow()
    model = detector.model
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.Adam(model.flow.parameters(), lr=detector.learning_rate, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    start = time.perf_counter()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(images)).split(BATCH):
            loss = -(model.log_prob(images[index], noisy=True) / model.dims).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.flow.parameters(), 50.0)
            optimizer.step()
            scheduler.step()
    return time.perf_counter() - start


def engine_ratio(module: CrossDataset) -> tuple[float, float]:
    """Images/s in the engine and in the bare loop."""
    resize = PixelFlow().pre_processor.transform
    images = resize(module.train_data.__getitems__(range(len(module.train_data))).image)
    in_engine = EPOCHS * len(images) / fit(PixelFlow(max_epochs=EPOCHS), module)
    return in_engine, EPOCHS * len(images) / bare_training(images)


def fit_ratio(new: Callable[[], EmbeddingFlow | FeatureMapFlow], module: CrossDataset) -> tuple[float, float]:
    """Seconds of a whole fit and of a bare backbone pass over the same images, already in memory at the right size."""
    detector = new()
    parts = [part.__getitems__(range(len(part))).image for part in (module.train_data, module.val_data)]
    batches = [detector.pre_processor.transform(batch) for batch in torch.cat(parts).split(SCORED)]
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            run_backbone(detector.model.backbone, batch)
    bare = time.perf_counter() - start
    del batches
    return fit(detector, module), bare


class Inference:
    """Scores images by a fitted model and runs its backbone over them, in turns."""

    def __init__(self, new: Callable[[], EmbeddingFlow | FeatureMapFlow], module: CrossDataset) -> None:
        self.new, self.module = new, module
        self.detector: EmbeddingFlow | FeatureMapFlow | None = None

    @torch.no_grad()
    def __call__(self, batch_size: int) -> tuple[float, float]:
        """Return seconds of both."""
        if self.detector is None:
            self.detector = self.new()
            with torch.enable_grad():
                fit(self.detector, self.module)
            self.detector.eval()
        images = self.module.train_data.__getitems__(range(SCORED)).image
        batches = self.detector.pre_processor.transform(images).split(batch_size)
        sides: list[Callable[[torch.Tensor], object]] = [
            self.detector.model,
            partial(run_backbone, self.detector.model.backbone),
        ]
        seconds = []
        for side in sides:
            side(batches[0])  # warm up
            start = time.perf_counter()
            for batch in batches:
                side(batch)
            seconds.append(time.perf_counter() - start)
        return seconds[0], seconds[1]


class Folding:
    """Runs a backbone as timm has it, a chunk at a time and channels last, too, and with its batch norms folded."""

    def __init__(self, module: CrossDataset) -> None:
        detector = FeatureMapFlow()
        images = module.train_data.__getitems__(range(SCORED)).image
        self.images = detector.pre_processor.transform(images).contiguous(memory_format=torch.channels_last)
        self.backbone = detector.model.backbone

    @torch.no_grad()
    def __call__(self, batch_size: int) -> tuple[float, float]:
        """Return seconds of both."""
        sides: list[Callable[[torch.Tensor], object]] = [self.backbone, partial(run_backbone, self.backbone)]
        seconds = []
        for side in sides:
            side(self.images[:batch_size])  # warm up
            start = time.perf_counter()
            for batch in self.images.split(batch_size):
                side(batch)
            seconds.append(time.perf_counter() - start)
        return seconds[0], seconds[1]


def rows() -> list[Row]:
    many, few = data(IMAGES), data(FEW_IMAGES)
    embed, maps = partial(EmbeddingFlow, image_size=(128, 128)), FeatureMapFlow
    found = [
        Row("engine", "PixelFlow training, images/s", partial(engine_ratio, many), 0.95, least=True),
        Row("fit", f"EmbeddingFlow fit, {IMAGES:,} images, s", partial(fit_ratio, embed, many), 1.1),
        Row("maps-fit", f"FeatureMapFlow fit, {FEW_IMAGES} images, s", partial(fit_ratio, maps, few), 1.5),
        Row("maps-fit", "the same, rotations: false, s", partial(fit_ratio, partial(maps, rotations=False), few), 1.5),
    ]
    folding = Folding(few)
    for batch_size in (1, 16):
        what = f"backbone of timm, {SCORED} images, {batch_size} at once, s"
        found.append(Row("backbone", what, partial(folding, batch_size), 1.15, least=True))
    for new, bar in ((partial(EmbeddingFlow, image_size=(224, 224)), 1.05), (maps, 1.15)):
        infer = Inference(new, few)
        name = "FeatureMapFlow" if new is maps else "EmbeddingFlow"
        for batch_size in (1, 32):
            what = f"{name}, {SCORED} images, {batch_size} at once, s"
            found.append(Row("infer", what, partial(infer, batch_size), bar))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parts = ("engine", "fit", "maps-fit", "backbone", "infer")
    parser.add_argument("--rows", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chosen = [row for row in rows() if row.part in arguments.rows]
    if "engine" in arguments.rows:
        chosen[0].measure()  # warm up
    measured: list[list[tuple[float, float]]] = [[] for _ in chosen]
    for _ in range(arguments.rounds):
        for row, found in zip(chosen, measured, strict=True):
            found.append(row.measure())
    table = Table("measured", "ours", "bare", "ratio (median)", "bar", "held")
    for row, found in zip(chosen, measured, strict=True):
        ratio = median(ours / bare for ours, bare in found)
        sides = (f"{median(side):,.4g}" for side in zip(*found, strict=True))
        held = ratio >= row.bar if row.least else ratio <= row.bar
        bar = f"{'≥' if row.least else '≤'} {row.bar:.2f}"
        table.add_row(row.name, *sides, f"{ratio:.2f}", bar, "yes" if held else "no")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
