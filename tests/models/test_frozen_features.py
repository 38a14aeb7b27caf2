# SPDX-License-Identifier: Apache-2.0
import errno
import inspect
import logging
import os
import weakref
from itertools import chain

import pytest
import torch
from anomalib.data import Folder
from anomalib.metrics import AUPRO, Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from model_helpers import data, embedding_flow, engine, feature_map_flow
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, RandomHorizontalFlip, Resize

from anomalib_flowood import EmbeddingFlow, FeatureMapFlow
from anomalib_flowood.models.components import backbone_pre_processor
from anomalib_flowood.models.components.stored_features import FeatureDataset, FeatureStore, feature_loader


@pytest.mark.parametrize("cache_gib", [1.0, 0.0])
def test_stored_features_are_what_was_put_in(cache_gib, caplog):
    store, parts = FeatureStore(10, cache_gib), [torch.randn(4, 2, 3).half(), torch.randn(5, 2, 3).half()]
    with caplog.at_level(logging.WARNING):
        for part in parts:
            store.append((part, part.sum((1, 2))))
    assert torch.equal(store.features[0], torch.cat(parts))
    assert store.features[1].shape == (9,)
    assert ("kept in a temporary file" in caplog.text) == (cache_gib == 0)


@pytest.mark.parametrize("cache_gib", [1.0, 0.0])
def test_maps_are_stored_as_the_backbone_lays_them_out(cache_gib):
    store, maps = FeatureStore(5, cache_gib), torch.randn(5, 3, 2, 4).contiguous(memory_format=torch.channels_last)
    for part in maps.split(2):
        store.append((part, part.contiguous()))
    last, first = store.features
    assert torch.equal(last, maps)
    assert torch.equal(first, maps)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous()


def test_batches_of_stored_features_are_every_image_once_or_so_many_drawn_anew():
    numbers = torch.arange(10)
    dataset = FeatureDataset((numbers[:, None].float(), numbers), numbers % 2)

    def epoch(**arguments):
        loader = feature_loader(dataset, 4, **arguments)
        batches = list(loader)
        assert len(loader) == len(batches)
        for batch in batches:
            assert torch.equal(batch.features[0][:, 0].long(), batch.features[1])
            assert torch.equal(batch.gt_label, batch.features[1] % 2)
        return [batch.features[1].tolist() for batch in batches]

    assert epoch(shuffle=False) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert sorted(chain(*epoch(shuffle=True))) == list(range(10))
    for batches in (1, 7):
        drawn = epoch(shuffle=True, batches=batches)
        assert [len(batch) for batch in drawn] == [4] * batches
        assert drawn != epoch(shuffle=True, batches=batches)
    assert set(chain(*epoch(shuffle=True, batches=40))) == set(range(10))  # all of them, sooner or later


def test_a_fit_with_features_on_disk_is_the_same_fit(tmp_path):
    fitted = []
    for cache_gib in (1.0, 1e-6):
        torch.manual_seed(0)
        detector = feature_map_flow(cache_gib=cache_gib)
        engine(tmp_path).fit(detector, datamodule=data(tmp_path))
        fitted.append(detector)
    for ours, theirs in zip(fitted[0].model.flow.parameters(), fitted[1].model.flow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [embedding_flow, feature_map_flow])
def test_the_scores_that_calibrate_are_those_of_predictions(kind, tmp_path):
    """Stored features of half precision would move some by a thousand times as much."""
    detector, module = kind(max_epochs=1), data(tmp_path)
    run = engine(tmp_path)
    run.fit(detector, datamodule=module)
    predictions = run.predict(detector, dataloaders=module.val_dataloader())
    scores = torch.cat([batch.raw_score for batch in predictions]).sort().values
    torch.testing.assert_close(scores, detector.post_processor.calibration, rtol=1e-4, atol=1e-4)


def test_loaders_may_be_given_in_the_place_of_a_data_module(tmp_path):
    module = data(tmp_path)
    module.prepare_data()
    module.setup()
    fitted = []
    for training, validation in (
        (module.train_dataloader(), module.val_dataloader()),
        ([module.train_dataloader()], [module.val_dataloader()]),
    ):
        torch.manual_seed(0)
        detector = embedding_flow(max_epochs=1)
        engine(tmp_path).fit(detector, train_dataloaders=training, val_dataloaders=validation)
        assert len(detector.post_processor.calibration) == len(module.val_data)
        fitted.append(detector)
    for ours, theirs in zip(*(detector.model.parameters() for detector in fitted), strict=True):
        assert torch.equal(ours, theirs)


