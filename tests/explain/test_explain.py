# SPDX-License-Identifier: Apache-2.0
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from model_helpers import data, embedding_flow, feature_map_flow, pixel_flow, randomise_flow
from PIL import Image
from sklearn.exceptions import NotFittedError
from torch import nn

from anomalib_flowood import OneClass
from anomalib_flowood.explain import coadaptation, explain
from anomalib_flowood.explain.coupling_sections import DRAWS
from anomalib_flowood.explain.sections import TEMPERATURES
from anomalib_flowood.metrics import auroc

PIXEL_PICTURES = ["histograms", "latents", "scales", "shifts", "coadaptation", "samples"]


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.images, self.links, self.text, self.tags = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [value for name, value in attrs if tag == "img" and name == "src"]
        self.links += [value for name, value in attrs if tag == "a" and name == "href"]

    def handle_data(self, text):
        self.text += text


def images(count=6, channels=1, seed=0, brightness=1.0):
    return brightness * torch.rand(count, channels, 12, 12, generator=torch.Generator().manual_seed(seed))


def fitted(detector):
    randomise_flow(detector.model)
    detector.model.fitted.fill_(True)
    return detector


def check_page(page, names):
    shown = Page(page)
    assert shown.images == [f"{name}.png" for name in names]
    for link in [*shown.images, *shown.links]:
        assert (page.parent / link).is_file()
    for name in names:
        picture = np.asarray(Image.open(page.parent / f"{name}.png").convert("RGB"))
        assert min(picture.shape[:2]) > 100
        assert picture.std() > 5  # something is drawn
    assert shown.tags.count("figcaption") == len(names)
    return shown


@pytest.mark.parametrize("mask", ["checkerboard", "horizontal", "channel", "cycle"])
def test_a_pixel_flow_gets_all_pictures_and_the_right_numbers(mask, tmp_path):
    detector = fitted(pixel_flow(mask=mask, subnet="mlp"))
    sets = {"inside": images(), "bright <b>&$x$": images(5, seed=1), "dark": images(4, seed=2, brightness=0.3)}
    page = explain(detector, sets, tmp_path / "new" / "page")
    shown = check_page(page, PIXEL_PICTURES)
    assert "bright <b>&$x$" in shown.text
    assert "b" not in shown.tags
    assert "mean over the colours" not in shown.text
    drawn = detector.model.draw(min(8, len(sets["inside"])), 1.0, torch.Generator().manual_seed(0))
    assert f"Of the pixels, {((drawn < 0) | (drawn > 1)).float().mean():.0%} (T = 1)" in shown.text

    numbers = json.loads((page.parent / "explain.json").read_text(encoding="utf-8"))
    assert (numbers["detector"], numbers["inside"]) == ("PixelFlow", "inside")
    assert list(numbers["sets"]) == list(sets)
    with torch.no_grad():
        inside = detector.model.log_prob(sets["inside"])
        for name, part in sets.items():
            entry = numbers["sets"][name]
            log_prob = detector.model.log_prob(part)
            assert entry["images"] == len(part)
            assert entry["outside"] == (name != "inside")
            assert entry["log_likelihood"]["mean"] == pytest.approx(float(log_prob.mean()), rel=1e-5)
            assert entry["log_likelihood"]["std"] == pytest.approx(float(log_prob.std()), rel=1e-4)
            assert entry["log_likelihood"]["max"] == pytest.approx(float(log_prob.max()), rel=1e-5)
            assert entry["log_likelihood"]["median"] == pytest.approx(np.median(log_prob), rel=1e-5)
            bits = detector.model.bits_per_dim(part)
            assert entry["bits_per_dim"] == pytest.approx(float(bits.mean()), rel=1e-5)
            assert entry["bits_per_dim_median"] == pytest.approx(np.median(bits), rel=1e-5)
            if name == "inside":
                assert "auroc" not in entry
            else:
                labels = torch.tensor([0] * len(inside) + [1] * len(log_prob))
                assert entry["auroc"] == pytest.approx(auroc(-torch.cat([inside, log_prob]), labels))
            for kind, values in coadaptation(detector.model, part)._asdict().items():
                assert len(values) == 4
                assert entry[kind]["layers"] == pytest.approx(values, rel=1e-4)
                assert entry[kind]["mean_from_layer_2"] == pytest.approx(np.mean(values[1:]), rel=1e-4)


