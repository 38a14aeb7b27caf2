# SPDX-License-Identifier: Apache-2.0
"""A detector that nobody here knows gets the pictures of what it offers, and no others."""

import gc
from functools import partial

import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import AnomalibModule
from FrEIA.framework import SequenceINN
from model_helpers import DETECTORS
from torch.nn import functional

from anomalib_flowood import flows
from anomalib_flowood.explain import explain
from anomalib_flowood.explain.sections import sections_of
from anomalib_flowood.models.components import FlowModel, FlowModule
from anomalib_flowood.models.components.capabilities import Contributions, LayerView, takes_scores


class ColourModel(FlowModel):
    """A flow on the mean colour of an image."""

    def __init__(self):
        new_flow = partial(flows.vector_flow, 3, coupling_layers=2, hidden_channels=4)
        super().__init__(new_flow, flows.StandardNormal(), 3, levels=1)

    def inputs(self, images):
        return (self.checked(images).mean((2, 3)),)


class Embedding(ColourModel):
    def embed(self, images):
        return 7 * images.mean((2, 3))  # of any length


class Drawing(ColourModel):
    def draw(self, n, temperature=1.0, generator=None):
        colours = 0.5 + temperature * 0.1 * torch.randn(n, 3, 1, 1, generator=generator)
        return colours.expand(-1, -1, 8, 8)


class Pixels(ColourModel):
    """A density of pixels without couplings."""

    reads_pixels = True

    def __init__(self):
        def new_flow():
            flow = SequenceINN(3, 8, 8)
            flow.append(flows.Logit)
            flow.append(flows.ActNorm)
            return flow

        FlowModel.__init__(self, new_flow, flows.StandardNormal(), 3 * 8 * 8, levels=256)

    def pixels(self, images):
        return images

    def inputs(self, images):
        return (flows.dequantize(self.pixels(images)),)


class Layered(ColourModel):
    """One that views an image as two layers of maps."""

    def layer_views(self, images):
        maps = images.mean(1, keepdim=True)
        parts = {"fine": maps, "coarse": functional.avg_pool2d(maps, 4)}
        return [
            LayerView(name, part, part, part[:, 0], {f"{name}: mean": part.mean((1, 2, 3))})
            for name, part in parts.items()
        ]

    def predict(self, inputs, scorer=None):
        del scorer
        return InferenceBatch(
            pred_score=inputs[0].mean(1), anomaly_map=inputs[0].mean(1)[:, None, None, None].expand(-1, 1, 8, 8)
        )


class Contributing(Embedding):
    """One whose −log p is a sum over directions."""

    def contributions(self, images):
        colours = images.mean((2, 3))
        return Contributions(["red", "green", "blue"], ["colour"] * 3, colours, colours.square())


def new_detector(model):
    class Colour(FlowModule, AnomalibModule):
        def __init__(self):
            super().__init__(pre_processor=False, evaluator=False)
            self.model = model()
            self.model.fitted.fill_(True)

    return Colour()


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Let go of the new classes: anomalib lists all that there are."""
    yield
    gc.collect()


@pytest.mark.parametrize(
    ("model", "pictures"),
    [
        (ColourModel, ["histograms"]),
        (Embedding, ["histograms", "nearest"]),
        (Drawing, ["histograms", "samples"]),
        (Pixels, ["histograms", "latents"]),
        (Layered, ["histograms"]),
        (Contributing, ["histograms", "nearest"]),
    ],
)
def test_a_new_detector_gets_the_pictures_of_what_it_offers(model, pictures, tmp_path):
    sets = {"inside": torch.rand(4, 3, 8, 8), "outside": torch.rand(3, 3, 8, 8)}
    page = explain(new_detector(model), sets, tmp_path).read_text()
    assert "What a trained Colour makes of images" in page
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == sorted(pictures)
    assert [page.count(f"{name}.png") > 0 for name in pictures] == [True] * len(pictures)
    assert "co-adaptation" not in page
    assert ("What the score is made of" in page) == (model is Layered)
    assert ("What makes it less likely than normal images" in page) == (model is Contributing)


@pytest.mark.parametrize(
    ("name", "doing", "scores"),
    [
        ("pixel_flow", ["histograms", "latents", "s", "t", "co-adaptation", "samples"], True),
        ("embedding_flow", ["histograms", "images", "directions"], True),
        ("feature_map_flow", ["histograms", "layers"], False),
    ],
)
def test_what_our_detectors_offer(name, doing, scores):
    detector = DETECTORS[name]()
    assert [section.doing.split()[-1] for section in sections_of(detector)] == doing
    assert takes_scores(type(detector)) == scores
