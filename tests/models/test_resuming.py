# SPDX-License-Identifier: Apache-2.0
"""An interrupted training goes on to the very weights of an uninterrupted one; a finished one goes on to the end."""

import logging
from datetime import timedelta
from functools import partial

import pytest
import torch
from anomalib.callbacks.checkpoint import ModelCheckpoint
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint, Timer
from model_helpers import data, embedding_flow, engine, feature_map_flow, pixel_flow

import anomalib_flowood
from anomalib_flowood import open_checkpoint
from anomalib_flowood.models.components import CheckpointError

KINDS = {
    "pixels": partial(pixel_flow, coupling_layers=2),
    "embeddings": partial(embedding_flow, coupling_layers=2),
    "embeddings, nothing trains": partial(embedding_flow, coupling_layers=0),
    "maps": partial(feature_map_flow, coupling_layers=2),
    "maps, nothing trains": partial(feature_map_flow, coupling_layers=0),
}


class KilledError(Exception):
    pass


class Kill(Callback):
    """Ends a training before its optimizer steps, or before a batch begins."""

    def __init__(self, step, hook):
        self.step = step
        setattr(self, hook, self.kill)

    def kill(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KilledError


class Rates(Callback):
    """Notes the learning rate of every step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(folder, kind, *callbacks, seed=0, ckpt_path=None, batch=32, **limits):
    torch.manual_seed(seed)
    detector, module = KINDS[kind](), data(folder, train_batch_size=batch)
    engine(folder, callbacks=list(callbacks), **limits).fit(detector, datamodule=module, ckpt_path=ckpt_path)
    return detector


def differing(one, other):
    one, other = one.state_dict(), other.state_dict()
    return [name for name in one if one[name].numpy().tobytes() != other[name].numpy().tobytes()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_goes_on_exactly_from_any_checkpoint(kind, tmp_path):
    each = ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=1)
    ends = ModelCheckpoint(tmp_path / "epochs", "{epoch}", save_top_k=-1)
    whole = fit(tmp_path, kind, each, ends)
    steps = (2,) if "nothing" in kind else (2, 5) if kind != "maps" else (3, 10)
    paths = [tmp_path / "epochs/epoch=0.ckpt", *(tmp_path / f"steps/step={step}.ckpt" for step in steps)]
    for path in paths:
        assert differing(whole, fit(tmp_path, kind, seed=99, ckpt_path=path)) == [], path


@pytest.mark.parametrize("kind", ["pixels", "embeddings", "maps"])
def test_in_double_precision_a_training_goes_on_exactly(kind, tmp_path):
    each = ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = fit(tmp_path, kind, each, precision="64-true")
    again = fit(tmp_path, kind, seed=99, ckpt_path=tmp_path / "steps/step=3.ckpt", precision="64-true")
    assert again.model.dtype == torch.float64
    assert differing(whole, again) == []


@pytest.mark.parametrize("kind", ["pixels", "embeddings", "maps"])
@pytest.mark.parametrize(("step", "hook"), [(4, "on_train_batch_start"), (1, "on_before_zero_grad")])
def test_a_training_goes_on_exactly_from_where_it_was_killed(kind, step, hook, tmp_path):
    whole = fit(tmp_path, kind)
    saved = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(KilledError):
        fit(tmp_path, kind, saved, Kill(step, hook))
    assert differing(whole, fit(tmp_path, kind, seed=99, ckpt_path=saved.ckpt_path)) == []


def test_a_training_that_is_limited_in_steps_goes_on_exactly(tmp_path):
    ends = ModelCheckpoint(tmp_path / "epochs", "{epoch}", save_top_k=-1)
    whole = fit(tmp_path, "pixels", ends, max_steps=6)
    again = fit(tmp_path, "pixels", seed=99, ckpt_path=tmp_path / "epochs/epoch=0.ckpt", max_steps=6)
    assert differing(whole, again) == []


class SaveAlways(Callback):
    """Writes what a kill would leave, at hooks all over a training."""

    hooks = ("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end")
    hooks += ("on_validation_start", "on_validation_batch_end", "on_validation_end")

    def __init__(self, folder):
        self.folder, self.paths = folder, []
        for name in self.hooks:
            setattr(self, name, partial(self.save, name))

    def save(self, name, trainer, *args):
        if not trainer.sanity_checking:
            self.paths.append(self.folder / f"{len(self.paths)}-{name}.ckpt")
            trainer.save_checkpoint(self.paths[-1])


@pytest.mark.parametrize(
    "limits",
    [
        {"val_check_interval": 0.5, "batch": 48},  # two batches, each with a validation
        {"accumulate_grad_batches": 2},
        {"check_val_every_n_epoch": 2, "batch": 48},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"limit_train_batches": 2},
    ],
)
def test_a_training_goes_on_exactly_from_any_moment(limits, tmp_path):
    saved = SaveAlways(tmp_path)
    whole = fit(tmp_path, "pixels", saved, **limits)
    assert len(whole.post_processor.calibration) == 24
    wrong = {path.stem: fit(tmp_path, "pixels", seed=99, ckpt_path=path, **limits) for path in saved.paths}
    assert [name for name, again in wrong.items() if differing(whole, again)] == []


LIMITS = {
    "an epoch": dict,
    "an epoch, no validation": lambda: {"limit_val_batches": 0},
    "steps to its end": lambda: {"max_steps": 3},
    "steps within it": lambda: {"max_steps": 2},
    "time": lambda: {"callbacks": [Timer(timedelta(microseconds=1))]},
}


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        *(("pixels", limit) for limit in LIMITS),
        ("maps, nothing trains", "an epoch"),
        ("maps, nothing trains", "steps to its end"),
    ],
)
def test_a_training_goes_on_exactly_from_behind_its_last_step(kind, limit, tmp_path):
    def once(*callbacks, **kwargs):
        limits = {"max_epochs": 1, **LIMITS[limit]()}
        return fit(tmp_path, kind, *callbacks, *limits.pop("callbacks", ()), **limits, **kwargs)

    saved = SaveAlways(tmp_path)
    whole = once(saved)
    assert bool(whole.model.fitted)
    last = max(place for place, path in enumerate(saved.paths) if "on_train_batch_end" in path.stem)
    wrong = {path.stem: once(seed=99, ckpt_path=path) for path in saved.paths[last:]}
    assert [name for name, again in wrong.items() if differing(whole, again)] == []
    assert f"{last}-on_train_batch_end" in wrong
    assert len(wrong) == (2 if limit in {"an epoch, no validation", "steps within it"} else 6)


@pytest.mark.parametrize("kind", ["pixels", "embeddings, nothing trains", "maps"])
def test_what_is_not_fitted_yet_scores_nothing_and_goes_on(kind, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    whole = fit(tmp_path, kind, Save())
    early, refused = tmp_path / "early.ckpt", partial(pytest.raises, CheckpointError, match="after 2 steps, before")
    for load in (open_checkpoint, anomalib_flowood.load, type(whole).load_from_checkpoint):
        with refused():
            load(early)
    for run in ("predict", "test", "validate"):
        with refused():
            getattr(engine(tmp_path), run)(KINDS[kind](), datamodule=data(tmp_path), ckpt_path=early)
    assert differing(whole, fit(tmp_path, kind, ckpt_path=early)) == []


def test_an_epoch_of_other_batches_is_said_to_be_another(tmp_path, caplog):
    saved = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(KilledError):
        fit(tmp_path, "pixels", saved, Kill(2, "on_train_batch_start"))
    fit(tmp_path, "pixels", ckpt_path=saved.ckpt_path)
    assert "as if uninterrupted" not in caplog.text
    other = data(tmp_path, train_batch_size=16)
    engine(tmp_path).fit(KINDS["pixels"](), datamodule=other, ckpt_path=saved.ckpt_path)
    assert "within an epoch of 3 batches, which has 6 now" in caplog.text


def test_a_training_that_had_not_ended_is_not_ended_by_fewer_epochs(tmp_path):
    ends = ModelCheckpoint(tmp_path / "epochs", "{epoch}", save_top_k=-1)
    fit(tmp_path, "maps", ends)
    with pytest.raises(ValueError, match="no step left to end it with: raise max_epochs"):
        fit(tmp_path, "maps", ckpt_path=tmp_path / "epochs/epoch=0.ckpt", max_epochs=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_a_validation_is_fitted(kind, tmp_path):
    saved = ModelCheckpoint(tmp_path, "validated", save_on_train_epoch_end=False)
    whole = fit(tmp_path, kind, saved, max_epochs=1)
    assert differing(whole, open_checkpoint(tmp_path / "validated.ckpt")) == []


@pytest.mark.parametrize("kind", ["embeddings", "maps"])
def test_a_training_goes_on_exactly_from_about_a_validation_within_an_epoch(kind, tmp_path):
    saved = SaveAlways(tmp_path)
    limits = {"val_check_interval": 1, "max_epochs": 1}
    whole = fit(tmp_path, kind, saved, **limits)
    names = [path.stem.split("-")[1] for path in saved.paths]
    end = names.index("on_validation_end")
    batch = names.index("on_validation_batch_end")
    for path in (saved.paths[batch], saved.paths[end], saved.paths[end + 1]):
        assert differing(whole, fit(tmp_path, kind, seed=99, ckpt_path=path, **limits)) == [], path


def test_a_training_that_was_interrupted_several_times_goes_on_exactly(tmp_path):
    limits = {"val_check_interval": 1, "max_epochs": 3}
    whole = fit(tmp_path, "pixels", **limits)
    path = None
    for step, hook in ((1, "on_train_batch_start"), (3, "on_train_epoch_start"), (4, "on_validation_end")):
        saved = OnExceptionCheckpoint(tmp_path, f"{step}")
        with pytest.raises(KilledError):
            fit(tmp_path, "pixels", saved, Kill(step, hook), seed=step - 1, ckpt_path=path, **limits)
        path = saved.ckpt_path
    assert differing(whole, fit(tmp_path, "pixels", seed=99, ckpt_path=path, **limits)) == []


@pytest.mark.parametrize("kind", ["pixels", "maps"])
def test_a_longer_training_follows_the_cosine_of_its_new_length(kind, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    ends = ModelCheckpoint(tmp_path / "epochs", "{epoch}", save_top_k=-1)
    first, more, whole = Rates(), Rates(), Rates()
    fit(tmp_path, kind, first, ends, max_epochs=1)
    detector = fit(tmp_path, kind, more, max_epochs=2, ckpt_path=tmp_path / "epochs/epoch=0.ckpt")
    fit(tmp_path, kind, whole, max_epochs=2)
    count = len(whole.rates)
    expected = [
        detector.learning_rate * (1 + torch.tensor(torch.pi * i / count).cos().item()) / 2 for i in range(count)
    ]
    assert whole.rates == pytest.approx(expected, abs=1e-9)
    assert more.rates == pytest.approx(expected[count // 2 :], abs=1e-9)
    assert first.rates[0] > first.rates[-1] > 0
