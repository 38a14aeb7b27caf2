# SPDX-License-Identifier: Apache-2.0
"""What is marked in images, good and defective ones, by two thresholds of pixels and the best there is.

    python -m benchmarks.pixel_threshold FOLDER [--seed 0] [--alpha 0.05]

A `FeatureMapFlow` with its defaults is fitted to a folder that is laid out as MVTec AD, a tenth of whose normal images
calibrates.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.engine import Engine
from lightning import seed_everything
from rich.console import Console
from rich.table import Table
from sklearn.metrics import precision_recall_curve
from torch import Tensor
from torch.nn import functional

from anomalib_flowood import FeatureMapFlow
from anomalib_flowood.models.components import ConformalPostProcessor
from benchmarks.contest.data import HELD_OUT, IndustrialFolder
from benchmarks.false_alarms import false_alarm_rates
from benchmarks.fits import quiet


def fit(folder: Path, seed: int, alpha: float) -> tuple[Any, IndustrialFolder]:
    """Fit and calibrate."""
    with quiet(), TemporaryDirectory() as output:
        seed_everything(seed, verbose=False)
        data = IndustrialFolder(folder.resolve().parent, folder.resolve().name, **HELD_OUT)
        detector = FeatureMapFlow(post_processor=ConformalPostProcessor(alpha), evaluator=False, visualizer=False)
        engine = Engine(accelerator="cpu", default_root_dir=output, logger=False)
        engine.fit(detector, datamodule=data)
    return detector.eval(), data


@torch.no_grad()
def results_of(detector: Any, data: IndustrialFolder) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw scores of the test images, ``(N,)``, maps and true masks, ``(N, H, W)``; which are defective, ``(N,)``."""
    data.setup()
    scores, maps, masks, labels = [], [], [], []
    for batch in data.test_dataloader():
        prediction = detector.model(detector.pre_processor.transform(batch.image))
        found = prediction.anomaly_map[:, 0]
        scores.append(prediction.pred_score)
        mask = batch.gt_mask.reshape(len(found), 1, *batch.gt_mask.shape[-2:]).float()
        maps.append(found)
        masks.append(functional.interpolate(mask, size=found.shape[1:], mode="nearest")[:, 0] > 0)
        labels.append(batch.gt_label.bool())
    return torch.cat(scores), torch.cat(maps), torch.cat(masks), torch.cat(labels)


def best_threshold(maps: Tensor, masks: Tensor) -> float:
    """The threshold with the best F1 on the test images themselves."""
    precision, recall, thresholds = precision_recall_curve(masks.flatten().numpy(), maps.flatten().numpy())
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[min(int(f1.argmax()), len(thresholds) - 1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alpha", type=float, default=0.05)
    arguments = parser.parse_args()
    detector, data = fit(arguments.folder, arguments.seed, arguments.alpha)
    scores, maps, masks, defective = results_of(detector, data)
    flagged = (scores > detector.post_processor.image_threshold)[~defective]
    table = Table(
        "threshold of pixels", "good images with a marked pixel", "their marked area", "defective ones with one",
        "precision", "recall", "F1",
    )  # fmt: skip
    for name, threshold in (
        ("that of image scores", float(detector.post_processor.image_threshold)),
        ("maxima of normal maps", float(detector.post_processor.pixel_threshold)),
        ("best F1 on the test masks", best_threshold(maps, masks)),
    ):
        marked = maps > threshold
        some = marked.flatten(1).any(1)
        hits = float((marked & masks).sum())
        precision, recall = hits / max(1.0, float(marked.sum())), hits / float(masks.sum())
        numbers = (
            *(float(some[~defective].float().mean()), float(marked[~defective].float().mean())),
            *(float(some[defective].float().mean()), precision, recall),
            2 * precision * recall / max(1e-12, precision + recall),
        )
        table.add_row(name, *(f"{number:.4f}" for number in numbers))
    Console(soft_wrap=True).print(
        f"{len(maps)} test images, {int(defective.sum())} of them defective; "
        f"{len(detector.post_processor.pixel_calibration)} calibration images; "
        f"{float(flagged.float().mean()):.3f} of the good ones are labelled anomalous by their score."
    )
    Console(width=160).print(table)
    # One calibration scatters about the rate that is promised on average: all normal images that are left, split anew.
    maxima = torch.cat([detector.post_processor.pixel_calibration, maps[~defective].flatten(1).amax(1)])
    rates = false_alarm_rates(maxima.numpy(), len(detector.post_processor.pixel_calibration), arguments.alpha)
    Console(soft_wrap=True).print(
        f"Good images with a marked pixel, {len(rates)} random splits of {len(maxima)} into calibration images and "
        f"fresh ones: {rates.mean():.3f} ± {rates.std():.3f}."
    )


if __name__ == "__main__":
    main()
