# SPDX-License-Identifier: Apache-2.0
"""Detectors whose pre-processor crops, pads or keeps the aspect are loaded with the scores of a prediction."""

import numpy as np
import pytest
from anomalib.pre_processing import PreProcessor
from model_helpers import data, embedding_flow, engine
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, Pad, Resize

from anomalib_flowood import load
from anomalib_flowood.inference.loading import of_module
from anomalib_flowood.models.components import open_checkpoint

TRANSFORMS = {
    "crop": [Resize((64, 72)), CenterCrop(48)],
    "aspect and crop": [Resize(56), CenterCrop((48, 40))],
    "crop alone": [CenterCrop(48)],
    "padding": [Resize((48, 32)), Pad((8, 0))],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 90, 120, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def fitted(name, tmp_path):
    detector = embedding_flow(image_size=None, pre_processor=PreProcessor(Compose(TRANSFORMS[name])))
    run = engine(tmp_path)
    run.fit(detector, datamodule=data(tmp_path))
    return run, detector


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_loaded_detector_sees_what_a_prediction_sees(name, folder, tmp_path):
    """It resized to what is left after the crop, and then cropped that: all scores were others."""
    run, detector = fitted(name, tmp_path)
    predicted = np.concatenate([batch.raw_score.numpy() for batch in run.predict(detector, data_path=folder)])
    for given in (folder, [np.asarray(Image.open(path), np.float32) / 255 for path in sorted(folder.iterdir())]):
        np.testing.assert_allclose(of_module(detector).score(given).raw_score, predicted, rtol=1e-4)


def test_so_does_an_export(folder, tmp_path):
    run, _ = fitted("crop", tmp_path)
    detector = open_checkpoint(run.trainer.checkpoint_callback.best_model_path)
    path = detector.to_onnx(tmp_path / "export")
    predicted = np.concatenate([batch.raw_score.numpy() for batch in run.predict(detector, data_path=folder)])
    np.testing.assert_allclose(load(path).score(folder).raw_score, predicted, rtol=1e-4)
