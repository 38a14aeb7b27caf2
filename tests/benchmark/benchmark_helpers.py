# SPDX-License-Identifier: Apache-2.0
"""Small detectors, a small folder, and the jobs of a benchmark section."""

from pathlib import Path

from anomalib_flowood.benchmark import BenchmarkJob, BenchmarkJobGenerator

RESIZE = {
    "class_path": "anomalib.pre_processing.PreProcessor",
    "init_args": {"transform": {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [32, 32]}}},
}
DFM = {
    "class_path": "anomalib.models.Dfm",
    "name": "DFM tiny",
    "init_args": {
        "backbone": "test_resnet",
        "layer": "layer1",
        "pre_trained": False,
        "pooling_kernel_size": 4,
        "pre_processor": RESIZE,
    },
}
PADIM = {
    "class_path": "padim",
    "init_args": {
        "backbone": "test_resnet",
        "layers": ["layer1"],
        "pre_trained": False,
        "n_features": 8,
        "pre_processor": RESIZE,
    },
}
FOLDER = {"name": "tiny", "normal_dir": "train", "normal_test_dir": "good", "abnormal_dir": ["bad", "worse"]}


def folder(images: Path, **changes: object) -> dict:
    return {"class_path": "Folder", "init_args": {**FOLDER, "root": str(images), "num_workers": 0, **changes}}


def jobs(**section: object) -> list[BenchmarkJob]:
    return list(BenchmarkJobGenerator(["cpu"]).generate_jobs(section))  # type: ignore[arg-type]
