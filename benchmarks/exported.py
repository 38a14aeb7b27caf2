# SPDX-License-Identifier: Apache-2.0
"""What exported models decide, by OpenVINO as users run it, beside what was measured in PyTorch.

    python -m benchmarks.exported FOLDER [--images 150] [--seed 0] [--detectors PixelFlow …]

Every detector is fitted with its defaults to a folder that is laid out as MVTec AD, and exported. anomalib's
`OpenVINOInferencer` then sees some of the test images, evenly spread, once in what OpenVINO computes in on this CPU by
itself and once in single precision. Images of many sizes take long: OpenVINO prepares its graph for each.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.deploy import OpenVINOInferencer
from anomalib.engine import Engine
from lightning import seed_everything
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score

from anomalib_flowood import OneClass, models
from anomalib_flowood.data.decoding import read_image
from anomalib_flowood.models.components.export_check import openvino_default_precision
from benchmarks.fits import quiet

Decide = Callable[[np.ndarray], tuple[float, bool]]


def fit_and_export(name: str, folder: Path, seed: int, output: Path) -> tuple[Any, Path, list[str]]:
    """Return the fitted detector, its export, and the paths of the test images."""
    with quiet():
        seed_everything(seed, verbose=False)
        data = OneClass(folder, "good")
        detector = getattr(models, name)(visualizer=False)
        engine = Engine(accelerator="cpu", devices=1, default_root_dir=output, logger=False, enable_model_summary=False)
        engine.fit(detector, datamodule=data)
        path = engine.export(detector, "openvino", export_root=output / name)
        assert path is not None
        return detector.eval(), path, list(data.test_data.samples["image_path"])


def by_pytorch(detector: Any) -> Decide:
    """Decide as `Engine.predict` does."""

    @torch.no_grad()
    def decide(image: np.ndarray) -> tuple[float, bool]:
        batch = detector(torch.from_numpy(image).permute(2, 0, 1)[None])
        return float(batch.pred_score), bool(batch.pred_label)

    return decide


def by_openvino(path: Path, config: dict[str, str]) -> Decide:
    """Decide as anomalib's inferencer does."""
    inferencer = OpenVINOInferencer(path, device="CPU", config=config)

    def decide(image: np.ndarray) -> tuple[float, bool]:
        batch = inferencer.predict(image)
        assert batch.pred_score is not None
        assert batch.pred_label is not None
        return float(np.squeeze(batch.pred_score)), bool(np.squeeze(batch.pred_label))

    return decide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=150, help="the most test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--detectors", nargs="+", choices=models.__all__, default=models.__all__)
    arguments = parser.parse_args()
    default = openvino_default_precision()
    table = Table("detector", "computed by", "AUROC", "false alarms", "found", "largest difference", "other labels")
    with TemporaryDirectory() as output:
        folder = arguments.folder.resolve()
        os.chdir(output)  # the inferencer leaves a cache where it is started
        for name in arguments.detectors:
            detector, path, files = fit_and_export(name, folder, arguments.seed, Path(output))
            files = [
                files[place] for place in np.linspace(0, len(files) - 1, min(arguments.images, len(files)), dtype=int)
            ]
            defective = np.array([Path(file).parent.name != "good" for file in files])
            expected = None
            for computed_by, decide in (
                ("PyTorch", by_pytorch(detector)),
                (f"OpenVINO, its default ({default})", by_openvino(path, {})),
                ("OpenVINO, f32", by_openvino(path, {"INFERENCE_PRECISION_HINT": "f32"})),
            ):
                decided = []
                for file in track(files, f"{name}, {computed_by}", transient=True):
                    image = read_image(file).expand(3, -1, -1).permute(1, 2, 0)
                    decided.append(decide(image.numpy() / np.float32(255)))
                scores, labels = (np.array(column) for column in zip(*decided, strict=True))
                expected = (scores, labels) if expected is None else expected
                table.add_row(
                    name,
                    computed_by,
                    *(f"{n:.4f}" for n in (roc_auc_score(defective, scores), labels[~defective].mean())),
                    f"{labels[defective].mean():.4f}",
                    f"{np.abs(scores - expected[0]).max():.1e}",
                    str(int((labels != expected[1]).sum())),
                )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
