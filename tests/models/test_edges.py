# SPDX-License-Identifier: Apache-2.0
"""Densities where there is none, and batches without an image."""

import math

import pytest
import torch
from anomalib.data import ImageBatch
from model_helpers import embedding_flow, feature_map_flow, pixel_flow

from anomalib_flowood.models.components import ConformalPostProcessor
from anomalib_flowood.scores import SCORES

CONVOLUTIONAL = {"coupling_layers": 2, "hidden_channels": 4}
ARCHITECTURES = {
    "cycle": {},
    "cycle, zero-masked": {"native": False},
    "checkerboard": {"mask": "checkerboard", "subnet": "resnet"},
    "horizontal": {"mask": "horizontal", "subnet": "highway"},
    "channel": {"mask": "channel", "subnet": "mlp"},
    "batch normalisation": {"subnet": "resnet", "batch_norm": True},
    "RealNVP": {"architecture": "realnvp", "num_blocks": 1, **CONVOLUTIONAL},
    "Glow": {"architecture": "glow", "num_blocks": 1, **CONVOLUTIONAL},
    "Glow with bottlenecks": {"architecture": "glow", "subnet": "conv_bottleneck", **CONVOLUTIONAL},
}


def on_features(build, **kwargs):
    """A detector whose statistics of features are fitted, and the images that they are of."""
    torch.manual_seed(0)
    detector = build(**kwargs).eval()
    model, images = detector.model, torch.rand(20, 3, *detector.hparams["image_size"])
    features = model.extract(images)
    model.fit_features(features)
    model.scorer.fit(model, [model.inputs(images)])
    return detector, images


# -- overflow ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [embedding_flow, feature_map_flow])
def test_an_overflow_has_no_density_and_what_is_broken_is_none(build):
    detector, images = on_features(build)
    model = detector.model
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.fill_(3e38)
    assert model.density(model.inputs(images)).log_prob.isnan().any()
    assert (model.log_prob(images) == -math.inf).all()
    assert (model.bits_per_dim(images) == math.inf).all()
    assert (model(images).pred_score == math.inf).all()
    images[3, 1, 2, 2] = math.nan
    for function in (model, model.log_prob, model.bits_per_dim):
        with pytest.raises(ValueError, match=r"Images \[3\] of this batch have NaN"):
            function(images)


# -- empty batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_images_have_no_densities_and_change_nothing(name, channels):
    detector = pixel_flow(channels=channels, **ARCHITECTURES[name])
    model, images = detector.model, torch.rand(0, 3, 12, 12)
    before = {key: value.clone() for key, value in model.state_dict().items() if "num_batches" not in key}
    for mode in (True, False):
        model.train(mode)
        for result in (model.log_prob(images), model.bits_per_dim(images), model(images).pred_score):
            assert result.shape == (0,)
        assert model.sample(0).shape == (0, channels, 12, 12)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    images = torch.rand(2, 3, 12, 12)
    assert model.log_prob(images).isfinite().all()


@pytest.mark.parametrize("score", SCORES)
def test_no_images_have_no_scores(score):
    model = pixel_flow(score=score).model.eval()
    model.scorer.fit(model, [model.inputs(torch.rand(40, 1, 12, 12))])
    assert model(torch.rand(0, 1, 12, 12)).pred_score.shape == (0,)


@pytest.mark.parametrize("build", [embedding_flow, feature_map_flow])
def test_no_images_have_no_densities_of_features_and_no_labels(build):
    detector, images = on_features(build)
    model, maps = detector.model, detector(images).anomaly_map
    detector.post_processor.calibrate(torch.rand(30), None if maps is None else torch.rand(30))
    for result in (model.log_prob(images[:0]), model.bits_per_dim(images[:0]), detector(images[:0]).pred_label):
        assert result.shape == (0,)
    if maps is not None:
        assert detector(images[:0]).anomaly_map.shape == detector(images[:0]).pred_mask.shape == (0, *maps.shape[1:])


def test_a_batch_without_images_has_no_p_values():
    post_processor = ConformalPostProcessor()
    post_processor.calibrate(torch.rand(30))
    batch = ImageBatch(image=torch.rand(0, 3, 2, 2), pred_score=torch.rand(0))
    post_processor.post_process_batch(batch)
    assert batch.p_value.shape == batch.pred_label.shape == (0,)


# -- other images than floats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [pixel_flow, embedding_flow, feature_map_flow])
def test_a_detector_that_is_called_with_bytes_says_what_it_takes(build):
    detector = build().eval()
    images = torch.randint(256, (2, detector.hparams.get("channels", 3), 50, 40), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got torch.uint8: divide 8 bits by 255"):
        detector(images)
