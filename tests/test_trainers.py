# SPDX-License-Identifier: Apache-2.0
"""What is reached of Lightning's trainers; the first to fail when a version of it moves something."""

import re
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch.utils.data import DataLoader

from anomalib_flowood import trainers

MOVED = f"Lightning {lightning.__version__} has moved what anomalib_flowood/trainers.py reaches"


def loader(value, batches=2):
    return DataLoader(torch.full((2 * batches, 1), float(value)), batch_size=2)


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader(1)

    def val_dataloader(self):
        return loader(2)

    def test_dataloader(self):
        return loader(3)

    def predict_dataloader(self):
        return loader(4)


class Seeing(LightningModule):
    """Notes the batches that it gets, and what the trainer has when a run begins."""

    def __init__(self, on_fit_start=lambda trainer: None, on_setup=lambda trainer: None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.begin, self.begin_run = on_fit_start, on_setup
        self.seen = {"training": [], "validation": [], "prediction": []}

    def configure_optimizers(self):
        # As our detectors do, which has the training's loader set up before a fit begins.
        assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def setup(self, stage):
        self.begin_run(self.trainer)

    def on_fit_start(self):
        self.begin(self.trainer)

    def training_step(self, batch, batch_idx):
        self.seen["training"].append(batch[0].item())
        return self.weight * batch.sum()

    def validation_step(self, batch, batch_idx):
        self.seen["validation"].append(batch[0].item())

    def test_step(self, batch, batch_idx):
        self.log("one", batch.mean())

    def predict_step(self, batch, batch_idx):
        self.seen["prediction"].append(batch[0].item())


def trainer(tmp_path, **kwargs):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **{**quiet, **kwargs})


