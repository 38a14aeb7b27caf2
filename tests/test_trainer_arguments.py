# SPDX-License-Identifier: Apache-2.0
"""Arguments of Lightning's trainer, as they are typed and as a configuration has them."""

import json
from pathlib import Path
from typing import Union

import pytest
from lightning.pytorch import Trainer
from PIL import Image
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from anomalib_flowood.cli import main
from anomalib_flowood.cli.commands import FlowoodCLI
from anomalib_flowood.data import OneClass

LIMITS = [f"limit_{kind}_batches" for kind in ("train", "val", "test", "predict")]


@pytest.fixture
def float_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's cache of types gives the union in which the float is first, as another library had it."""
    for name in LIMITS:
        monkeypatch.setitem(Trainer.__init__.__annotations__, name, Union[float, int, None])  # noqa: UP007


@pytest.mark.usefixtures("float_first")
@pytest.mark.parametrize("in_file", [False, True])
def test_a_whole_number_of_batches_is_one(in_file, tmp_path):
    values = dict(zip(LIMITS, (1, 0.5, 1.0, 0), strict=True))
    if in_file:
        (tmp_path / "file.yaml").write_text(f"trainer: {json.dumps(values)}\n")
        given = ["--config", str(tmp_path / "file.yaml")]
    else:
        given = [f"--trainer.{name}={value}" for name, value in values.items()]
    data = f"{OneClass.__module__}.{OneClass.__name__}"
    cli = FlowoodCLI(["fit", *given, "--data", data, "--data.dataset", str(tmp_path)], run=False)
    found = {name: cli.config["fit"]["trainer"][name] for name in LIMITS}
    assert {name: (value, type(value)) for name, value in found.items()} == {
        name: (value, type(value)) for name, value in values.items()
    }
    options = cli.subcommand_parsers["fit"]._option_string_actions
    assert all("[int, float" in str(options[f"--trainer.{name}"]._typehint) for name in LIMITS)


@pytest.mark.parametrize(
    ("name", "value", "status", "message"),
    [
        ("default_root_dir", "X", (2, 1), "is what --default_root_dir says: give --default_root_dir X in its place."),
        ("enable_checkpointing", "false", (1, 1), "A checkpoint is always kept, in the run's folder: leave"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_what_others_decide_is_said(name, value, status, message, in_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    Path("file.yaml").write_text(f"trainer: {{{name}: {value}}}\n")
    given = ["--config", "file.yaml"] if in_file else [f"--trainer.{name}", value]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--data", "parts", "--model", "PixelFlow", *given])
    said = capsys.readouterr().err
    assert message in said
    assert ended.value.code == status[in_file]


@pytest.mark.parametrize("subcommand", ["fit", "train"])
def test_an_optimizer_that_is_named_is_the_one_that_trains(subcommand, tmp_path):
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    given = [
        subcommand,
        "--model",
        "PixelFlow",
        "--data",
        str(tmp_path),
        "--default_root_dir",
        str(tmp_path / "results"),
    ]
    chosen = [
        "--optimizer",
        "SGD",
        "--optimizer.lr",
        "0.01",
        "--lr_scheduler",
        "ExponentialLR",
        "--lr_scheduler.gamma=0.5",
    ]
    cli = FlowoodCLI([*given, *chosen], run=False)
    (optimizer,), (scheduler,) = cli.model.configure_optimizers()
    assert (type(optimizer), type(scheduler), scheduler.gamma) == (SGD, ExponentialLR, 0.5)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in cli.model.parameters()}
    with pytest.raises(ValueError, match=r"name one, too \(--optimizer Adam\)"):
        FlowoodCLI([*given, *chosen[4:]], run=False)
