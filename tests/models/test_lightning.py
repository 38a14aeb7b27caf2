# SPDX-License-Identifier: Apache-2.0
"""What Lightning's trainer offers beyond a plain fit, with its own `Trainer` and with loaders of a user's."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from model_helpers import DETECTORS, TRAINER, data, embedding_flow, feature_map_flow, idx_folder, pixel_flow
from PIL import Image
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor
from torchvision.transforms.v2 import Lambda

from anomalib_flowood import CrossDataset, FeatureMapFlow, PixelFlow, open_checkpoint, processes
from anomalib_flowood.models.components.export_description import identity
from anomalib_flowood.trainers import check_dealing

BUILD = {
    "pixels": pixel_flow,
    "pixels, typicality": lambda: pixel_flow(score="typicality"),
    "embeddings": lambda: embedding_flow(coupling_layers=2),
    "embeddings, untrained": lambda: embedding_flow(coupling_layers=0),
    "maps": lambda: feature_map_flow(coupling_layers=2),
    "maps, untrained": lambda: feature_map_flow(coupling_layers=0),
}


def trainer(tmp_path, **kwargs):
    return Trainer(**{**TRAINER, "logger": False, "default_root_dir": tmp_path, **kwargs})


def loaders(tmp_path):
    module = data(tmp_path)
    module.setup()
    return module


def fit(tmp_path, detector, training=None, validation=None, **kwargs):
    module, run = loaders(tmp_path), trainer(tmp_path, **kwargs)
    training = module.train_dataloader() if training is None else training
    run.fit(detector, training, module.val_dataloader() if validation is None else validation)
    return run


def differing(ours, theirs):
    state = theirs.state_dict()
    return [
        name
        for name, value in ours.state_dict().items()
        if value.shape != state[name].shape or not torch.equal(value.nan_to_num(), state[name].nan_to_num())
    ]


@pytest.mark.parametrize("kind", BUILD)
def test_a_checkpoint_that_is_written_by_steps_has_what_the_fit_has_ended_with(kind, tmp_path):
    saving = ModelCheckpoint(every_n_train_steps=1, save_last=True)
    detector = BUILD[kind]()
    fit(tmp_path, detector, callbacks=[saving])
    for path in (saving.best_model_path, saving.last_model_path):
        kept = open_checkpoint(path)
        assert not differing(detector, kept)
        assert len(kept.post_processor.calibration) == 24
    assert len([*tmp_path.rglob("*.ckpt")]) == 2


@pytest.mark.parametrize("limits", [{"val_check_interval": 0.5}, {"max_epochs": 3, "check_val_every_n_epoch": 2}])
def test_no_checkpoint_is_left_that_cannot_score(limits, tmp_path):
    detector = feature_map_flow(coupling_layers=2)  # 7 steps: no validation follows the last one
    run = fit(tmp_path, detector, **limits)
    assert not differing(detector, open_checkpoint(run.checkpoint_callback.best_model_path))


class Note(Callback):
    """Notes after each batch whether a score is ready, which would be one of earlier weights."""

    def __init__(self):
        self.ready = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        model = pl_module.model
        self.ready.append(bool(model.fitted) if isinstance(pl_module, FeatureMapFlow) else model.scorer.ready)


@pytest.mark.parametrize("kind", ["pixels, typicality", "maps"])
def test_weights_may_be_chosen_in_the_midst_of_an_epoch(kind, tmp_path):
    detector, note = BUILD[kind](), Note()
    saving = ModelCheckpoint(monitor="val_loss", save_top_k=-1)
    run = fit(tmp_path, detector, callbacks=[saving, note], val_check_interval=2 if kind == "maps" else 0.34)
    assert len(saving.best_k_models) >= 6
    for path in saving.best_k_models:
        kept = open_checkpoint(path)
        assert len(kept.post_processor.calibration) == 24
        assert kept.model.scorer.ready
    assert not any(note.ready)
    run.test(detector, loaders(tmp_path).test_dataloader(), ckpt_path="best", verbose=False)


@pytest.mark.parametrize("kind", ["pixels, typicality", "maps"])
def test_a_stop_in_the_midst_of_an_epoch_leaves_a_calibrated_detector(kind, tmp_path):
    stopping, detector = EarlyStopping("val_loss", mode="max", patience=1), BUILD[kind]()
    run = fit(tmp_path, detector, callbacks=[stopping], val_check_interval=0.34)
    assert run.global_step == 2 * run.val_check_batch
    assert len(detector.post_processor.calibration) == 24


class EndsTheFit(Callback):
    """Asks for a stop, and spoils the weights of some epochs."""

    def __init__(self, hook="on_train_start", epoch=0, spoilt=()):
        self.epoch, self.spoilt, self.weights = epoch, spoilt, []
        setattr(self, hook, self.stop)

    def stop(self, trainer, *args):
        trainer.should_stop = trainer.should_stop or trainer.current_epoch >= self.epoch

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.is_last_batch and trainer.current_epoch in self.spoilt:
            generator = torch.Generator().manual_seed(0)
            for parameter in pl_module.model.flow.parameters():
                parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.weights.append([parameter.detach().clone() for parameter in pl_module.model.flow.parameters()])


def test_a_stop_that_has_to_wait_for_min_epochs_does_not_bring_weights_back_before(tmp_path):
    found = []
    for epoch in (0, 10):
        torch.manual_seed(0)
        stop = EndsTheFit(epoch=epoch, spoilt=(1,))
        fit(tmp_path, pixel_flow(), callbacks=[stop], min_epochs=3, max_epochs=3)
        found.append(stop.weights)
    assert len(found[0]) == len(found[1]) == 9
    for ours, theirs in zip(*found, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_best_epoch_comes_back_where_a_stop_comes_behind_a_validation(tmp_path, caplog):
    detector, stop = pixel_flow(), EndsTheFit("on_validation_end", epoch=1, spoilt=(1,))
    with caplog.at_level("INFO"):
        run = fit(tmp_path, detector, callbacks=[stop], max_epochs=5)
    assert detector.kept_epoch.epoch == 1
    before, after = re.search(
        r"have ([\d.]+) bits per dimension \(mean\), ([\d.]+) after the last", caplog.text
    ).groups()
    assert float(after) > float(before)
    assert len(detector.post_processor.calibration) == 24
    assert not differing(detector, open_checkpoint(run.checkpoint_callback.best_model_path))


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("kind", ["pixels, typicality", "embeddings", "maps"])
def test_a_stop_behind_a_validation_leaves_a_calibrated_detector(kind, hook, tmp_path):
    detector = BUILD[kind]()
    run = fit(tmp_path, detector, callbacks=[EndsTheFit(hook)], max_epochs=5)
    assert run.current_epoch == 1
    kept = open_checkpoint(run.checkpoint_callback.best_model_path)
    assert len(kept.post_processor.calibration) == 24
    assert not differing(detector, kept)


class Own(PixelFlow):
    """With an optimizer and a scheduler of its own."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.model.flow.parameters(), lr=1e-4)
        return [optimizer], [CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-5)]


