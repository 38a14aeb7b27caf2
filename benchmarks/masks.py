# SPDX-License-Identifier: Apache-2.0
"""What the native form of the cycle mask saves: images/s in training, against the zero-masked form, in one run.

    python benchmarks/masks.py [--rounds 3] [--threads 2]

Both flows have 8 couplings with the same `resnet` (64 channels, 6 blocks) on 28 x 28 grey images, batches of 32. Rounds
alternate the two, so that a noisy neighbour meets both; the median ratio counts.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from anomalib_flowood.models.pixel_flow import PixelFlowModel

BATCH = 32


def build(native: bool) -> PixelFlowModel:
    return PixelFlowModel((28, 28), 1, mask="cycle", native=native, subnet="resnet", hidden_channels=64, num_blocks=6)


def images_per_second(model: PixelFlowModel, steps: int) -> float:
    """Images/s over whole training steps: noise, forward, backward, Adam."""
    optimizer = torch.optim.Adam(model.flow.parameters(), lr=1e-4, fused=True)
    images = torch.rand(BATCH, 1, 28, 28)
    start = time.perf_counter()
    for _ in range(steps):
        loss = -(model.log_prob(images, noisy=True) / model.dims).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps * BATCH / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native, masked = build(native=True), build(native=False)
    for model in (native, masked):
        images_per_second(model, 1)  # warm up
    # The fast side takes more steps, so that both are timed over similar spans.
    pairs = [(images_per_second(native, 3), images_per_second(masked, 1)) for _ in range(arguments.rounds)]
    table = Table("training, cycle mask, resnet", "native", "zero-masked", "ratio (median)", "bar")
    table.add_row(
        "images/s",
        *(f"{median(side):,.1f}" for side in zip(*pairs, strict=True)),
        f"{median(fast / slow for fast, slow in pairs):.2f}",
        "≥ 3",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
