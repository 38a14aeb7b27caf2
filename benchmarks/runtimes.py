# SPDX-License-Identifier: Apache-2.0
"""How fast PyTorch, ONNX Runtime and OpenVINO score one image after another, and what INT8 costs.

    python -m benchmarks.runtimes FOLDER [--rounds 7] [--seed 0] [--detectors EmbeddingFlow …]

Every detector on a backbone is fitted with its defaults to a folder that is laid out as MVTec AD, and exported: to
ONNX, to OpenVINO, and to OpenVINO in INT8 (`compression_type="int8_ptq"`; left out where NNCF is not installed). Each
then scores the same images, one at a time and already resized, in rounds that alternate the runtimes; the median ratio
to PyTorch counts. `OMP_NUM_THREADS` sets PyTorch's threads; OpenVINO and ONNX Runtime take all cores. The image AUROC
and the share of normal images that is labelled are those of all test images.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from anomalib.engine import Engine
from lightning import seed_everything
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score

from anomalib_flowood import OneClass, load, models
from anomalib_flowood.inference.detector import Detector
from anomalib_flowood.inference.loading import of_module
from benchmarks.fits import quiet

IMAGES = 32
"""Scored in a round."""
DETECTORS = ("EmbeddingFlow", "FeatureMapFlow")


def fit_and_export(name: str, folder: Path, seed: int, output: Path) -> tuple[dict[str, Detector], Any]:
    """Return what scores, by how it is computed, and the data."""
    with quiet():
        seed_everything(seed, verbose=False)
        data = OneClass(folder, "good")
        detector = getattr(models, name)(visualizer=False)
        engine = Engine(accelerator="cpu", devices=1, default_root_dir=output, logger=False, enable_model_summary=False)
        engine.fit(detector, datamodule=data)
        exports: dict[str, dict[str, Any]] = {"ONNX Runtime": {"export_type": "onnx"}, "OpenVINO": {}}
        if find_spec("nncf"):
            exports["OpenVINO, INT8"] = {"compression_type": "int8_ptq", "datamodule": data}
        scorers = {}
        for computed_by, arguments in exports.items():
            root = output / name / computed_by.replace(", ", "_")
            path = engine.export(detector, **{"export_type": "openvino", "export_root": root, **arguments})
            assert path is not None
            scorers[computed_by] = load(path)
        return {"PyTorch": of_module(detector), **scorers}, data


def seconds(scorer: Detector, images: np.ndarray) -> float:
    """How long the images take, one at a time."""
    scorer.runtime.run(images[:1])
    start = time.perf_counter()
    for image in images[:, None]:
        scorer.runtime.run(image)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS)
    arguments = parser.parse_args()
    table = Table("detector", "computed by", "ms per image", "images/s, of PyTorch's", "image AUROC", "false alarms")
    with TemporaryDirectory() as output:
        for name in arguments.detectors:
            scorers, data = fit_and_export(name, arguments.folder.resolve(), arguments.seed, Path(output))
            files = list(data.test_data.samples["image_path"])
            defective = np.array([Path(file).parent.name != "good" for file in files])
            images = np.random.default_rng(0).random((IMAGES, 3, *scorers["PyTorch"].size), dtype=np.float32)
            rounds = [
                {computed_by: seconds(scorer, images) for computed_by, scorer in scorers.items()}
                for _ in track(range(arguments.rounds), f"{name}, speed", transient=True)
            ]
            for computed_by, scorer in scorers.items():
                found = list(track(scorer.score_batches(files), computed_by, transient=True))
                scores, labels = (
                    np.concatenate([getattr(batch, of) for batch in found]) for of in ("raw_score", "label")
                )
                table.add_row(
                    name,
                    computed_by,
                    f"{1000 * median(each[computed_by] for each in rounds) / IMAGES:.1f}",
                    f"{median(each['PyTorch'] / each[computed_by] for each in rounds):.2f}",
                    f"{roc_auc_score(defective, scores):.4f}",
                    f"{labels[~defective].mean():.4f}",
                )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