GIVEN = {
    "data module": lambda: {"datamodule": Data()},
    "loaders": lambda: {"train_dataloaders": loader(1), "val_dataloaders": loader(2)},
    "lists of loaders": lambda: {"train_dataloaders": loader(1), "val_dataloaders": [loader(2)]},
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("sanity_steps", [0, 1])
def test_a_fit_that_has_begun_goes_on_with_other_loaders(given, sanity_steps, tmp_path):
    found = {}

    def exchange(trainer):
        found["train"], found["val"] = trainers.training_loaders(trainer), trainers.validation_loaders(trainer)
        trainers.train_on(trainer, loader(10, batches=3))
        trainers.validate_on(trainer, loader(20, batches=1))

    module = Seeing(exchange)
    trainer(tmp_path, num_sanity_val_steps=sanity_steps).fit(module, **GIVEN[given]())
    assert [next(iter(one))[0].item() for one in (*found["train"], *found["val"])] == [1, 2], MOVED
    assert module.seen["training"] == [10] * 3, MOVED
    assert module.seen["validation"] == [20] * (1 + sanity_steps), MOVED


@pytest.mark.parametrize("given", GIVEN)
def test_to_ask_for_loaders_changes_nothing(given, tmp_path):
    def look(trainer):
        trainers.training_loaders(trainer)
        trainers.validation_loaders(trainer)

    looked, plain = Seeing(look), Seeing()
    for module in (looked, plain):
        trainer(tmp_path).fit(module, **GIVEN[given]())
    assert looked.seen == plain.seen
    assert plain.seen["training"] == [1, 1]


@pytest.mark.parametrize(
    ("kwargs", "data"),
    [({"limit_val_batches": 0}, {"datamodule": Data()}), ({}, {"train_dataloaders": loader(1)})],
)
def test_there_may_be_no_validation(kwargs, data, tmp_path):
    found = []
    trainer(tmp_path, **kwargs).fit(Seeing(lambda trainer: found.append(trainers.validation_loaders(trainer))), **data)
    assert found == [[]]


def test_loaders_that_are_given_to_a_prediction_are_known_before_it(tmp_path):
    found = []
    module = Seeing(on_setup=lambda trainer: found.append(trainers.prediction_loaders(trainer)))
    one = loader(7)
    trainer(tmp_path).predict(module, [one])
    assert [part.dataset for part in found[0]] == [one.dataset], MOVED
    assert module.seen["prediction"] == [7, 7]
    trainer(tmp_path).test(module, loader(3), verbose=False)
    trainer(tmp_path).fit(module, loader(1))
    assert found[1:] == [[], []]


def test_loaders_of_an_earlier_run_are_not_those_of_a_later_one(tmp_path):
    found = {}

    def look(trainer):
        for stage in ("training", "validation", "prediction"):
            found[stage] = [one.dataset for one in getattr(trainers, f"{stage}_loaders")(trainer)]

    run, module = trainer(tmp_path), Seeing(look)
    run.fit(module, datamodule=Data())
    train, val, predict = loader(5), loader(6), loader(7)
    run.fit_loop.max_epochs = 2
    run.fit(module, train, val)
    assert found == {"training": [train.dataset], "validation": [val.dataset], "prediction": []}, MOVED
    assert module.seen["training"] == [1, 1, 5, 5]
    predicting = Seeing(on_setup=lambda trainer: found.update(prediction=trainers.prediction_loaders(trainer)))
    run.predict(predicting, predict)
    assert [one.dataset for one in found["prediction"]] == [predict.dataset], MOVED


def test_the_table_of_a_test_shows_what_it_is_told_to(tmp_path, capsys):
    run = trainer(tmp_path)
    trainers.name_results(run, lambda values: {f"{name}, renamed": "many" for name in values})
    assert run.test(Seeing(), loader(3)) == [{"one": 3.0}]
    printed = capsys.readouterr().out
    assert "one, renamed" in printed, MOVED
    assert "many" in printed, MOVED


def test_a_module_may_have_no_trainer(tmp_path):
    module = Seeing()
    assert trainers.trainer_of(module) is None
    run = trainer(tmp_path)
    run.fit(module, loader(1))
    assert trainers.trainer_of(module) is run


def test_a_data_module_of_another_kind_says_itself_what_it_lacks(tmp_path):
    class Lacking(Data):
        def val_dataloader(self):
            return loader(self.val_data)

    with pytest.raises(AttributeError, match="'Lacking' object has no attribute 'val_data'"):
        trainer(tmp_path).fit(Seeing(on_setup=trainers.check_validation_images), datamodule=Lacking())


def test_callbacks_are_taken_from_a_trainer_and_not_from_the_list_that_it_was_given(tmp_path):
    given = [Callback(), LambdaCallback()]
    run = trainer(tmp_path, callbacks=given)
    before = list(given)
    trainers.drop_callbacks(run, lambda callback: isinstance(callback, LambdaCallback))
    assert run.callbacks == [callback for callback in before if not isinstance(callback, LambdaCallback)]
    assert given == before


@pytest.mark.parametrize("lacks", ["_data_source", "_combined_loader", "instance"])
def test_a_version_that_keeps_its_loaders_elsewhere_is_named(lacks):
    fields = {"_data_source": SimpleNamespace(instance=None), "_combined_loader": None}
    if lacks == "instance":
        fields["_data_source"] = SimpleNamespace()
    loop = SimpleNamespace(**{name: value for name, value in fields.items() if name != lacks})
    with pytest.raises(RuntimeError, match=rf"Lightning {re.escape(lightning.__version__)} has no .*\.{lacks}"):
        trainers.train_on(SimpleNamespace(fit_loop=loop), loader(1))


def test_lightnings_private_fields_are_reached_in_two_modules():
    root = Path(__file__).parents[1]
    private = re.compile(r"\b(trainer|\w*loops?)\._[a-z]|\._(data_source|combined_loader|print_results|trainer)\b")
    files = [path for folder in ("anomalib_flowood", "benchmarks") for path in (root / folder).rglob("*.py")]
    found = {path.name for path in files if private.search(path.read_text(encoding="utf-8"))}
    assert found == {"trainers.py"}
    named = re.compile(r"\bfield\(.*\"_[a-z]")
    assert {path.name for path in files if named.search(path.read_text(encoding="utf-8"))} == {
        "saving.py",
        "trainers.py",
    }
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    bounds = re.search(r'"lightning(.*?)"', project)[1]
    assert "<" in bounds, "a later version may keep its loaders elsewhere"
    assert bounds in (root / "anomalib_flowood" / "trainers.py").read_text(encoding="utf-8")