def test_colour_images_of_another_size_and_a_flow_that_overflows(tmp_path):
    detector = fitted(pixel_flow(channels=3, subnet="mlp"))
    sets = {"inside": torch.rand(3, 3, 20, 30), "outside": torch.rand(2, 3, 9, 9)}
    assert "mean over the colours" in check_page(explain(detector, sets, tmp_path), PIXEL_PICTURES).text

    with torch.no_grad():
        for parameter in detector.model.flow.parameters():
            parameter.mul_(1e30)
    page = explain(detector, sets, tmp_path)
    entry = json.loads((page.parent / "explain.json").read_text(encoding="utf-8"))["sets"]["outside"]
    assert entry["log_likelihood"]["mean"] is None  # JSON has no infinity
    assert entry["auroc"] == 0.5


def test_of_couplings_without_a_scale_there_is_none_to_draw(tmp_path):
    page = explain(fitted(pixel_flow(scale="none")), {"inside": images(3), "outside": images(3, seed=1)}, tmp_path)
    check_page(page, [name for name in PIXEL_PICTURES if name != "scales"])


def test_sets_of_one_image_have_no_coadaptation(tmp_path):
    sets = {"inside": images(3), "outside": images(1, seed=1)}
    page = explain(fitted(pixel_flow()), sets, tmp_path)
    entry = json.loads((page.parent / "explain.json").read_text(encoding="utf-8"))["sets"]["outside"]
    for kind in ("coadaptation", "prediction"):
        assert entry[kind] == {"layers": [None] * 4, "mean_from_layer_2": None}
    assert entry["log_likelihood"]["std"] is None
    assert "nan" not in Page(page).text


def test_where_convolutions_mix_pixels_the_page_says_why_there_is_no_coadaptation(tmp_path):
    sets = {"inside": images(3), "outside": images(3, seed=1)}
    texts = {}
    for architecture in ("glow", "realnvp"):
        page = explain(fitted(pixel_flow(architecture=architecture)), sets, tmp_path / architecture)
        texts[architecture] = Page(page).text
        assert "nan" not in texts[architecture]
    assert "1×1 convolutions mix the pixels" in texts["glow"]
    assert "1×1 convolutions" not in texts["realnvp"]


def test_one_coupling_has_no_mean_from_the_second_on(tmp_path):
    page = explain(fitted(pixel_flow(coupling_layers=1)), {"inside": images(3), "outside": images(3, seed=1)}, tmp_path)
    entry = json.loads((page.parent / "explain.json").read_text(encoding="utf-8"))["sets"]["outside"]
    assert entry["prediction"]["mean_from_layer_2"] is None
    assert "nan" not in Page(page).text


class Normalised(nn.Module):
    """An s,t-network with batch norm."""

    def __init__(self, net):
        super().__init__()
        self.net, self.norm = net, nn.BatchNorm2d(1)

    def forward(self, x):
        return self.net(self.norm(x))


def test_batch_norm_in_training_mode_leaves_the_detector_as_it_is(tmp_path, monkeypatch):
    from anomalib_flowood.explain import coupling_sections

    drawn = {}
    draw = coupling_sections.draw_latents
    monkeypatch.setattr(
        coupling_sections, "draw_latents", lambda blocks, path: (drawn.update(blocks), draw(blocks, path))
    )
    detector = pixel_flow(mask="checkerboard", subnet="resnet")
    sets = {"inside": images(6, brightness=0.5), "outside": images(seed=1)}
    explain(fitted(detector), sets, tmp_path)
    assert list(drawn["inside"][1]) == ["latent", f"mean of\n{DRAWS} draws"]

    for coupling in detector.model.flow.module_list[1:]:
        coupling.subnet = Normalised(coupling.subnet)
    detector.train()
    detector.model.flow.module_list[1].eval()  # a mode of its own, to be kept
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    modes = [module.training for module in detector.modules()]
    state, seeded = torch.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    shown = check_page(explain(detector, sets, tmp_path), PIXEL_PICTURES)
    assert "training mode" in shown.text
    assert not seeded  # generators of other devices, which nothing puts back
    assert [module.training for module in detector.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    after = detector.state_dict()
    assert any("running_mean" in name for name in after)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)

    pictured, latents = drawn["inside"]
    assert pictured.shape == (4, 3, 12, 12)
    plain, averaged, training = latents.values()
    found = []
    detector.eval().model.flow.register_forward_hook(lambda _module, _args, output: found.append(output[0]))
    places = [0, 2, 3, 5]
    with torch.no_grad():
        detector.model.log_prob(sets["inside"][places])
        torch.testing.assert_close(plain, found.pop()[:, 0])
        detector.train().model.log_prob(sets["inside"])
        torch.testing.assert_close(training, found.pop()[places, 0])
        assert not torch.allclose(training, plain)
    # The draws' mean is near the latent of the mean noise, without being it.
    assert 0 < float((averaged - plain).abs().mean()) < 0.1


