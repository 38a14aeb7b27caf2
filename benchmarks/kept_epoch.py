# SPDX-License-Identifier: Apache-2.0
"""False alarms of `PixelFlow`, whose held-out images choose the epoch and then calibrate it.

    python -m benchmarks.kept_epoch [--images 100 300 1000 10000] [--seeds 3] [--splits 2000] [--pool 4000]

A flow is trained on so many images of FashionMNIST, without those that a data module holds out of them, and after each
epoch it scores a pool of others. Then as many images as are held out are drawn from the pool, often: they choose
the epoch and calibrate it, and the rest of the pool is decided on. No weights depend on what is held out, so that each
draw is what a whole training with other held-out images gives. The last epoch, which nobody chooses, stands beside it:
there the promise holds by proof.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anomalib_flowood import CrossDataset, PixelFlow
from anomalib_flowood.conformal import nearest_rank
from benchmarks.fits import quiet, quiet_engine

ALPHA = 0.05


class Scores(Callback):
    """Scores images after each epoch, before the best weights come back: ``found`` has an array ``(N,)`` for each."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.found: list[np.ndarray] = []

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Score them if the epoch is through."""
        if trainer.is_last_batch:
            model: Any = pl_module.model.eval()
            parts = [-model.log_prob(part) for part in self.images.split(1000)]
            self.found.append(torch.cat(parts).double().nan_to_num(nan=torch.inf).numpy())
            model.train()


def trajectory(images: int, pool: int, seed: int) -> tuple[np.ndarray, int]:
    """Scores of the pool after each epoch of a training, ``(epochs, pool)``, and how many images were held out."""
    with quiet(), TemporaryDirectory() as folder:
        outside = Path(folder, "outside")  # a data module wants some
        outside.mkdir()
        Image.new("L", (28, 28)).save(outside / "black.png")
        data = CrossDataset("fashion_mnist", [outside], train_limit=images, seed=seed)
        data.setup()
        held_out = data.val_data.__getitems__(list(range(len(data.val_data)))).image
        inside = np.flatnonzero(data.test_data.samples["label_index"] == 0)[:pool]
        others = data.test_data.__getitems__(inside.tolist()).image
        seed_everything(seed, verbose=False)
        detector = PixelFlow(image_size=(28, 28), channels=1, evaluator=False, visualizer=False)
        scores = Scores(torch.cat([held_out, others]))
        quiet_engine(folder, [scores]).fit(detector, datamodule=data)
    own, found = np.split(np.stack(scores.found), [len(held_out)], axis=1)
    assert detector.kept_epoch is not None
    assert own.mean(1).argmin() + 1 == detector.kept_epoch.epoch  # that is how it chooses
    return found, len(held_out)


def false_alarms(found: np.ndarray, held_out: int, splits: int, seed: int) -> np.ndarray:
    """Shares of the rest of the pool that are labelled, by the epoch chosen and by the last, ``(splits, 2)``."""
    draw, rank = np.random.default_rng(seed), nearest_rank(held_out, ALPHA)
    rates = []
    for _ in range(splits):
        order = draw.permutation(found.shape[1])
        chosen = found[:, order[:held_out]].mean(1).argmin()
        for epoch in (chosen, -1):
            scores = found[epoch, order]
            threshold = np.partition(scores[:held_out], held_out - rank)[held_out - rank]
            rates.append((scores[held_out:] > threshold).mean())
    return np.reshape(rates, (splits, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 300, 1000, 10000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--splits", type=int, default=2000)
    parser.add_argument("--pool", type=int, default=4000)
    arguments = parser.parse_args()
    table = Table("images", "held out", "promised", "epochs", "chosen epoch", "range over seeds", "last epoch")
    for images in arguments.images:
        means = []
        for seed in track(range(arguments.seeds), f"{images:,} images", transient=True):
            found, held_out = trajectory(images, arguments.pool, seed)
            means.append(false_alarms(found, held_out, arguments.splits, seed).mean(0))
        (chosen, last), each = np.mean(means, 0), [100 * mean[0] for mean in means]
        promise = nearest_rank(held_out, ALPHA) / (held_out + 1)
        shares = f"{100 * promise:.2f} %", str(len(found)), f"{100 * chosen:.2f} %"
        spread = f"{min(each):.2f} % to {max(each):.2f} %"
        table.add_row(f"{images:,}", str(held_out), *shares, spread, f"{100 * last:.2f} %")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
