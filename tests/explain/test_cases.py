# SPDX-License-Identifier: Apache-2.0
"""Single images: what their scores are made of, where, and what normal images look like there."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from model_helpers import data, embedding_flow, feature_map_flow
from PIL import Image

from anomalib_flowood.explain import explain
from anomalib_flowood.explain.cases import Chosen, bars, choose, others
from anomalib_flowood.explain.images import ImageSet
from anomalib_flowood.explain.numbers import Scored

SIDE = 48


def photographs(count, seed):
    """Smooth images that differ in light and colour."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 0.4 + 0.3
    return torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear").clamp(0, 1)


@pytest.fixture(scope="module")
def maps():
    """A detector of maps, fitted to 24 images."""
    torch.manual_seed(0)
    detector = feature_map_flow(coupling_layers=0)
    with torch.no_grad():
        features = detector.model.extract(detector.pre_processor.transform(photographs(24, 0)))
        detector.model.fit_features(features)
        detector.model.fit_whitening(detector.model.prepare(features))
    detector.model.fitted.fill_(True)
    return detector.eval()


@pytest.fixture(scope="module")
def embeddings():
    """A detector of embeddings, fitted to 16 images: of one kind."""
    torch.manual_seed(0)
    detector = embedding_flow(coupling_layers=0, image_size=(SIDE, SIDE))
    with torch.no_grad():
        detector.model.fit_features(detector.model.extract(detector.pre_processor.transform(photographs(16, 0))))
    detector.model.fitted.fill_(True)
    return detector.eval()


def outside():
    images = photographs(8, 3)
    images[:4, :, 10:20, 30:40] = torch.rand(4, 3, 10, 10, generator=torch.Generator().manual_seed(1)).round()
    return images


