# SPDX-License-Identifier: Apache-2.0
"""False alarms of conformal decisions on fresh in-distribution images.

    python -m benchmarks.false_alarms [--seconds 60] [--splits 200] [--alpha 0.05]

A `PixelFlow` is trained on FashionMNIST. In each random split of the 10,000 test images some calibrate, and the others
are decided on.
"""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory

import numpy as np
import torch
from anomalib.engine import Engine
from lightning import seed_everything
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table

from anomalib_flowood import CrossDataset, PixelFlow
from anomalib_flowood.benchmark import ScoreRecorder
from anomalib_flowood.checks import refuse_nan
from anomalib_flowood.conformal import threshold_rank
from benchmarks.fits import TimeLimit, quiet

CALIBRATION_IMAGES = (100, 1000, 5000)


def in_distribution_scores(seconds: float) -> torch.Tensor:
    """Raw scores of FashionMNIST's test images from a flow that was trained for so long."""
    around = {"post_processor": False, "evaluator": False, "visualizer": False}
    detector = PixelFlow(image_size=(28, 28), channels=1, **around)
    recorder = ScoreRecorder()
    with quiet(), TemporaryDirectory() as folder:
        seed_everything(0, verbose=False)
        datamodule = CrossDataset("fashion_mnist", ["mnist"])
        engine = Engine(
            accelerator="cpu",
            default_root_dir=folder,
            callbacks=[TimeLimit(seconds), recorder],
            logger=False,
            max_epochs=-1,
            limit_val_batches=0,
        )
        engine.fit(detector, datamodule=datamodule)
        engine.test(detector, datamodule=datamodule, verbose=False)
    scores = recorder.scores
    return torch.tensor(scores.loc[scores["label"] == 0, "score"].to_numpy())


def false_alarm_rates(
    scores: ArrayLike, calibration_images: int, alpha: float = 0.05, splits: int = 200, seed: int = 0
) -> np.ndarray:
    """Measure the false-alarm rate: calibrate on random images of one distribution, decide on the others.

    Args:
        scores: Scores of in-distribution images that the detector was not trained on, ``(N,)``.
        calibration_images: How many of them calibrate in each split.
        alpha: The level, in (0, 1).
        splits: Number of random splits.
        seed: Seed of the splits.

    Returns:
        Share of flagged images in each split, ``(splits,)``. Its mean estimates the rate that is at most ``alpha``;
        single splits scatter about it, since m / (n + 1) is a mean over calibration sets too.

    Raises:
        ValueError: If a score is NaN, the level cannot be reached, or no image is left to decide on.
    """
    values = np.asarray(scores)
    refuse_nan(values)
    if calibration_images >= len(values):
        msg = f"calibration_images={calibration_images} leaves none of {len(values)} images to decide on."
        raise ValueError(msg)
    rank = threshold_rank(calibration_images, alpha)
    drawn = np.random.default_rng(seed).permuted(np.tile(values, (splits, 1)), axis=1)
    calibration, test = drawn[:, :calibration_images], drawn[:, calibration_images:]
    thresholds = np.partition(calibration, -rank, axis=1)[:, -rank]
    return (test > thresholds[:, None]).mean(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=0.05)
    arguments = parser.parse_args()
    scores = in_distribution_scores(arguments.seconds)
    table = Table("calibration images", "false alarms, mean over splits", "standard deviation over splits")
    for images in CALIBRATION_IMAGES:
        rates = false_alarm_rates(scores.numpy(), images, arguments.alpha, arguments.splits)
        table.add_row(f"{images:,}", f"{rates.mean():.4f}", f"{rates.std():.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
