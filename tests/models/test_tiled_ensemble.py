# SPDX-License-Identifier: Apache-2.0
"""anomalib's tiled ensemble: a detector for each place of large images."""

import os

import numpy as np
import pandas as pd
from anomalib.pipelines.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble
from jsonargparse import Namespace
from model_helpers import BACKBONE, in_a_fork
from PIL import Image

import anomalib_flowood

CONFIG = """
seed: 0
accelerator: cpu
default_root_dir: results
tiling: {tile_size: [64, 64], stride: 64, image_size: [64, 128]}
normalization_stage: image
thresholding_stage: image
data:
  class_path: anomalib.data.Folder
  init_args:
    {name: parts, root: parts, normal_dir: train, normal_test_dir: good, abnormal_dir: hole, mask_dir: mask,
     num_workers: 0, val_split_mode: from_test, test_split_mode: from_dir}
SeamSmoothing: {apply: false}
TrainModels:
  model: {class_path: anomalib_flowood.FeatureMapFlow}
  trainer: {logger: false, enable_progress_bar: false, enable_model_summary: false}
"""


class OfTests(anomalib_flowood.FeatureMapFlow):
    """Of a small network; anomalib's pipeline takes no arguments of a model."""

    def __init__(self, **kwargs):
        small = {"backbone": BACKBONE, "pre_trained": False, "map_layers": (1, 2), "score_layers": (2,)}
        super().__init__(**small, bank_size=100, rotations=False, **kwargs)


def draw(folder):
    """Noise on grey, and holes on the right of defects."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("good", 12), ("hole", 12), ("mask", 12)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            pixels, mask = rng.normal(128, 8, (64, 128, 3)).clip(0, 255), np.zeros((64, 128))
            row, column = 4 + 3 * number, 70 + 4 * number
            if split == "hole":
                pixels[row : row + 14, column : column + 14] = 0
            mask[row : row + 14, column : column + 14] = 255
            image = Image.fromarray((mask if split == "mask" else pixels).astype(np.uint8))
            image.save(folder / split / f"{number:02}.png")


def train_and_evaluate():
    arguments, train = Namespace(config="ensemble.yaml"), TrainTiledEnsemble()
    train.run(arguments)
    EvalTiledEnsemble(train.root_dir).run(arguments)


def test_detectors_work_in_anomalibs_tiled_ensemble(tmp_path, monkeypatch):
    """It gives its own pre-processor, for tiles, and has no use for a metric without a value."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(anomalib_flowood, "FeatureMapFlow", OfTests)
    draw(tmp_path / "parts")
    (tmp_path / "ensemble.yaml").write_text(CONFIG)
    # Of its own, since the pipeline leaves its log as the one of the process.
    child = in_a_fork(train_and_evaluate, tmp_path / "out.txt", tmp_path / "errors.txt")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = (tmp_path / "out.txt").read_text() + (tmp_path / "errors.txt").read_text()
    assert status == 0, said[-3000:]
    assert "There were some errors" not in said
    (results,) = (tmp_path / "results").rglob("metric_results.csv")
    metrics = pd.read_csv(results).iloc[0]
    assert metrics.image_AUROC > 0.9
    assert metrics.pixel_AUROC > 0.9