def test_samples_are_the_flows(tmp_path, monkeypatch):
    from anomalib_flowood.explain import sections

    drawn = {}
    draw = sections.draw_images
    monkeypatch.setattr(
        sections, "draw_images", lambda rows, names, path: (drawn.update(rows), draw(rows, names, path))
    )
    detector = fitted(pixel_flow())
    explain(detector, {"inside": images(20), "outside": images(seed=1)}, tmp_path)
    real, *samples = drawn.values()
    assert real.shape == (8, 3, 12, 12)
    for temperature, drawn_samples in zip(TEMPERATURES, samples, strict=True):
        expected = detector.model.sample(8, temperature, torch.Generator().manual_seed(0))
        torch.testing.assert_close(drawn_samples, expected)


def test_a_data_modules_sets_are_its_sources(tmp_path):
    detector = fitted(pixel_flow())
    datamodule = data(tmp_path)
    page = explain(detector, datamodule, tmp_path / "page", max_images=7)
    numbers = json.loads((page.parent / "explain.json").read_text(encoding="utf-8"))
    assert numbers["inside"] == "ramps"
    assert {name: entry["images"] for name, entry in numbers["sets"].items()} == {"ramps": 7, "squares": 7}
    test = datamodule.test_data
    rows = [row for row in range(len(test)) if test[row].source == "squares"]
    chosen = [rows[place] for place in np.linspace(0, len(rows) - 1, 7).round().astype(int)]
    with torch.no_grad():
        log_prob = detector.model.log_prob(torch.stack([test[row].image for row in chosen]))
    assert numbers["sets"]["squares"]["log_likelihood"]["mean"] == pytest.approx(float(log_prob.mean()), rel=1e-5)


