# SPDX-License-Identifier: Apache-2.0
"""What holding out more of few normal images costs, and what it brings.

    python -m benchmarks.held_out FOLDER [FOLDER ...] [--images 40 80 120] [--draws 5] [--backbone NAME]

Of each folder, laid out as MVTec AD, so many normal images are drawn, a share of them is held out, and `EmbeddingFlow`
without couplings is fitted to the others. What is held out decides: an image is labelled anomalous at alpha = 0.05, or
where fewer than 20 are held out, if it scores above all of them. A row is a mean over folders and draws.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from anomalib_flowood import EmbeddingFlow
from anomalib_flowood.data.datamodules.splits import held_out
from anomalib_flowood.metrics import functional
from anomalib_flowood.models.components import ConformalPostProcessor
from benchmarks.contest.data import HELD_OUT, IndustrialFolder
from benchmarks.fits import quiet

SHARES = {"a tenth": 0.1, "a quarter": 0.25, "a third": 1 / 3, "a half": 0.5, "by default": None}


@torch.no_grad()
def features_of(detector: Any, folder: Path) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Features of all normal training images and of all test images; which of these are anomalous, ``(N,)``."""
    data = IndustrialFolder(folder.resolve().parent, folder.resolve().name, **HELD_OUT)
    data.setup()
    parts: list[tuple[Tensor, ...]] = []
    labels = torch.empty(0)
    for loaders in ((data.train_dataloader(), data.val_dataloader()), (data.test_dataloader(),)):
        batches = [batch for loader in loaders for batch in loader]
        found = [detector.extract(detector.pre_processor.transform(batch.image)) for batch in batches]
        parts.append(tuple(torch.cat(part) for part in zip(*found, strict=True)))
        labels = torch.cat([batch.gt_label for batch in batches]).bool()
    return parts[0], parts[1], labels


@torch.no_grad()
def decide(
    model: Any, normal: tuple[Tensor, ...], test: tuple[Tensor, ...], anomalous: Tensor, held: int
) -> dict[str, float]:
    """Fit to normal images but the first ones, which calibrate; label the test images."""
    model.fit_features(tuple(part[held:] for part in normal))
    calibration, scores = (
        model.predict(model.prepare(part)).pred_score for part in (tuple(part[:held] for part in normal), test)
    )
    post_processor = ConformalPostProcessor()
    post_processor.calibrate(calibration)
    flagged = (scores > post_processor.image_threshold).numpy()
    labels = anomalous.numpy()
    false_alarms, found = flagged[~labels].mean(), flagged[labels].mean()
    return {
        "held out": held,
        "level": post_processor.level,
        "AUROC": float(functional.auroc(scores, anomalous)),
        "false alarms": false_alarms,
        "found": found,
    }


def rows_of(detector: Any, folder: Path, counts: list[int], draws: int) -> list[dict[str, Any]]:
    """Results on one folder, a row for each number of images, share and draw."""
    train, test, anomalous = features_of(detector, folder)
    rows = []
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(len(train[0]))
        for images in counts:
            drawn = order[:images]  # all where there are fewer
            normal = tuple(part[drawn] for part in train)
            for name, share in SHARES.items():
                held = held_out(len(drawn), share)
                rows.append({"images": images, "share": name, **decide(detector.model, normal, test, anomalous, held)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--images", type=int, nargs="+", default=[40, 80, 120])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    arguments = parser.parse_args()
    with quiet():
        detector = EmbeddingFlow(arguments.backbone, coupling_layers=0).eval()
        rows = [
            row for folder in arguments.folders for row in rows_of(detector, folder, arguments.images, arguments.draws)
        ]
    means = pd.DataFrame(rows).groupby(["images", "share"], sort=False).mean().reset_index()
    table = Table(*means.columns)
    for row in means.sort_values("images", kind="stable").itertuples(index=False):
        images, share, held, *numbers = row
        table.add_row(str(images), str(share), f"{held:.3g}", *(f"{number:.3f}" for number in numbers))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