@torch.no_grad()
def test_shares_sum_to_the_score_and_directions_to_the_map(maps):
    inputs = maps.pre_processor.transform(outside())
    views = maps.model.layer_views(inputs)
    shares = [share for view in views for share in view.shares.values()]
    names = [name for view in views for name in view.shares]
    # Two maps, one of them as a whole, distances of the finer one, and mean features.
    assert len(names) == len(set(names)) == 6
    predicted = maps.model(inputs)
    torch.testing.assert_close(sum(shares), predicted.pred_score)
    for view, layer, anomaly_map in zip(
        views, maps.model.layers, maps.model.layer_maps(maps.model.inputs(inputs)), strict=True
    ):
        torch.testing.assert_close(0.5 * view.whitened.square().sum(1), anomaly_map, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(view.map, layer.standardise(anomaly_map), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_contributions_sum_to_the_density(embeddings):
    inputs = embeddings.pre_processor.transform(outside())
    found = embeddings.model.contributions(inputs)
    assert found.nats.shape == found.coordinates.shape == (8, len(found.names))
    assert list(dict.fromkeys(found.parts)) == embeddings.model.embedding.part_names
    assert set(found.parts) > {"pooled features"}
    beyond = torch.tensor([name.startswith("beyond") for name in found.names])
    assert found.coordinates[:, beyond].isnan().all()
    assert found.coordinates[:, ~beyond].isfinite().all()
    likely = -embeddings.model.log_prob(inputs)
    differences = likely - likely[0]
    torch.testing.assert_close(found.nats.sum(1) - found.nats[0].sum(), differences, rtol=1e-3, atol=0.05)


def test_the_page_takes_scores_of_maps_apart(maps, tmp_path):
    sets = {"parts": photographs(6, 2), "<b>holes</b> -1": outside()}
    page = explain(maps, sets, tmp_path)
    cases = json.loads((tmp_path / "explain.json").read_text())["cases"]
    assert [case["set"] for case in cases] == ["<b>holes</b> -1"] * 5 + ["parts"]
    with torch.no_grad():
        inputs = maps.pre_processor.transform(sets["<b>holes</b> -1"])
        scores = maps.model(inputs).pred_score
        normal = maps.model.layer_views(maps.pre_processor.transform(sets["parts"]))
        views = maps.model.layer_views(inputs)
    order = scores.argsort()
    expected = scores[torch.cat([order.flip(0)[:2], order[:3]])].tolist()
    assert [case["score"] for case in cases[:5]] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for case in cases:
        assert sum(case["shares"].values()) == pytest.approx(case["score"], rel=1e-4, abs=1e-4)
        shares = [direction["share"] for direction in case["directions"]]
        assert 0 < sum(shares) <= 1
        assert shares == sorted(shares, reverse=True)

    # The most anomalous position of the first, and the nearest patch of all normal ones to it.
    case, image = cases[0], int(order[-1])
    best = max(views, key=lambda view: float(view.map[image].max()))
    assert case["layer"] == best.name
    row, column = case["position"]
    assert float(best.map[image, row, column]) == float(best.map[image].max())
    others_ = (
        next(view for view in normal if view.name == best.name)
        .descriptors.movedim(1, -1)
        .reshape(-1, best.descriptors.shape[1])
    )
    distances = (others_ - best.descriptors[image, :, row, column]).norm(dim=1)
    assert case["nearest_patch_distance"] == pytest.approx(float(distances.min()), rel=1e-4)
    assert case["usual_patch_distance"] > 0
    top = best.whitened[image, :, row, column].square().argmax()
    assert case["directions"][0]["direction"] == int(top) + 1

    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;holes&lt;/b&gt; -1, among the most anomalous outside" in text
    assert "<b>holes" not in text
    assert text.count("the nearest normal patch") >= 6


def test_an_image_is_compared_with_normal_ones_of_its_kind(tmp_path):
    torch.manual_seed(0)
    detector = feature_map_flow(coupling_layers=0, kind_images=8)
    dark, light = photographs(24, 0) * torch.tensor([0.1, 0.1, 1.0])[:, None, None], 0.5 + 0.5 * photographs(24, 1)
    images = detector.pre_processor.transform(torch.cat([dark, light]))
    with torch.no_grad():
        features = detector.model.extract(images)
        detector.model.fit_features(features)
        assert detector.model.fit_whitening(detector.model.prepare(features)) == [24, 24]
    detector.model.fitted.fill_(True)
    sets = {"parts": torch.cat([dark[:6], light[:6]]), "defects": torch.cat([dark[6:9].flip(2), light[6:9].flip(2)])}
    page = explain(detector.eval(), sets, tmp_path)
    assert "are those of its kind of image" in page.read_text(encoding="utf-8")
    with torch.no_grad():
        normal, views = (detector.model.layer_views(detector.pre_processor.transform(part)) for part in sets.values())
    assert views[0].kind.tolist() == [0] * 3 + [1] * 3
    scores = torch.stack([share for view in views for share in view.shares.values()]).sum(0)
    for case in json.loads((tmp_path / "explain.json").read_text())["cases"]:
        if case["set"] == "parts":
            continue
        image = int((scores - case["score"]).abs().argmin())
        number = next(place for place, view in enumerate(views) if view.name == case["layer"])
        own = normal[number].kind == views[number].kind[image]
        row, column = case["position"]
        patches = normal[number].descriptors[own].flatten(2).movedim(1, 2).flatten(0, 1)
        distances = (patches - views[number].descriptors[image, :, row, column]).norm(dim=1)
        assert case["nearest_patch_distance"] == pytest.approx(float(distances.min()), rel=1e-3)


def test_an_outlier_is_compared_with_inside_images_of_its_kind(tmp_path):
    torch.manual_seed(0)
    detector = embedding_flow(coupling_layers=0, kind_images=8, image_size=(SIDE, SIDE))
    dark, light = photographs(24, 0) * torch.tensor([0.1, 0.1, 1.0])[:, None, None], 0.5 + 0.5 * photographs(24, 1)
    transform, model = detector.pre_processor.transform, detector.model
    with torch.no_grad():
        assert model.fit_features(model.extract(transform(torch.cat([dark, light])))) == [24, 24]
    model.fitted.fill_(True)
    sets = {"parts": torch.cat([dark[:6], light[:6]]), "defects": torch.cat([dark[6:9].flip(2), light[6:9].flip(2)])}
    page = explain(detector.eval(), sets, tmp_path)
    assert "that an image is compared with, are those of its kind of image" in page.read_text(encoding="utf-8")
    with torch.no_grad():
        normal, defects = (model.contributions(transform(part)) for part in sets.values())
        scores = model(transform(sets["defects"])).pred_score
    assert defects.kind.tolist() == [0] * 3 + [1] * 3
    for case in json.loads((tmp_path / "explain.json").read_text())["cases"]:
        if case["set"] == "parts":
            continue
        image = int((scores - case["score"]).abs().argmin())
        own = normal.nats[normal.kind == defects.kind[image]]
        excess = float((defects.nats[image] - own.mean(0)).sum())
        assert sum(case["parts_nats"].values()) == pytest.approx(excess, rel=1e-3, abs=1e-2)


def test_a_detector_of_tiles_is_explained_without_its_layers(tmp_path):
    detector = feature_map_flow(coupling_layers=0, image_size=(96, 96), tile_size=(48, 48))
    images = torch.nn.functional.interpolate(photographs(8, 0), (96, 96))
    with torch.no_grad():
        prepared = torch.stack([detector.pre_processor.transform(image) for image in images])
        features = detector.model.extract(prepared)
        detector.model.fit_features(features)
        detector.model.fit_whitening(detector.model.prepare(features))
    detector.model.fitted.fill_(True)
    page = explain(detector.eval(), {"parts": images[:4], "holes": images[4:] * 0.4}, tmp_path)
    assert "What the score is made of" not in page.read_text(encoding="utf-8")
    assert "cases" not in json.loads((tmp_path / "explain.json").read_text())


def test_an_image_is_not_its_own_nearest(maps, embeddings, tmp_path):
    sets = {"parts": photographs(6, 2), "holes": outside()}
    explain(maps, sets, tmp_path / "maps")
    inside = json.loads((tmp_path / "maps" / "explain.json").read_text())["cases"][-1]
    assert inside["nearest_patch_distance"] > 1e-3
    explain(embeddings, sets, tmp_path / "embeddings")
    inside = json.loads((tmp_path / "embeddings" / "explain.json").read_text())["cases"][-1]
    assert len(inside["nearest_cosine"]) == 3
    assert max(inside["nearest_cosine"]) < 0.9999


def test_the_page_takes_densities_of_embeddings_apart(embeddings, tmp_path):
    sets = {"parts": photographs(6, 2), "holes": outside()}
    page = explain(embeddings, sets, tmp_path)
    cases = json.loads((tmp_path / "explain.json").read_text())["cases"]
    assert len(cases) == 6
    with torch.no_grad():
        usual = embeddings.model.contributions(embeddings.pre_processor.transform(sets["parts"])).nats.mean(0)
        inputs = embeddings.pre_processor.transform(sets["holes"])
        found = embeddings.model.contributions(inputs)
        image = int(embeddings.model(inputs).pred_score.argmax())
        near = (
            embeddings.model.embed(inputs)[image]
            @ embeddings.model.embed(embeddings.pre_processor.transform(sets["parts"])).T
        )
    excess = found.nats[image] - usual
    assert sum(cases[0]["parts_nats"].values()) == pytest.approx(float(excess.sum()), rel=1e-3, abs=0.05)
    real = torch.where(found.coordinates[image].isfinite(), excess, -torch.inf)
    assert cases[0]["directions"][0]["nats"] == pytest.approx(float(real.max()), rel=1e-3, abs=1e-3)
    assert cases[0]["nearest_cosine"] == pytest.approx(near.sort(descending=True).values[:3].tolist(), abs=1e-4)
    assert "What makes it less likely than normal images" in page.read_text(encoding="utf-8")


def test_normal_images_are_those_of_the_training(tmp_path, monkeypatch):
    from anomalib_flowood.explain import explanation

    taken = []
    take = explanation.normal_images
    monkeypatch.setattr(explanation, "normal_images", lambda *args: (taken.append(take(*args)), taken[0])[1])
    datamodule = data(tmp_path)
    datamodule.setup()
    detector = feature_map_flow(coupling_layers=0)
    images = torch.stack([datamodule.train_data[row].image.expand(3, -1, -1) for row in range(24)])
    with torch.no_grad():
        features = detector.model.extract(detector.pre_processor.transform(images))
        detector.model.fit_features(features)
        detector.model.fit_whitening(detector.model.prepare(features))
    detector.model.fitted.fill_(True)
    page = explain(detector, datamodule, tmp_path / "page", max_images=4)
    (normal,) = taken
    assert (normal.name, len(normal.inputs)) == ("training", 16)
    places = np.unique(np.linspace(0, len(datamodule.train_data) - 1, 16).round().astype(int))
    first = datamodule.train_data[int(places[1])].image
    expected = detector.pre_processor.transform(first.as_subclass(torch.Tensor))
    torch.testing.assert_close(normal.inputs[1], expected)
    assert "patch of 16 training images" in page.read_text()


def scored(name, scores, outside):
    count = len(scores)
    images = torch.rand(count, 3, 4, 4)
    return Scored(ImageSet(name, outside, images, images), *torch.zeros(2, count), torch.tensor(scores), None, [])


def test_few_images_are_chosen_once():
    parts = [scored("in", [0.5, 0.1], False), scored("a", [3.0, 1.0], True), scored("b", [2.0], True)]
    chosen = list(choose(parts))
    assert [item.score for item in chosen] == pytest.approx([1.0, 2.0, 3.0, 0.5])
    assert [item.set for item in chosen] == ["a", "b", "a", "in"]
    one = Chosen("", "in", 0.5, parts[0].images.images[0], parts[0].images.inputs[:1])
    assert others(one, parts[0].images).tolist() == [False, True]
    alone = ImageSet("in", False, parts[0].images.images[:1], parts[0].images.inputs[:1])
    assert others(one, alone).tolist() == [True]


def test_bars_are_in_order_and_within_bounds():
    found = bars({"a": -2.0, "b": 4_000.0, "c": 0.5}, " nats")
    assert [(bar.name, bar.text) for bar in found] == [("b", "+4,000 nats"), ("c", "+0.5 nats"), ("a", "−2 nats")]
    assert all(-1 <= bar.share <= 1 for bar in found)
    assert bars({"a": 0.0})[0].share == 0
    assert bars({}) == []


class Elements(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.found = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_fetches_nothing_and_is_dark_where_the_system_is(maps, tmp_path):
    page = explain(maps, {"parts": photographs(3, 2), "holes": outside()}, tmp_path)
    elements = Elements(page).found
    for _, attributes in elements:
        for name in ("src", "href", "srcset"):
            assert not re.match(r"[a-z]+:(?!image/|,)|//", attributes.get(name, ""))
    sources = [attributes for tag, attributes in elements if tag == "source"]
    assert [source["media"] for source in sources] == ["screen and (prefers-color-scheme: dark)"]
    (policy,) = [attributes["content"] for tag, attributes in elements if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'")
    light, dark = (
        np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("histograms.png", sources[0]["srcset"])
    )
    assert light.shape == dark.shape
    assert np.median(light) > 250
    assert np.median(dark) < 40
    for tag, attributes in elements:
        if tag == "svg":
            assert attributes["aria-label"]
