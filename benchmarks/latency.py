# SPDX-License-Identifier: Apache-2.0
"""What one image takes, from its file to the decision, over a bare pass of the backbone in the same runtime.

    python -m benchmarks.latency [--rounds 9] [--images 20] [--detectors EmbeddingFlow FeatureMapFlow]

The detectors are fitted with their defaults to synthetic photographs, and exported. *Whole* is `detector.score(…)` of
`anomalib_flowood.load`, for one image at a time: score, p-value, label and map, as NumPy; of an array of the detector's
size, and of the content of a JPEG file of 640 × 480, which has to be decoded and resized. *Bare* is the same runtime on
the backbone alone, whose input has been made ready: PyTorch as fast as the package runs it (`run_backbone`), ONNX
Runtime and OpenVINO (single precision) on an export of it.

All of it runs on one processor, and its time is the processor's, in which other work on the machine does not count:
with one processor that is the latency of an idle machine. Whole and bare take turns, image by image; a round's ratio is
of the medians of its images, and the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import torch
from rich.console import Console
from rich.table import Table

import anomalib_flowood
from anomalib_flowood import OneClass
from anomalib_flowood.data import read_image
from anomalib_flowood.features import run_backbone
from anomalib_flowood.models.components.export_check import onnx_runtime
from benchmarks.fits import quiet, quiet_engine
from benchmarks.memory import write_photographs

BAR = 1.2
"""The largest ratio in OpenVINO."""
DETECTORS = ("EmbeddingFlow", "FeatureMapFlow")
RUNTIMES = ("PyTorch", "ONNX Runtime", "OpenVINO")

Call = Callable[[Any], object]


class Backbone(torch.nn.Module):
    """The backbone of a detector, to be exported alone."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        embedding = getattr(detector.model, "embedding", None)
        self.network = detector.model.backbone if embedding is None else embedding.network

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return run_backbone(self.network, images)


def bare_calls(detector: Any, ready: torch.Tensor, folder: Path) -> list[Call]:
    """The backbone alone in each runtime, on an image that was made ready."""
    backbone = Backbone(detector).eval()
    path = folder / "backbone.onnx"
    torch.onnx.export(backbone, (ready,), path, dynamo=True, verbose=False)
    model = openvino.Core().read_model(path)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixels, in_onnx_runtime = ready.numpy(), onnx_runtime(path).run
    return [
        lambda _: backbone(ready),
        lambda _: in_onnx_runtime(pixels),
        lambda _: compiled(pixels),
    ]


def prepare(name: str, folder: Path, output: Path) -> list[tuple[str, Call, Call, list[list[Any]]]]:
    """Fit and export a detector: for each runtime its name, both sides, and images as arrays and as files."""
    with quiet():
        engine = quiet_engine(output, ())
        detector = getattr(anomalib_flowood, name)(visualizer=False)
        engine.fit(detector, datamodule=OneClass(folder.parent, folder.name, val_split_ratio=0.2))
        checkpoint = output / "model.ckpt"
        engine.trainer.save_checkpoint(checkpoint, weights_only=True)
        exports = [engine.export(detector, kind, export_root=output) for kind in ("onnx", "openvino")]
    height, width = detector.input_size
    photographs = sorted(folder.iterdir())
    images = [read_image(path).float()[None] / 255 for path in photographs]
    resized = torch.cat([torch.nn.functional.interpolate(image, (height, width)) for image in images])
    arrays = list((resized * 255).byte().permute(0, 2, 3, 1).numpy())
    files = [path.read_bytes() for path in photographs]
    detector.eval().to("cpu")
    ready = detector.pre_processor.transform(resized[:1])
    sides = zip(RUNTIMES, (checkpoint, *exports), bare_calls(detector, ready, output), strict=True)
    return [(runtime, anomalib_flowood.load(path).score, bare, [arrays, files]) for runtime, path, bare in sides]


@torch.no_grad()
def both(whole: Call, bare: Call, images: list[Any]) -> tuple[float, float]:
    """Median milliseconds of the processor for one image, of both sides in turns."""
    took: tuple[list[float], list[float]] = ([], [])
    for image in images:
        for call, seconds in zip((whole, bare), took, strict=True):
            start = time.process_time()
            call(image)
            seconds.append(time.process_time() - start)
    return median(took[0]) * 1e3, median(took[1]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=20, help="in each round")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS)
    given = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before a runtime counts processors
    torch.set_num_threads(1)
    table = Table("one image", "runtime", "from", "whole, ms", "bare backbone, ms", "ratio (median)", f"≤ {BAR}")
    with TemporaryDirectory() as made:
        photographs = Path(made) / "photographs" / "good"
        write_photographs(photographs, 100, (480, 640))
        rows = []
        for name in given.detectors:
            for runtime, whole, bare, kinds in prepare(name, photographs, Path(made) / name):
                for kind, images in zip(("array", "JPEG file"), kinds, strict=True):
                    rows.append(((name, runtime, kind), partial(both, whole, bare, images[: given.images])))
        found: list[list[tuple[float, float]]] = [[] for _ in rows]
        for _ in range(given.rounds + 1):  # the first warms up
            for (_, measure), times in zip(rows, found, strict=True):
                times.append(measure())
    for (cells, _), times in zip(rows, found, strict=True):
        times = times[1:]
        ratio = median(whole / bare for whole, bare in times)
        held = ("yes" if ratio <= BAR else "no") if cells[1] == "OpenVINO" else ""
        ours, alone = (np.median(side) for side in zip(*times, strict=True))
        table.add_row(*cells, f"{ours:.1f}", f"{alone:.1f}", f"{ratio:.2f}", held)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
