# SPDX-License-Identifier: Apache-2.0
"""What anomalib's engine costs our detectors: ratios to the bare work, measured in the same run.

    python benchmarks/speed.py [--rounds 3]

- engine: images/s that `PixelFlow` (default) trains in anomalib's engine, over a bare loop on tensors in memory;
- fit: seconds of a whole `EmbeddingFlow` fit on 5,000 images, over one bare pass of its backbone over as many.

Rounds alternate the two sides, so that a noisy neighbour meets both; the median ratio counts.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from statistics import median
from tempfile import TemporaryDirectory

import torch
from anomalib.engine import Engine
from rich.console import Console
from rich.table import Table

from anomalib_flowood import CrossDataset, EmbeddingFlow, PixelFlow

IMAGES = 5_000
BATCH = 128
EPOCHS = 4


def data() -> CrossDataset:
    module = CrossDataset("fashion_mnist", ["mnist"], train_limit=IMAGES, test_limit=10, train_batch_size=BATCH)
    module.prepare_data()
    module.setup()
    return module


def fit(detector: PixelFlow | EmbeddingFlow, module: CrossDataset) -> float:
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


@torch.no_grad()
def fit_ratio(module: CrossDataset) -> tuple[float, float]:
    """Seconds of a whole fit and of a bare backbone pass over the same images, already in memory at the right size."""
    detector = EmbeddingFlow(image_size=(128, 128))
    parts = [part.__getitems__(range(len(part))).image for part in (module.train_data, module.val_data)]
    small = torch.cat(parts)
    # As fast as this backbone gets on a CPU: small batches, channels last.
    batches = [
        detector.pre_processor.transform(batch).contiguous(memory_format=torch.channels_last)
        for batch in small.split(32)
    ]
    start = time.perf_counter()
    for batch in batches:
        detector.model.embedding.network(batch)
    bare = time.perf_counter() - start
    del batches
    with torch.enable_grad():
        return fit(detector, module), bare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = data()
    engine_ratio(module)  # warm up
    table = Table("measured", "ours", "bare", "ratio (median)", "bar")
    engine = [engine_ratio(module) for _ in range(rounds)]
    table.add_row(
        "PixelFlow training, images/s",
        *(f"{median(side):,.0f}" for side in zip(*engine, strict=True)),
        f"{median(ours / bare for ours, bare in engine):.2f}",
        "≥ 0.7",
    )
    whole = [fit_ratio(module) for _ in range(rounds)]
    table.add_row(
        f"EmbeddingFlow fit, {IMAGES:,} images, s",
        *(f"{median(side):.1f}" for side in zip(*whole, strict=True)),
        f"{median(ours / bare for ours, bare in whole):.2f}",
        "≤ 1.3",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
