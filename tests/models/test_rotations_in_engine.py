# SPDX-License-Identifier: Apache-2.0
"""Few training images that lie anyhow count in each rotation; others, and many, do not."""

import logging

import numpy as np
import pytest
import torch
from model_helpers import embedding_flow, engine, feature_map_flow
from PIL import Image
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_flowood import OneClass
from anomalib_flowood.models.components import rotations
from anomalib_flowood.models.components.folds import folds

DETECTORS = {"embedding_flow": embedding_flow, "feature_map_flow": feature_map_flow}


TURNS = {"upright": (0,), "either way": (0, 2), "anyhow": (0, 1, 2, 3)}


def parts(folder, *, lying: str = "anyhow", count: int = 40, size: tuple[int, int] = (48, 48)):
    """Photographs of a part with a bright side, upright, or turned by half a circle or by quarters of one."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("test", 20)):
        (folder / split / "good").mkdir(parents=True)
        for i in range(number):
            pixels = rng.normal(90, 15, (*size, 3))
            pixels[: size[0] // 3] += 100 + rng.normal(0, 10)
            quarters = rng.choice(TURNS[lying])
            image = Image.fromarray(np.rot90(pixels, quarters).clip(0, 255).astype(np.uint8))
            image.save(folder / split / "good" / f"{i:03}.png")
    return OneClass(folder, "good", val_split_ratio=0.25)


@pytest.fixture
def seen(monkeypatch):
    """What :meth:`keep_reference` and :meth:`fit_features` get, and how many images the backbone is shown."""
    found = {"images": 0}

    def watch(detector):
        fit, extract, keep = detector.fit_features, detector.extract_training, detector.keep_reference
        detector.fit_features = lambda features, copies: (found.update(rows=len(features[0])), fit(features, copies))
        detector.keep_reference = lambda features, copies: (
            found.update(reference=len(features[0]), copies=copies), keep(features, copies)
        )  # fmt: skip

        def counting(images, batch, total):
            found["images"] += len(images)
            return extract(images, batch, total)

        detector.extract_training = counting
        return detector

    found["watch"] = watch
    return found


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(("lying", "copies"), [("anyhow", 4), ("upright", 1)])
def test_what_lies_anyhow_is_fitted_to_in_every_rotation(name, lying, copies, tmp_path, seen, caplog):
    caplog.set_level(logging.INFO)
    detector = seen["watch"](DETECTORS[name](coupling_layers=0, rotations=True))
    engine(tmp_path).fit(detector, datamodule=parts(tmp_path / "parts", lying=lying))
    assert seen["images"] == 4 * 30
    assert seen["rows"] == copies * 30
    if name == "feature_map_flow":
        assert (seen["reference"], seen["copies"]) == (copies * 30, copies)
    assert f"Each is fitted to in {copies} rotation" in caplog.text
    assert len(detector.post_processor.calibration) == 10


def test_other_rotations_than_those_of_the_training_images_are_then_normal(tmp_path):
    """Of 8 images not every rotation has one; upright ones alone are fitted to where nothing is turned."""
    module = parts(tmp_path / "parts", count=8)
    shown = torch.stack([item.image for item in _items(module)])
    spread = {}
    for turned in (False, True):
        torch.manual_seed(0)
        detector = embedding_flow(coupling_layers=0, rotations=turned)
        engine(tmp_path).fit(detector, datamodule=module)
        detector.eval()
        scores = torch.stack([detector(shown.rot90(quarters, (2, 3))).pred_score for quarters in range(4)])
        spread[turned] = float(scores.std(0).mean() / scores.mean(0).std())
    assert spread[True] < 0.7 * spread[False]


def _items(module):
    module.setup()
    return [module.test_data[number] for number in range(6)]


@pytest.mark.parametrize(
    ("arguments", "size", "times"),
    [
        ({"rotations": False}, (48, 48), 1),
        ({"image_size": (48, 64)}, (48, 64), 2),
        ({"tile_size": (32, 32)}, (48, 48), 1),
    ],
    ids=["off", "not square", "tiles"],
)
def test_rotations_that_are_tried(arguments, size, times, tmp_path, seen):
    detector = seen["watch"](feature_map_flow(**{"coupling_layers": 0, "rotations": True, **arguments}))
    engine(tmp_path).fit(detector, datamodule=parts(tmp_path / "parts", lying="upright", count=12, size=size))
    assert seen["images"] == times * 9


@pytest.mark.parametrize(("lying", "tried"), [("upright", 1), ("either way", 2), ("anyhow", 4)])
def test_turns_that_clearly_do_not_fit_a_sample_are_not_tried_with_all(lying, tried, tmp_path, seen, caplog):
    caplog.set_level(logging.INFO)
    module = parts(tmp_path / "parts", lying=lying, count=172)
    detector = seen["watch"](embedding_flow(coupling_layers=0, rotations=True))
    engine(tmp_path).fit(detector, datamodule=module)
    assert seen["images"] == tried * 129
    assert seen["rows"] == tried * 129
    rotations_tried = f"{tried} rotation{'s' if tried > 1 else ''} will be tried"
    assert (rotations_tried in caplog.text) == (tried < 4)


def test_many_images_are_seen_once(tmp_path, seen, monkeypatch):
    monkeypatch.setattr("anomalib_flowood.models.EmbeddingFlow.few_images", 8)
    detector = seen["watch"](embedding_flow(coupling_layers=0, rotations=True))
    engine(tmp_path).fit(detector, datamodule=parts(tmp_path / "parts", count=12))
    assert seen["images"] == seen["rows"] == 9


def test_who_augments_has_chosen(tmp_path, seen):
    module = parts(tmp_path / "parts", count=12)
    module.train_augmentations = RandomHorizontalFlip()
    detector = seen["watch"](embedding_flow(coupling_layers=0, rotations=True))
    engine(tmp_path).fit(detector, datamodule=module)
    assert seen["rows"] == 9


@pytest.mark.parametrize("name", DETECTORS)
def test_a_trained_flow_trains_on_all_rotations_and_resumes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(rotations, "LIMIT", 1.0)
    module = parts(tmp_path / "parts", count=16)
    states = []
    for way in ("whole", "resumed"):
        torch.manual_seed(0)
        run = engine(tmp_path / way, max_epochs=4 if way == "whole" else 2)
        detector = DETECTORS[name](rotations=True)
        run.fit(detector, datamodule=module)
        assert len(run.trainer.train_dataloader.dataset) == 4 * 12
        if way == "resumed":
            path = run.trainer.checkpoint_callback.best_model_path
            detector = DETECTORS[name](rotations=True)
            engine(tmp_path / way, max_epochs=4).fit(detector, datamodule=module, ckpt_path=path)
        states.append(detector.model.state_dict())
    whole, resumed = states
    assert whole.keys() == resumed.keys()
    assert all(torch.isfinite(value).all() for value in resumed.values() if value.is_floating_point())
    before_the_flow = [key for key in whole if key.startswith("embedding.") or ".subspace." in key]
    assert before_the_flow
    assert all(torch.equal(whole[key].nan_to_num(), resumed[key].nan_to_num()) for key in before_the_flow)


def test_copies_of_an_image_are_on_one_side_of_a_fold():
    scored = []
    for rest, part in folds(4 * 11, 4):
        assert not {int(row) // 4 for row in rest} & {int(row) // 4 for row in part}
        assert len(rest) + len(part) == 44
        assert part.unflatten(0, (-1, 4)).diff(dim=1).eq(1).all()  # the image itself, then its copies
        scored += part[::4].tolist()
    assert sorted(scored) == list(range(0, 44, 4))