def test_several_loaders_are_refused(tmp_path):
    module = data(tmp_path)
    module.prepare_data()
    module.setup()
    loaders = [module.train_dataloader(), module.train_dataloader()]
    with pytest.raises(ValueError, match="takes one DataLoader of training images, got DataLoader, DataLoader"):
        engine(tmp_path).fit(embedding_flow(), train_dataloaders=loaders, val_dataloaders=module.val_dataloader())


@pytest.fixture
def count_backbone_images(monkeypatch):
    """The number of images that went through the backbone, in training and validation."""
    seen = []
    extract = EmbeddingFlow.extract

    def counting(self, images):
        seen.append(len(images))
        return extract(self, images)

    monkeypatch.setattr(EmbeddingFlow, "extract", counting)
    return seen


def test_the_backbone_sees_every_image_once_per_fit(tmp_path, count_backbone_images):
    detector, module = embedding_flow(max_epochs=4), data(tmp_path)
    engine(tmp_path).fit(detector, datamodule=module)
    assert sum(count_backbone_images) == len(module.train_data) + len(module.val_data) == 120


def test_with_augmentations_it_says_so_and_extracts_per_epoch(tmp_path, count_backbone_images, caplog):
    detector, module = embedding_flow(max_epochs=3), data(tmp_path, train_augmentations=RandomHorizontalFlip())
    engine(tmp_path).fit(detector, datamodule=module)
    train, val = len(module.train_data), len(module.val_data)
    assert sum(count_backbone_images) == val + (1 + 3) * train
    assert "Training augmentations are on" in caplog.text


@pytest.mark.parametrize("detector", [EmbeddingFlow, FeatureMapFlow])
def test_a_pre_processor_of_the_class_is_that_of_its_default_backbone(detector):
    backbone = inspect.signature(detector).parameters["backbone"].default
    made = detector.configure_pre_processor((240, 360)).transform
    assert str(made) == str(backbone_pre_processor(backbone, (240, 360)).transform)


@pytest.mark.parametrize("other", [True, False])
def test_a_normalisation_that_the_backbone_was_not_trained_with_is_named(other, tmp_path, caplog):
    mean = [0.5, 0.25, 0.125] if other else embedding_flow().model.backbone.pretrained_cfg["mean"]
    std = embedding_flow().model.backbone.pretrained_cfg["std"]
    transform = Compose([Resize((32, 32), antialias=True), Normalize(mean, std)])
    detector = embedding_flow(coupling_layers=0, pre_processor=PreProcessor(transform))
    engine(tmp_path).fit(detector, datamodule=data(tmp_path))
    assert ("normalises images with mean [0.5, 0.25, 0.125]" in caplog.text) == other


def test_limits_hold_for_the_extraction(tmp_path, count_backbone_images):
    trainer = engine(tmp_path, limit_train_batches=2, limit_val_batches=2)
    trainer.fit(embedding_flow(max_epochs=3), datamodule=data(tmp_path, val_split_ratio=0.3))
    assert sum(count_backbone_images) == 2 * 32 + 2 * 16
    assert trainer.trainer.global_step == 3 * 2


@pytest.mark.parametrize("new", [embedding_flow, feature_map_flow])
def test_a_share_of_the_batches_is_what_is_fitted_to_where_nothing_trains(new, tmp_path):
    detector, fitted = new(coupling_layers=0), []
    fit_features = detector.fit_features
    detector.fit_features = lambda features, *copies: (fitted.append(len(features[0])), fit_features(features, *copies))
    engine(tmp_path, limit_train_batches=0.5).fit(detector, datamodule=data(tmp_path, train_batch_size=20))
    assert fitted == [2 * 20]  # half of five batches


@pytest.mark.parametrize("augmented", [False, True])
def test_a_resumed_fit_fits_no_features_and_extracts_what_it_trains_on(augmented, tmp_path, count_backbone_images):
    module = data(tmp_path, train_augmentations=RandomHorizontalFlip() if augmented else None)
    run = engine(tmp_path)
    run.fit(embedding_flow(max_epochs=1), datamodule=module)
    path = run.trainer.checkpoint_callback.best_model_path
    count_backbone_images.clear()
    resumed = embedding_flow(max_epochs=3)
    resumed.fit_features = lambda features, copies: pytest.fail("what comes before the flow is in the checkpoint")
    engine(tmp_path).fit(resumed, datamodule=module, ckpt_path=path)
    train, val = len(module.train_data), len(module.val_data)
    assert sum(count_backbone_images) == val + (2 * train if augmented else train)


