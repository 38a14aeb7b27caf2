# SPDX-License-Identifier: Apache-2.0
"""Completion, tried in a shell that has the script sourced."""

import re
import shutil
import subprocess
import sys
from inspect import signature

import pytest
from lightning.pytorch import Trainer

from anomalib_flowood import CrossDataset, OneClass, models
from anomalib_flowood.cli import main
from anomalib_flowood.cli.commands import FlowoodCLI
from anomalib_flowood.cli.settings import settings
from anomalib_flowood.cli.subcommands import SUBCOMMANDS, detectors

ASK = """
source "$1"; shift
function=$(complete -p flowood | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_TYPE=9
"$function" flowood "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str, path, capsys) -> None:
    main(["--print_completion", shell])
    path.write_text(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["tr"], {"train"}),
        ([""], set(SUBCOMMANDS)),
        (["train", "--mod"], {"--model"}),
        (["train", "--model", ""], set(detectors())),
        (["train", "--seed_everything", "0", "--trainer.a"], {"--trainer.accelerator"}),
        (["export", "--export_type", "o"], {"onnx", "openvino"}),
        (["train", "--data", "par"], {"parts"}),
        (["predict", "--ckpt_path", "mod"], {"model.ckpt"}),
        (["report", "pa"], {"parts"}),
        (["train", "--model.couplin"], {"--model.coupling_layers"}),
        (["test", "--data.val_sp"], {"--data.val_split_ratio"}),
        (["fit", "--trainer.gradient_clip"], {"--trainer.gradient_clip_val", "--trainer.gradient_clip_algorithm"}),
        (["export", "--compression_type", "int8_p"], {"int8_ptq"}),
    ],
)
def test_bash_completes(typed, offered, tmp_path, monkeypatch, capsys):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("What bash completes is asked of bash, which is not on this machine.")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "model.ckpt").touch()
    script("bash", tmp_path / "flowood.bash", capsys)
    done = subprocess.run(
        [bash, "-c", ASK, "bash", "flowood.bash", "flowood", *typed], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    found = set(done.stdout.split())
    assert offered <= found
    assert all(word.startswith(typed[-1]) for word in found)
    assert typed[-1] == "--mod" or len(found) < len(offered) + 5


CHOSEN = [
    (["--model", "PixelFlow"], {"--model.mask"}, {"--model.backbone", "--model.map_layers"}),
    (["--model=PixelFlow"], {"--model.mask"}, {"--model.backbone"}),
    (["--model", "anomalib_flowood.EmbeddingFlow"], {"--model.backbone", "--model.post_processor"}, {"--model.mask"}),
    (["--data", "CrossDataset", "--model", "FeatureMapFlow"], {"--data.root"}, {"--data.dataset", "--model.modes"}),
    (["--data", "parts"], {"--data.dataset", "--model.mask"}, {"--data.in_distribution"}),
    (["--config", "detector.yaml"], {"--data.dataset", "--data.in_distribution", "--model.mask"}, set()),
]
"""What has been typed, what is then offered of options, and what is not."""


@pytest.mark.parametrize(("typed", "offered", "lacking"), CHOSEN)
def test_bash_offers_what_the_chosen_detector_and_data_have(typed, offered, lacking, tmp_path, monkeypatch, capsys):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("What bash completes is asked of bash, which is not on this machine.")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    script("bash", tmp_path / "flowood.bash", capsys)
    words = [part for word in typed for part in re.split("(=)", word)]  # as bash takes them apart
    asked = [bash, "-c", ASK, "bash", "flowood.bash", "flowood", "train", *words, "--"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = set(done.stdout.split())
    assert offered | {"--trainer.max_epochs"} <= found
    assert not lacking & found


@pytest.mark.parametrize(("typed", "offered", "lacking"), CHOSEN)
def test_zsh_offers_what_the_chosen_detector_and_data_have(typed, offered, lacking, tmp_path, monkeypatch, capsys):
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("What zsh completes is asked of zsh, which is not on this machine.")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    script("zsh", tmp_path / "_flowood", capsys)
    # What shtab's function is given to offer; zsh's own completion takes a terminal.
    ask = """
        compdef() { function=$1 }; eval "$(< _flowood)"
        _shtab_flowood() { local name=_shtab_flowood_$words[2]_options; print -l -- ${(P)name} }
        words=(flowood "$@"); $function
    """
    done = subprocess.run([zsh, "-f", "-c", ask, "zsh", "train", *typed], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = {line.partition("[")[0] for line in done.stdout.splitlines()}
    assert offered | {"--trainer.max_epochs"} <= found
    assert not lacking & found
    assert not re.search(r"\{\w+\}", done.stdout)


def test_every_option_of_every_command_is_completed():
    trained = ("optimizer", "lr_scheduler", "logging")  # of which each detector has its own
    for name, parser in FlowoodCLI(["backbone", "resnet18", "somewhere"], run=False).subcommand_parsers.items():
        known = SUBCOMMANDS[name]
        completed = {argument.name for argument in (*known.arguments, *known.more)} | {"--help"}
        if known.runs_detectors:
            completed |= {argument.name for argument in settings()}
        options = {option for action in parser._actions for option in action.option_strings if option[:2] == "--"}
        # What is added to a list (`--trainer.callbacks+`), and help of the trainer's own classes, is left out.
        typed = {option for option in options if not re.search(r"\+$|^--trainer(\..*\.help|\.help)?$", option)}
        assert {option for option in typed if option[2:].split(".")[0] not in trained} <= completed, name
        taken = {argument.name for argument in known.more if argument.name.count(".") == 0}
        assert taken <= options, name


def test_every_value_that_is_offered_is_taken(capsys):
    tried = set()
    for name, parser in FlowoodCLI(["backbone", "resnet18", "somewhere"], run=False).subcommand_parsers.items():
        given = [f"--model={models.DEFAULT_DETECTOR}"] if SUBCOMMANDS[name].runs_detectors else []
        for argument in (*SUBCOMMANDS[name].arguments, *SUBCOMMANDS[name].more):
            if argument.name.startswith(("--model", "--data")):  # classes, of whose arguments the parser asks more
                continue
            for choice in argument.choices:
                tried.add(argument.name)
                try:
                    parser.parse_args([*given, f"{argument.name}={choice}"])
                except SystemExit:
                    assert " has to be given." in (said := capsys.readouterr().err), said  # another argument
    assert {"--compression_type", "--export_type", "--trainer.accelerator"} <= tried


def test_the_arguments_of_all_detectors_and_data_modules_are_completed():
    named = {argument.name: argument.text for argument in settings()}
    for group, classes in (
        ("model", [getattr(models, name) for name in detectors()]),
        ("data", [OneClass, CrossDataset]),
        ("trainer", [Trainer]),
    ):
        for cls in classes:
            assert {f"--{group}.{argument}" for argument in signature(cls).parameters} <= named.keys()
    assert named["--data.normal_class"]
    assert all(text for option, text in named.items() if option.startswith("--data."))


def test_zsh_has_a_script(tmp_path, capsys):
    script("zsh", tmp_path / "_flowood", capsys)
    text = (tmp_path / "_flowood").read_text()
    assert text.startswith("#compdef flowood")
    assert all(f"{name}:" in text for name in SUBCOMMANDS)
    if (zsh := shutil.which("zsh")) is not None:
        subprocess.run([zsh, "-n", tmp_path / "_flowood"], check=True)


@pytest.mark.parametrize(("given", "message"), [(["bsh"], "Unknown shell 'bsh'. Did you mean 'bash'"), ([], "bash")])
def test_a_shell_that_is_not_known(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--print_completion", *given])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_completion_loads_neither_anomalib_nor_torch():
    code = (
        "import sys; from anomalib_flowood.cli import main; main(['--print_completion=bash'])\n"
        "assert not {'torch', 'anomalib', 'lightning'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "_shtab_flowood" in done.stdout
