# SPDX-License-Identifier: Apache-2.0
"""Detectors of others that are derived from ours."""

import numpy as np
import pandas as pd
import pytest
from anomalib.models.components import AnomalibModule
from model_helpers import BACKBONE, data, engine
from PIL import Image
from torchvision.transforms.v2 import Resize

import anomalib_flowood
from anomalib_flowood import EmbeddingFlow, FeatureMapFlow, PixelFlow, open_checkpoint
from anomalib_flowood.cli import main
from anomalib_flowood.models.components import ExactPreProcessor
from anomalib_flowood.models.components.checkpoints import saved_arguments

SMALL = {"image_size": (12, 12), "channels": 1, "coupling_layers": 2, "hidden_channels": 8, "bottleneck_dim": 3}


class Passing(PixelFlow):
    """Passes on what it does not change."""

    def __init__(self, max_epochs=1, **kwargs):
        super().__init__(max_epochs=max_epochs, **kwargs)


class Fixing(PixelFlow):
    """Has none of the arguments."""

    def __init__(self):
        super().__init__(**SMALL, max_epochs=1)


def fitted(detector: AnomalibModule, folder):
    run = engine(folder)
    run.fit(detector, datamodule=data(folder))
    return run.trainer.checkpoint_callback.best_model_path


@pytest.mark.parametrize("make", [lambda: Passing(**SMALL), Fixing])
def test_settings_that_a_class_gives_to_another_are_not_called_unknown(make, tmp_path, caplog):
    detector = make()
    opened = open_checkpoint(fitted(detector, tmp_path))
    assert type(opened) is type(detector)
    assert opened.hparams == detector.hparams
    assert opened.post_processor.calibrated
    assert "left out" not in caplog.text


def test_arguments_that_are_passed_on_are_the_checkpoints_for_every_command(tmp_path):
    """They were those that the class has by default, which were refused: nobody had given them."""
    checkpoint = fitted(Passing(**SMALL), tmp_path)
    main(["predict", "--data", str(images(tmp_path)), "--ckpt_path", checkpoint, "--output", str(tmp_path / "a")])
    level = ["--model.post_processor.alpha", "0.5", "--output", str(tmp_path / "b")]
    main(["predict", "--data", str(images(tmp_path)), "--ckpt_path", checkpoint, *level])
    labels = [list(pd.read_csv(tmp_path / name / "predictions.csv").pred_label) for name in "ab"]
    assert sum(labels[0]) <= sum(labels[1])


def images(folder):
    (folder / "images").mkdir(exist_ok=True)
    for number in range(4):
        Image.fromarray(np.full((12, 12), 40 * number, dtype=np.uint8)).save(folder / "images" / f"{number}.png")
    return folder / "images"


def test_of_classes_of_one_name_the_checkpoints_own_is_opened_as_it_was_defined_last(tmp_path):
    def define():
        class PixelFlow(anomalib_flowood.PixelFlow):
            pass

        return PixelFlow

    before, again = define(), define()  # as a cell of a notebook that is run twice
    assert type(open_checkpoint(fitted(before(**SMALL, max_epochs=1), tmp_path / "own"))) is again
    assert type(open_checkpoint(fitted(PixelFlow(**SMALL, max_epochs=1), tmp_path / "ours"))) is PixelFlow


@pytest.mark.parametrize("detector", [EmbeddingFlow, FeatureMapFlow, PixelFlow])
def test_a_pre_processor_of_a_subclass_is_taken(detector):
    class Half(detector):
        @staticmethod
        def configure_pre_processor(image_size=None):
            return ExactPreProcessor(Resize((24, 24)))

    arguments = {"image_size": (48, 48)}
    if detector is not PixelFlow:
        arguments |= {"backbone": BACKBONE, "pre_trained": False}
    assert detector(**arguments).input_size == (48, 48)
    assert Half(**arguments).input_size == (24, 24)
    arguments["image_size"] = (32, 32)
    assert Half(**arguments, pre_processor=ExactPreProcessor(Resize((32, 32)))).input_size == (32, 32)


def test_a_checkpoint_says_what_module_its_class_is_of(tmp_path):
    checkpoint = {"anomalib_flowood_class": "Nobody", "anomalib_flowood_module": "nowhere.flows"}
    with pytest.raises(ValueError, match=r"written by Nobody, a class that is not .*--model nowhere\.flows\.Nobody"):
        saved_arguments(tmp_path, checkpoint)