def test_a_scheduler_of_a_users_own_is_left_as_it_is(tmp_path):
    detector = Own(image_size=(12, 12), channels=1, coupling_layers=2, hidden_channels=8, bottleneck_dim=3)
    scheduler = fit(tmp_path, detector, max_epochs=2).lr_scheduler_configs[0].scheduler
    assert scheduler.T_max == 10
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-5 + (1e-4 - 1e-5) * (1 + math.cos(0.2 * math.pi)) / 2)


@pytest.mark.parametrize("kind", ["embeddings", "maps"])
def test_a_schedule_that_is_shorter_than_the_training_is_refused_at_its_start(kind, tmp_path):
    detector, asked, note = BUILD[kind](), [], Note()

    def configure_optimizers():
        asked.append(detector.trainer.estimated_stepping_batches)
        optimizer = torch.optim.Adam(detector.model.flow.parameters())
        scheduler = OneCycleLR(optimizer, max_lr=1e-3, total_steps=asked[0])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    detector.configure_optimizers = configure_optimizers
    if kind == "maps":  # whose epochs are of positions
        with pytest.raises(ValueError, match=r"OneCycleLR has total_steps 6, and the training 14, "):
            fit(tmp_path, detector, callbacks=[note])
        assert not note.ready
    else:
        assert fit(tmp_path, detector).global_step == asked[0]


@pytest.mark.parametrize(
    ("kind", "optimizer", "told"),
    [("embeddings, untrained", True, True), ("embeddings, untrained", False, False), ("embeddings", True, False)],
)
def test_an_optimizer_that_has_nothing_to_train_is_said_to(kind, optimizer, told, tmp_path, caplog):
    detector = BUILD[kind]()
    if optimizer:
        detector.configure_optimizers = lambda: torch.optim.Adam(detector.parameters())
    fit(tmp_path, detector)
    assert ("There is an optimizer, and EmbeddingFlow trains nothing" in caplog.text) == told