def image_folders(folder, **shades):
    for name, shade in shades.items():
        (folder / name).mkdir(parents=True)
        for number in range(5):
            size = (16 + number, 20)  # files differ in size
            pixels = np.random.default_rng(number).normal(shade, 20, (*size, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def test_folders_without_sources_are_inside_and_outside(tmp_path):
    image_folders(tmp_path, train=90, good=90, bad=200)
    datamodule = Folder(
        name="tiny", root=tmp_path, normal_dir="train", normal_test_dir="good", abnormal_dir="bad", num_workers=0,
        test_split_mode="from_dir", val_split_mode="same_as_test",
    )  # fmt: skip
    page = explain(fitted(pixel_flow()), datamodule, tmp_path / "page")
    numbers = json.loads((page.parent / "explain.json").read_text(encoding="utf-8"))
    assert {name: entry["images"] for name, entry in numbers["sets"].items()} == {"inside": 5, "outside": 5}


def test_many_outside_sets_are_in_the_numbers_and_some_in_the_pictures(tmp_path):
    names = ["good", *(f"bad_{number}" for number in range(8))]
    image_folders(tmp_path / "data" / "train", good=90)
    image_folders(tmp_path / "data" / "test", **{name: 20 * number for number, name in enumerate(names, start=1)})
    page = explain(fitted(pixel_flow()), OneClass(tmp_path / "data", "good", val_split_ratio=0.2), tmp_path / "page")
    numbers = json.loads((page.parent / "explain.json").read_text(encoding="utf-8"))
    assert sorted(numbers["sets"]) == sorted(names)
    assert "first 5 of the 8 outside sets" in check_page(page, PIXEL_PICTURES).text


def test_an_embedding_flow_shows_the_nearest_images_of_its_worst_mistakes(tmp_path, monkeypatch):
    from anomalib_flowood.explain import sections

    drawn = []
    draw = sections.draw_images
    monkeypatch.setattr(sections, "draw_images", lambda *args: (drawn.append(args), draw(*args)))
    detector = embedding_flow()
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(12, 3, 32, 32, generator=generator) * torch.rand(12, 3, 1, 1, generator=generator)
    # Two of the outside images are inside images, so that these are their own nearest ones.
    outside = torch.cat([inside[[7, 3]], torch.rand(7, 3, 32, 32, generator=generator).round()])
    with torch.no_grad():
        detector.model.fit_features(detector.model.extract(detector.pre_processor.transform(inside)))
    page = explain(fitted(detector), {"inside": inside, r"$\outside$": outside}, tmp_path)  # to Matplotlib a formula
    check_page(page, ["histograms", "nearest"])
    entry = json.loads((page.parent / "explain.json").read_text(encoding="utf-8"))["sets"][r"$\outside$"]
    assert "coadaptation" not in entry

    rows, headings, _ = drawn[0]
    with torch.no_grad():
        score = detector.model(detector.pre_processor.transform(outside)).pred_score
    worst = score.argsort()[:6].tolist()
    torch.testing.assert_close(rows["outside"], outside[worst])
    assert headings == [r"\$\outside\$" + f"\nscore {float(score[i]):.2f}" for i in worst]
    assert {0, 1} <= set(worst)
    for column, place in enumerate(worst):
        if place < 2:
            torch.testing.assert_close(rows["inside, nearest 1"][column], outside[place])


def test_a_feature_map_flow_gets_histograms_and_its_own_score(tmp_path):
    detector = feature_map_flow()
    inside, outside = torch.rand(2, 6, 3, 48, 48)
    outside = outside * 0.3
    with torch.no_grad():
        maps = detector.model.extract(detector.pre_processor.transform(torch.rand(12, 3, 48, 48)))
        detector.model.fit_features(maps)
    page = explain(fitted(detector), {"inside": inside, "outside": outside}, tmp_path)
    check_page(page, ["histograms"])
    entry = json.loads((page.parent / "explain.json").read_text(encoding="utf-8"))["sets"]["outside"]
    with torch.no_grad():
        scores = detector.model(detector.pre_processor.transform(torch.cat([inside, outside]))).pred_score
    assert entry["auroc"] == pytest.approx(auroc(scores, torch.tensor([0] * 6 + [1] * 6)))
    assert math.isfinite(entry["bits_per_dim"])


def test_errors_say_what_is_wrong(tmp_path):
    from anomalib.models import Padim

    sets = {"inside": images(), "outside": images(seed=1)}
    with pytest.raises(ValueError, match=r"Padim cannot be explained.*EmbeddingFlow, FeatureMapFlow, PixelFlow"):
        explain(Padim(backbone="test_resnet", layers=["layer1"], pre_trained=False, n_features=8), sets, tmp_path)
    with pytest.raises(NotFittedError, match="PixelFlow was never fitted"):
        explain(pixel_flow(), sets, tmp_path)
    detector = fitted(pixel_flow())
    with pytest.raises(ValueError, match="max_images must be at least 2"):
        explain(detector, sets, tmp_path, max_images=1)
    for given in ({"inside": images()}, {"inside": images(), "outside": images(0)}):
        with pytest.raises(ValueError, match="at least one outside set"):
            explain(detector, given, tmp_path)
    with pytest.raises(ValueError, match=r"'outside' are \(6, 2, 12, 12\)"):
        explain(detector, {"inside": images(), "outside": images(channels=2)}, tmp_path)
    datamodule = data(tmp_path)
    datamodule.setup("test")
    datamodule.test_data.samples = datamodule.test_data.samples.query("label_index == 0")
    with pytest.raises(ValueError, match=r"no outside \(anomalous\) images"):
        explain(detector, datamodule, tmp_path / "page")
    assert not (tmp_path / "page").exists()

    image_folders(tmp_path, good=90, bad=200)
    datamodule = Folder(
        name="tiny", root=tmp_path, normal_dir="good", normal_test_dir="good", abnormal_dir="bad", num_workers=0,
        test_split_mode="from_dir", val_split_mode="same_as_test",
    )  # fmt: skip
    with pytest.raises(ValueError, match="'inside' differ in size"):
        explain(fitted(pixel_flow(pre_processor=False)), datamodule, tmp_path)
