# SPDX-License-Identifier: Apache-2.0
"""Help is short, is ours and says what the parsers do; what is misspelt is answered with what was meant."""

import re
import subprocess
import sys
from functools import partial
from inspect import signature

import pytest
import rich.console
from anomalib.data import AnomalibDataModule
from anomalib.models import AnomalibModule
from lightning.pytorch import Callback
from rich.console import Console
from torch.utils.data import DataLoader

from anomalib_flowood import models
from anomalib_flowood.cli import main
from anomalib_flowood.cli.commands import FlowoodCLI
from anomalib_flowood.cli.help import short_help
from anomalib_flowood.cli.starting import loading
from anomalib_flowood.cli.subcommands import SUBCOMMANDS, detectors
from anomalib_flowood.models.components import ConformalPostProcessor
from anomalib_flowood.names import subclasses
from anomalib_flowood.parsing import LIBRARIES, arguments_of

SCREEN = 40


@pytest.fixture(scope="module")
def parsers():
    return FlowoodCLI(["backbone", "resnet18", "somewhere"], run=False).subcommand_parsers


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_is_ours_and_fits_a_screen(name):
    text = short_help(name)
    lines = text.splitlines()
    assert len(lines) <= SCREEN
    assert lines[0].startswith(f"usage: flowood {name}")
    assert f"\n  flowood {name} " in text.partition("examples:")[2]
    assert "anomalib train" not in text
    assert "Padim" not in text


