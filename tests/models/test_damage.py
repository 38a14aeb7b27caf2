# SPDX-License-Identifier: Apache-2.0
"""Damaged copies of training images weight the evidence of FeatureMapFlow, and change nothing else."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import engine, feature_map_flow, products
from test_kinds import model
from test_rotations_in_engine import parts

from anomalib_flowood.models.components.damage import DamagedImages, damaged
from anomalib_flowood.models.components.folds import folds
from anomalib_flowood.models.feature_map_flow.training_rows import TrainingRows


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60)
@given(height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 999), of_bytes=st.booleans())
def test_a_patch_of_the_image_is_pasted_and_nothing_else_changes(height, width, seed, of_bytes):
    image = torch.rand(3, height, width, generator=generator(seed))
    image = (255 * image).byte() if of_bytes else image
    before, found = image.clone(), damaged(image, generator(seed))
    assert torch.equal(image, before)
    assert found.shape == image.shape
    assert found.dtype == torch.float32
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    changed = (found != (image / 255 if of_bytes else image)).any(0).nonzero()
    if len(changed):
        rows, columns = (changed.amax(0) - changed.amin(0) + 1).tolist()
        assert rows * columns <= 0.3 * height * width + height + width  # rounded to whole pixels
        assert len(changed) == rows * columns or len(changed) > 0.9 * rows * columns  # but for pixels alike


def test_the_patch_is_the_images_own_brighter_or_darker_and_perhaps_mirrored():
    """Every column of a ramp is one value: what was pasted are columns of it, times one number."""
    ramp = torch.linspace(0.2, 0.6, 64).expand(1, 64, 64)
    mirrored = set()
    for seed in range(40):
        found = damaged(ramp, generator(seed))
        changed = (found != ramp)[0]
        row, *_ = changed.any(1).nonzero().flatten().tolist()
        patch = found[0, row][changed[row]]
        step = patch.diff()
        torch.testing.assert_close(step, step[:1].expand(len(step)), rtol=1e-3, atol=1e-6)
        factor = float(step.abs().mean() / ramp[0, 0].diff().mean())
        assert 0.79 < factor < 1.21
        mirrored.add(bool(step[0] < 0))
    assert mirrored == {False, True}


def test_the_same_image_is_always_damaged_alike(tmp_path):
    module = parts(tmp_path / "parts", count=6)
    module.setup()
    images = DamagedImages(module.train_data)
    assert len(images) == len(module.train_data)
    first, second = images[0], images[1]
    assert torch.equal(first.image, DamagedImages(module.train_data)[0].image)
    assert not torch.equal(first.image, module.train_data[0].image)
    assert first.image_path == module.train_data[0].image_path
    places = [(item.image != module.train_data[place].image).any(0) for place, item in enumerate((first, second))]
    assert not torch.equal(*places)


@settings(max_examples=30)
@given(images=st.integers(3, 300), copies=st.sampled_from([1, 4]), seed=st.integers(0, 9), share=st.floats(0, 1))
def test_damaged_copies_are_scored_where_their_images_are_and_never_fitted_to(images, copies, seed, share):
    of = (torch.rand(images, generator=generator(seed)) < share).nonzero().flatten()[:100]
    training = TrainingRows(images, copies, of)
    parts = list(training.folds())
    for seen, held_out, scored in parts:
        assert not set(training.image(scored).tolist()) & set(training.image(seen).tolist())
        assert set(training.image(held_out).tolist()) == set(training.image(scored).tolist())
        assert int(seen.max()) < training.fitted
    scored = training.scored
    assert torch.equal(scored, torch.cat([part for *_, part in parts]))
    own, copied = scored[scored < training.fitted], scored[scored >= training.fitted]
    assert (own % copies == 0).all()
    assert len(own.unique()) == len(own) >= min(images, 100)
    assert torch.equal(copied.sort().values - training.fitted, torch.arange(len(of)))  # all of them
    undamaged = training.undamaged(scored)
    assert torch.equal(training.image(scored[undamaged]), training.image(scored))
    assert (scored[undamaged] < training.fitted).all()


def test_images_that_are_asked_for_are_scored_first():
    first = torch.tensor([3, 50, 298])
    scored = torch.cat([held_out for _, held_out in folds(300, 1, first)])
    assert scored[:3].sort().values.tolist() == first.tolist()
    for given_first in (torch.arange(40), torch.zeros(0, dtype=torch.int64)):
        for (seen, held_out), plain in zip(folds(40, 1, given_first), folds(40), strict=True):
            assert torch.equal(seen, plain[0])
            assert torch.equal(held_out, plain[1])


@torch.no_grad()
@pytest.mark.parametrize("kind_images", [0, 10])
def test_they_change_the_weights_of_evidence_alone(kind_images):
    detector, images = model(kind_images=kind_images), products(20)
    maps = detector.extract(images)
    detector.fit_features(maps)
    inputs = detector.prepare(maps)
    detector.fit_whitening(inputs)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    copies = torch.stack([damaged(image, generator(place)) for place, image in enumerate(images)])
    of = torch.arange(len(images))
    detector.fit_whitening(inputs, damaged=(of, detector.inputs(copies)))
    now = detector.state_dict()
    differing = {name for name, value in before.items() if not torch.allclose(value, now[name], rtol=1e-9, atol=1e-9)}
    assert differing == {"evidence.shares"}
    torch.testing.assert_close(now["evidence.shares"].sum(-1), torch.ones((2,) if kind_images else ()).double())
    assert detector.evidence.shares.shape == ((2, 6) if kind_images else (6,))


@torch.no_grad()
def test_evidence_that_sees_no_damage_counts_for_nothing():
    """Copies that are not damaged at all are told by none; those of noise by all."""
    detector, images = model(kind_images=0), products(20)
    maps = detector.extract(images)
    detector.fit_features(maps)
    inputs, of = detector.prepare(maps), torch.arange(len(images))
    detector.fit_whitening(inputs)
    plain = detector.evidence.shares.clone()
    detector.fit_whitening(inputs, damaged=(of, inputs))
    torch.testing.assert_close(detector.evidence.shares, plain)
    noise = detector.inputs(torch.rand(images.shape, generator=generator(0), dtype=images.dtype))
    detector.fit_whitening(inputs, damaged=(of, noise))
    torch.testing.assert_close(detector.evidence.shares, plain)
    *layers, means = noise
    detector.fit_whitening(inputs, damaged=(of, (*inputs[:-1], means)))
    assert float(detector.evidence.shares[-1]) > 0.99
    assert layers


def observed(**kwargs):
    """A detector, and how many images were extracted for what."""
    detector, seen = feature_map_flow(coupling_layers=0, **kwargs), {}
    extract = detector._extract_all

    def counting(loader, limit, what, *turns):
        found = extract(loader, limit, what, *turns)
        seen[what] = len(found[0].features[0])
        return found

    detector._extract_all = counting
    return detector, seen


def test_a_fit_weights_its_evidence_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    detector, seen = observed(rotations=False)
    engine(tmp_path).fit(detector, datamodule=parts(tmp_path / "parts", lying="upright"))
    assert seen == {"training": 30, "damaged-copy": 30, "validation": 10}
    (said,) = [message for message in caplog.messages if "damaged copies" in message]
    assert said.count("%") == len(detector.model.evidence_names)
    assert detector._damaged is None
    weights = [*(weight for layer in detector.model.layers for weight in layer.weights(30)), 1.0]
    expected = torch.tensor(weights) / sum(weights)
    assert not torch.allclose(detector.model.evidence.shares, expected, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "trainer"),
    [({"tile_size": (24, 24)}, {}), ({}, {"limit_train_batches": 2})],
    ids=["tiles", "only some images"],
)
def test_evidence_has_fixed_weights_where_copies_of_all_images_are_not_to_be_had(settings, trainer, tmp_path):
    detector, seen = observed(rotations=False, **settings)
    module = parts(tmp_path / "parts", lying="upright")
    module.train_batch_size = 8
    engine(tmp_path, **trainer).fit(detector, datamodule=module)
    assert seen["training"] == (16 if trainer else 30)
    assert "damaged-copy" not in seen
    assert torch.isfinite(detector.model.evidence.shares).all()


def test_fewer_than_ten_images_weight_nothing(tmp_path):
    detector, seen = observed(rotations=False)
    engine(tmp_path).fit(detector, datamodule=parts(tmp_path / "parts", lying="upright", count=9))
    assert set(seen) == {"training", "validation"}