@pytest.mark.parametrize("kind", ["pixels", "maps"])
def test_the_learning_rate_ends_at_zero_where_batches_accumulate_by_the_epoch(kind, tmp_path):
    run = fit(tmp_path, BUILD[kind](), callbacks=[GradientAccumulationScheduler({0: 4, 1: 2})])
    scheduler = run.lr_scheduler_configs[0].scheduler
    assert run.global_step == scheduler.T_max < run.num_training_batches * 2
    assert scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


class Stream(IterableDataset):
    """Images one after the other, nobody knows how many."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return (self.images[place] for place in range(len(self.images)))


def stream(images):
    return DataLoader(Stream(images), batch_size=16, collate_fn=images.collate_fn)


@pytest.mark.parametrize("score", ["nll", "typicality"])
def test_a_flow_of_pixels_learns_from_a_stream(score, tmp_path):
    module = loaders(tmp_path)
    detector, run = pixel_flow(score=score), trainer(tmp_path, max_epochs=2)
    run.fit(detector, stream(module.train_data), stream(module.val_data))
    assert len(detector.post_processor.calibration) == 24
    assert sum(len(batch.pred_score) for batch in run.predict(detector, stream(module.test_data))) == 80
    with pytest.raises(ValueError, match="set max_epochs of the trainer"):
        fit(tmp_path, pixel_flow(max_epochs=None), stream(module.train_data))


@pytest.mark.parametrize("kind", ["embeddings", "maps, untrained"])
def test_what_stores_features_has_to_know_how_many_images_there_are(kind, tmp_path):
    module = loaders(tmp_path)
    with pytest.raises(ValueError, match="training images that can be counted, got DataLoader of Stream"):
        fit(tmp_path, BUILD[kind](), stream(module.train_data))
    with pytest.raises(ValueError, match="validation images that can be counted, got DataLoader of Stream"):
        fit(tmp_path, BUILD[kind](), validation=stream(module.val_data))


@pytest.mark.parametrize("detector", DETECTORS)
def test_batches_of_another_kind_are_refused_with_what_to_give(detector, tmp_path):
    other = DataLoader(TensorDataset(torch.rand(40, 3, 48, 48)), batch_size=8)
    with pytest.raises(TypeError, match=r"anomalib's batches \(ImageBatch\), got list"):
        fit(tmp_path, DETECTORS[detector](), other, other)
    with pytest.raises(TypeError, match=r"anomalib's batches \(ImageBatch\), got list"):
        fit(tmp_path, DETECTORS[detector](), other)
    fitted = DETECTORS[detector](coupling_layers=2)
    run = fit(tmp_path, fitted, max_epochs=1)
    for judge in (run.validate, run.test, run.predict):
        with pytest.raises(TypeError, match=r"anomalib's batches \(ImageBatch\), got list"):
            judge(fitted, other)


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_loader_that_makes_no_batches_is_refused_with_what_to_give(detector, tmp_path):
    module, fitted = loaders(tmp_path), DETECTORS[detector](coupling_layers=2)
    run = fit(tmp_path, fitted, max_epochs=1)
    for collating in ({}, {"collate_fn": module.train_data.collate_fn}):
        single = DataLoader(module.train_data, batch_size=None, **collating)
        with pytest.raises(TypeError, match=r"one by one \(batch_size None\): give it a batch_size"):
            fit(tmp_path, DETECTORS[detector](), single)
        for judge in (run.validate, run.test, run.predict):
            with pytest.raises(TypeError, match=r"one by one \(batch_size None\): give it a batch_size"):
                judge(fitted, single)


@pytest.mark.parametrize("detector", DETECTORS)
def test_images_that_are_not_divided_by_what_white_is_are_refused(detector, tmp_path):
    module, fitted, undivided = loaders(tmp_path), DETECTORS[detector](coupling_layers=2), loaders(tmp_path)
    run = fit(tmp_path, fitted, max_epochs=1)
    for data_set in (undivided.train_data, undivided.val_data):
        data_set.augmentations = Lambda(lambda images: 255 * images)
    training, validation = undivided.train_dataloader(), undivided.val_dataloader()
    with pytest.raises(ValueError, match=r"lie in \[0, 1\], and these run to [12]\d\d"):
        fit(tmp_path, DETECTORS[detector](), training, validation)
    for judge in (run.validate, run.test, run.predict):
        with pytest.raises(ValueError, match=r"lie in \[0, 1\], and these run to [12]\d\d"):
            judge(fitted, validation)
    image = next(iter(module.val_dataloader())).image
    fitted.eval()(image)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\], and these run to [12]\d\d"):
        fitted(255 * image)


def test_a_folder_of_torchvisions_is_refused_with_what_to_give(tmp_path):
    path = tmp_path / "images" / "normal" / "0.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (48, 48)).save(path)
    images = DataLoader(ImageFolder(tmp_path / "images", transform=PILToTensor()))
    with pytest.raises(TypeError, match=r"anomalib's batches \(ImageBatch\), got list"):
        fit(tmp_path, pixel_flow(), images)


def test_a_flow_of_pixels_takes_its_loaders_in_lists(tmp_path):
    module = loaders(tmp_path)
    detectors = []
    for listed in (False, True):
        torch.manual_seed(0)
        detectors.append(pixel_flow())
        training, validation = module.train_dataloader(), module.val_dataloader()
        fit(tmp_path, detectors[-1], *([[training], [validation]] if listed else [training, validation]))
    assert not differing(*detectors)
    with pytest.raises(ValueError, match="PixelFlow takes one DataLoader of training images, got dict"):
        fit(tmp_path, pixel_flow(), {"one": module.train_dataloader()})
    fit(tmp_path, detectors[0], validation=[module.val_dataloader()] * 2)
    assert len(detectors[0].post_processor.calibration) == 48


def test_samplers_say_which_images_are_fitted_to(tmp_path):
    module = loaders(tmp_path)
    images = module.train_data
    few = SubsetRandomSampler(range(40))
    many = WeightedRandomSampler([1.0] * len(images), 300)
    samplers = [
        ({"sampler": few, "batch_size": 8}, 40),
        ({"batch_sampler": BatchSampler(few, 8, drop_last=False)}, 40),
        ({"sampler": many, "batch_size": 8}, 300),
        ({"sampler": DistributedSampler(images, num_replicas=2, rank=0), "batch_size": 8}, 96),
    ]
    for sampling, rows in samplers:
        loader = DataLoader(images, collate_fn=images.collate_fn, **sampling)
        run = fit(tmp_path, embedding_flow(coupling_layers=0), loader)
        assert len(run.train_dataloader.dataset) == rows
        assert run.global_step == math.ceil(rows / 8)
        assert sum(processes.shares(loader)[1]) == rows


def test_processes_that_would_see_all_images_are_refused():
    def of(devices, deals):
        return SimpleNamespace(
            world_size=devices, _accelerator_connector=SimpleNamespace(use_distributed_sampler=deals)
        )

    check_dealing(of(2, True))
    check_dealing(of(1, False))
    with pytest.raises(ValueError, match="use_distributed_sampler false each of 2 processes sees all images"):
        check_dealing(of(2, False))


def test_a_detector_that_lightnings_command_line_has_trained_is_opened_with_its_calibration(tmp_path, caplog):
    inside, outside = idx_folder(tmp_path / "ramps", "plain"), idx_folder(tmp_path / "squares", "square", seed=1)
    saving = ModelCheckpoint(dirpath=tmp_path)
    settings = {"image_size": "[12, 12]", "channels": 1, "coupling_layers": 4, "hidden_channels": 16, "max_epochs": 1}
    sources = {"in_distribution": inside, "out_of_distribution": f"[{outside}]"}
    trained = LightningCLI(
        datamodule_class=CrossDataset,
        subclass_mode_model=True,
        save_config_callback=None,
        trainer_defaults={**TRAINER, "logger": False, "callbacks": [saving]},
        args=["fit", "--model=anomalib_flowood.PixelFlow"]
        + [f"--model.{name}={value}" for name, value in settings.items()]
        + [f"--data.{name}={value}" for name, value in sources.items()],
    )
    assert "_class_path" in trained.model.hparams
    caplog.clear()
    opened = open_checkpoint(saving.best_model_path)
    opened.check_weights()
    assert not caplog.messages
    assert torch.equal(opened.post_processor.calibration, trained.model.post_processor.calibration)
    assert identity(opened) == identity(trained.model)
