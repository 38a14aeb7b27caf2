# SPDX-License-Identifier: Apache-2.0
"""Completion, tried in a shell that has the script sourced."""

import shutil
import subprocess
import sys

import pytest

from anomalib_flowood.cli import main
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
    ],
)
def test_bash_completes(typed, offered, tmp_path, monkeypatch, capsys):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("There is no bash here.")
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
    assert len(found) < len(offered) + 5  # what does not begin so is left out


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