def test_features_that_are_prepared_are_let_go(tmp_path, monkeypatch):
    alive, extract_all = [], EmbeddingFlow._extract_all

    def watching(self, loader, limit, what, turns=1):
        if what == "validation":
            alive.extend(reference() for reference in references if reference() is not None)
        store, *known = extract_all(self, loader, limit, what, turns)
        references.extend(weakref.ref(column) for column in store._columns)
        return store, *known

    references: list = []
    monkeypatch.setattr(EmbeddingFlow, "_extract_all", watching)
    engine(tmp_path).fit(embedding_flow(max_epochs=1), datamodule=data(tmp_path))
    assert len(references) == 6  # pooled and the maps of two layers, of training and validation
    assert not alive


def test_one_budget_holds_for_all_features_that_are_stored_at_a_time(tmp_path, monkeypatch):
    taken: dict[int, float] = {}
    most = []
    allocate = FeatureStore._allocate

    def watching(store, features):
        columns = allocate(store, features)
        if store.taken_gib:
            key = id(store)
            taken[key] = store.taken_gib
            weakref.finalize(columns[-1], taken.pop, key, None)
        most.append(sum(taken.values()))
        return columns

    monkeypatch.setattr(FeatureStore, "_allocate", watching)
    states = []
    for cache_gib in (1.0, 0.9e-3):  # of the six stores the second fits beside the first no more
        most.clear()
        taken.clear()  # what the fit before still holds is not of this one
        torch.manual_seed(0)
        detector = feature_map_flow(cache_gib=cache_gib, max_epochs=1)
        engine(tmp_path / str(cache_gib)).fit(detector, datamodule=data(tmp_path))
        assert len(most) == 6
        assert 0 < max(most) <= cache_gib
        states.append((max(most), detector.state_dict()))
    (all_of_it, roomy), (part, tight) = states
    assert part < all_of_it
    assert all(torch.equal(value.nan_to_num(), tight[key].nan_to_num()) for key, value in roomy.items())


def test_a_disk_without_room_for_features_is_told_before_they_are_written(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"no room in .* GiB of features \(No space left on device\): set TMPDIR"):
        FeatureStore(10, 0.0).append((torch.zeros(2, 3),))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("build", [embedding_flow, feature_map_flow])
@pytest.mark.parametrize("what", ["training", "validation"])
def test_features_that_are_not_finite_are_refused_with_the_images(what, build, value, tmp_path, monkeypatch):
    module, detector = data(tmp_path), build()
    extract, seen = type(detector).extract, []

    def breaking(self, images):
        first, *others = extract(self, images)
        # 96 images in batches of 32, in FeatureMapFlow the same damaged, then validation
        if len(seen) == (2 if what == "training" else 6 if build is feature_map_flow else 3):
            first = first.index_fill(0, torch.tensor([5]), value)
        seen.append(len(images))
        return (first, *others)

    monkeypatch.setattr(type(detector), "extract", breaking)
    of = "32 training" if what == "training" else "16 validation"
    with pytest.raises(
        ValueError, match=rf"NaN or infinite features for 1 of {of} images \(.*ramps.*\).*weights whole"
    ):
        engine(tmp_path).fit(detector, datamodule=module)


@pytest.mark.parametrize("crop", [[], [CenterCrop(48)]])
def test_a_fit_judges_pixels_of_validation_images_by_their_masks_as_a_validation_does(crop, tmp_path):
    spots = 0.1 * torch.rand(40, 56, 64)
    spots[32:, 20:28, 20:28] = 1
    for number, image in enumerate((255 * spots).byte().numpy()):
        folders = [tmp_path / ("normal" if number < 32 else "spot")] + [tmp_path / "masks"] * (number >= 32)
        for folder, pixels in zip(folders, (image, image // 255 * 255), strict=False):
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    module = Folder(
        "spots", "normal", tmp_path, "spot", mask_dir="masks", val_split_mode="same_as_test", seed=0, num_workers=0
    )
    pre_processor = PreProcessor(Compose([Resize((60, 60) if crop else (48, 48)), *crop]))
    evaluator = Evaluator(val_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"])])
    detector = feature_map_flow(
        coupling_layers=0, pre_processor=pre_processor, post_processor=PostProcessor(), evaluator=evaluator
    )
    run = engine(tmp_path)
    run.fit(detector, datamodule=module)
    fitted = {name: value.clone() for name, value in detector.post_processor.named_buffers()}
    found = float(run.trainer.callback_metrics["AUPRO"])
    (metrics,) = run.validate(detector, datamodule=module, verbose=False)
    assert found == pytest.approx(metrics["AUPRO"], abs=1e-4)
    for name, value in detector.post_processor.named_buffers():
        assert bool(value.isfinite()), name
        torch.testing.assert_close(fitted[name], value, rtol=1e-3, atol=1e-3)
