# SPDX-License-Identifier: Apache-2.0
"""What the AUROC of all pixels of a test set takes, above the process at rest: ours, scikit-learn's, torchmetrics'.

    python -m benchmarks.pixel_auroc [--images 150] [--size 224] [--threads 1]

The maps are of noise with a brighter patch in every second image, on the scale of raw scores. Each way has a process of
its own. Ours is measured as a function of all maps, and as the metric that a test fills batch by batch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from anomalib.data import ImageBatch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from anomalib_flowood.metrics import AUROC, auroc

from .peak import Peak, anonymous

BATCH = 32


def _metric(maps: Tensor, masks: Tensor) -> float:
    metric = AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_")
    for some, truth in zip(maps.split(BATCH), masks.split(BATCH), strict=True):
        image = torch.zeros(len(some), 3, 1, 1)
        metric.update(ImageBatch(image=image, anomaly_map=some.clone(), gt_mask=truth.bool()))
    return float(metric.compute())


WAYS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "metrics.auroc": auroc,
    "metrics.AUROC": _metric,
    "scikit-learn": lambda maps, masks: float(roc_auc_score(masks.flatten().numpy(), maps.flatten().numpy())),
    "torchmetrics": lambda maps, masks: float(binary_auroc(maps, masks.int())),
}


def test_set(images: int, size: int) -> tuple[Tensor, Tensor]:
    """Maps ``(N, size, size)`` and masks, 8 bits, of the same shape."""
    maps = 1000 * torch.randn(images, size, size, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(images, size, size, dtype=torch.uint8)
    masks[::2, size // 5 : size // 2, size // 5 : size // 2] = 1
    return maps + 1000.0 * masks, masks


def measure(way: str, images: int, size: int, threads: int) -> tuple[float, float, int]:
    """Return the area, seconds, and bytes above rest."""
    torch.set_num_threads(threads)
    WAYS[way](*test_set(2, 8))  # what is imported at the first call is not counted
    maps, masks = test_set(images, size)
    with Peak(anonymous, interval=0.005) as peak:
        start = time.perf_counter()
        value = WAYS[way](maps, masks)
        seconds = time.perf_counter() - start
    return value, seconds, peak.above_rest or 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    table = Table(f"of {arguments.images * arguments.size**2:,} pixels", "AUROC", "s", "peak above rest, MiB")
    for way in WAYS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(measure, way, arguments.images, arguments.size, arguments.threads).result()
        table.add_row(way, f"{result[0]:.6f}", f"{result[1]:.2f}", f"{result[2] / 2**20:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
