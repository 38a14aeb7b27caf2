# SPDX-License-Identifier: Apache-2.0
"""anomalib's detectors have the size of their images from the pre-processor."""

import pytest
from anomalib.pre_processing import PreProcessor
from model_helpers import BACKBONE, data, engine
from torchvision.transforms.v2 import CenterCrop, Compose, GaussianBlur, Resize

from anomalib_flowood import EmbeddingFlow, FeatureMapFlow, PixelFlow, open_checkpoint

ON_BACKBONE = {"backbone": BACKBONE, "pre_trained": False}
DETECTORS = [
    (EmbeddingFlow, {**ON_BACKBONE, "coupling_layers": 0}),
    (FeatureMapFlow, {**ON_BACKBONE, "rotations": False}),
    (PixelFlow, {"coupling_layers": 2, "hidden_channels": 8, "max_epochs": 1}),
]


def size_of(detector):
    """The only size of images that a detector takes."""
    if isinstance(detector, PixelFlow):
        return detector.model.shape[1:]
    return (detector.model.embedding if isinstance(detector, EmbeddingFlow) else detector.model).image_size


@pytest.mark.parametrize(("detector", "arguments"), DETECTORS)
def test_a_given_pre_processor_decides(detector, arguments, tmp_path):
    made = detector(**arguments, pre_processor=detector.configure_pre_processor((48, 40)))
    assert size_of(made) == made.hparams["image_size"] == (48, 40)
    run = engine(tmp_path)
    run.fit(made, datamodule=data(tmp_path))
    opened = open_checkpoint(run.trainer.checkpoint_callback.best_model_path)
    assert size_of(opened) == opened.hparams["image_size"] == opened.input_size == (48, 40)


@pytest.mark.parametrize(("detector", "arguments"), DETECTORS)
def test_what_does_not_agree_is_refused_at_once(detector, arguments):
    """It was refused at the first batch, after a full start."""
    cropped = PreProcessor(Compose([Resize(56), CenterCrop((48, 40))]))
    assert size_of(detector(**arguments, image_size=(48, 40), pre_processor=cropped)) == (48, 40)
    assert tuple(size_of(detector(**arguments, image_size=[48, 40], pre_processor=cropped))) == (48, 40)
    with pytest.raises(ValueError, match="image_size is 32 x 40, but the pre-processor resizes images to 48 x 40"):
        detector(**arguments, image_size=(32, 40), pre_processor=cropped)


@pytest.mark.parametrize("pre_processor", [False, PreProcessor(), PreProcessor(GaussianBlur(5))])
@pytest.mark.parametrize(("detector", "arguments"), DETECTORS)
def test_without_a_size_in_the_pre_processor_the_argument_decides(detector, arguments, pre_processor):
    assert size_of(detector(**arguments, image_size=(48, 40), pre_processor=pre_processor)) == (48, 40)