def test_help_loads_neither_anomalib_nor_torch():
    code = (
        "import sys; from anomalib_flowood.cli import SUBCOMMANDS, main\n"
        "for name in SUBCOMMANDS: main([name, '--help'])\n"
        "assert not {'torch', 'anomalib', 'lightning', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: flowood ") == len(SUBCOMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--print_completion", "bash"]])
def test_help_that_is_read_in_part_ends_quietly(arguments):
    """`flowood train --help | head -2` ended in a traceback."""
    command = f"import time; from anomalib_flowood.cli import main; time.sleep(1); main({arguments})"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_knows_what_the_parser_does(name, parsers):
    actions = {option: action for action in parsers[name]._actions for option in action.option_strings or [action.dest]}
    for argument in SUBCOMMANDS[name].arguments:
        default = re.search(r"Default: (.+)\.$", argument.text)
        if argument.name == "--model.post_processor.alpha":
            assert "alpha" in signature(ConformalPostProcessor).parameters
        elif argument.name.endswith(".ARGUMENT"):
            assert argument.name.replace("ARGUMENT", "help") in actions
        else:
            action = actions[argument.name]
            assert default is None or default[1] == str(action.default)
            if action.choices:
                assert set(argument.choices) <= set(action.choices)
    described = {argument.name.lstrip("-") for argument in SUBCOMMANDS[name].arguments}
    required = {*parsers[name].required_args, *(dest for dest in actions if dest.isidentifier())} - {"model"}
    assert required <= described


def test_help_names_our_detectors():
    assert sorted(detectors()) == sorted(models.__all__)


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("more", [["-v"], ["-vv"], ["-v", "-v"]])
def test_verbose_help_shows_more(more, capsys):
    text = help_of(capsys, "explain", "--help", *more)
    assert text.startswith("usage: flowood explain [options]\n")
    assert "default: 64)" in text
    assert "(required, type: Path)" in re.sub(r"\s+", " ", text)
    assert ("--trainer.max_epochs" in text) == (more != ["-v"])
    assert max(map(len, text.splitlines())) <= 80


def test_what_takes_seconds_is_named(monkeypatch, capsys):
    console = partial(Console, force_terminal=True, width=100)
    monkeypatch.setattr(rich.console, "Console", console)
    with loading("anomalib for flowood train"):
        pass
    assert "loading anomalib for flowood train" in capsys.readouterr().err


def test_arguments_of_every_class_that_can_be_named_are_known_or_left_out():
    for base in (AnomalibModule, AnomalibDataModule, DataLoader, Callback):
        found = {cls: arguments_of(cls) for cls in (base, *subclasses(base))}
        assert any(found.values()) or base is DataLoader


def test_defaults_are_whole(capsys, parsers):
    text = re.sub(r"\s+", "", help_of(capsys, "train", "-hvv"))
    for action in parsers["train"]._actions:
        if isinstance(action.default, int | float) and action.option_strings:
            assert f"default:{action.default}".replace(" ", "") in text
    assert text.count("default:") > 40
    assert not {option for option in LIBRARIES if f"--{option}" not in text}


DETECTOR = models.DEFAULT_DETECTOR
TRAIN = ["train", "--model", DETECTOR, "--data", "OneClass", "--data.dataset", "x"]


def test_help_names_the_default_detector():
    """It is written from a page that imports no detector."""
    assert f"{DETECTOR}, the default, " in short_help("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Unknown subcommand 'trian'. Did you mean 'train'?"),
        (["--versoin"], "Unknown option '--versoin'. Did you mean '--version'"),
        (["--print_config", "trian"], "Did you mean 'train'?"),
        (["train", "--modl", "x"], "There is no option --modl. Did you mean '--model'?"),
        ([*TRAIN, "--model.backbon=x"], f"--model.backbon is no option of {DETECTOR}. Did you mean '--model.backbone'"),
        ([*TRAIN, "--model.post_processor.alpah", "1"], "Did you mean '--model.post_processor.alpha'?"),
        ([*TRAIN, "--data.normal_clas", "x"], "Did you mean '--data.normal_class'?"),
        ([*TRAIN, "--trainer.max_epoch5=3"], "no option --trainer.max_epoch5. Did you mean '--trainer.max_epochs'"),
        ([*TRAIN, "--trainer.callbacks", "EarlyStoping"], "Did you mean 'EarlyStopping'?"),
        ([*TRAIN, "--optimizer", "Adm"], "Unknown optimizer 'Adm'. Did you mean 'Adam'"),
        (["train", "--model", DETECTOR[:-1]], f"Unknown model '{DETECTOR[:-1]}'. Did you mean '{DETECTOR}'"),
        (["train", "--model", f"anomalib_flowood.{DETECTOR[:-1]}"], f"Did you mean '{DETECTOR}'"),
        (["train", "--model.help", DETECTOR[:-1]], f"Did you mean '{DETECTOR}'"),
        ([*TRAIN, "--model.max_epochs", "many"], "--model.max_epochs: Expected: int. Got value: many"),
        ([*TRAIN, "--trainer.max_epochs", "ten"], "--trainer.max_epochs: Expected: int. Got value: ten"),
        ([*TRAIN, "--model.image_size", "96"], "--model.image_size: Expected: tuple, written [A,B]. Got value: 96"),
        ([*TRAIN, "--model.image_size", "96,96"], "Expected: tuple, written [A,B]. Got value: 96,96"),
        ([*TRAIN, "--data.val_split_ratio", "a"], "--data.val_split_ratio: Expected: float. Got value: a"),
        ([*TRAIN, "--config", "gone.yaml"], "There is no configuration file gone.yaml"),
        ([*TRAIN, "stray"], "stray belongs to no option."),
        (["benchmark", "--confg", "x"], "There is no option --confg. Did you mean '--config'?"),
        (["report", "--output", "x"], "FOLDER has to be given."),
        (["report", "x", "--outptu", "y"], "Did you mean '--output'?"),
        (["train", "--model.backbone", "x", "--model", DETECTOR], "--model.backbone has to follow --model CLASS."),
        (["explain", "--data", "."], "--ckpt_path has to be given."),
        (["install", "--optoin", "full"], "Did you mean '--option'?"),
    ],
)  # fmt: skip
def test_what_was_meant(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"flowood: {message}" in error or message in error
    assert len(error.splitlines()) <= 2
    assert "<class" not in error


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            f"model: {{class_path: {DETECTOR}, init_args: {{backbon: x}}}}",
            f"'backbon' in 'model' is no argument of {DETECTOR}. Did you mean 'backbone'?",
        ),
        (f"model: {{class_path: {DETECTOR[:-1]}}}", f"Did you mean '{DETECTOR}'"),
        (
            f"model: {{class_path: {DETECTOR}, init_arg: {{backbone: x}}}}",
            "There is no 'init_arg' in 'model'. Did you mean 'init_args'?",
        ),
        ("model: {clas_path: x}", "There is no 'clas_path' in 'model'. Did you mean 'class_path'?"),
        (
            f"model: {{init_args: {{backbone: x}}, clas_path: {DETECTOR}}}",
            "There is no 'clas_path' in 'model'. Did you mean 'class_path'?",
        ),
        ("data: {class_path: OneClass, init_args: {dataset: x, normal_clas: 1}}", "Did you mean 'normal_class'?"),
        ("data: {class_path: OneClass}", "flowood: --data.dataset has to be given.\n"),
        ("model: 3", "flowood: --model: Not a valid subclass of AnomalibModule. Got value: 3\n"),
        ("model: {class_path: x", "a.yaml is not valid YAML: while parsing a flow mapping at line 1"),
        ("trainr: {max_epochs: 1}", "There is no 'trainr' in a configuration. Did you mean 'trainer'?"),
        ("trainer: {max_epoch: 1}", "no 'trainer.max_epoch' in a configuration. Did you mean 'trainer.max_epochs'"),
    ],
)  # fmt: skip
def test_what_was_meant_in_a_file(config, message, tmp_path, capsys):
    (path := tmp_path / "a.yaml").write_text(config)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2


@pytest.mark.parametrize(
    ("option", "config", "message"),
    [
        ("--model", f"model: {{class_path: {DETECTOR}, init_args: {{backbone: x}}}}", "give it with --config, not"),
        ("--config", "class_path: OneClass\ninit_args: {dataset: x}", "with --model or --data, not with --config."),
    ],
)
def test_a_file_that_is_given_with_another_option(option, config, message, tmp_path, capsys):
    (path := tmp_path / "a.yaml").write_text(config)
    with pytest.raises(SystemExit):
        main(["train", option, str(path)])
    assert message in capsys.readouterr().err
