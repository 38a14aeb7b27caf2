# SPDX-License-Identifier: Apache-2.0
"""``flowood configs``, and what starts without anomalib."""

import subprocess
import sys
from pathlib import Path

import pytest

from anomalib_flowood.cli import main
from anomalib_flowood.cli.commands import FlowoodCLI

CONFIGS = Path(__file__).parents[1] / "configs"


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_all_files_are_copied(tmp_path, capsys):
    main(["configs", str(tmp_path / "new" / "place")])
    assert contents(tmp_path / "new" / "place") == contents(CONFIGS)
    assert len(capsys.readouterr().out.splitlines()) == len(contents(CONFIGS))
    main(["configs", str(tmp_path / "new" / "place")])  # the same ones are no harm


def test_nothing_is_overwritten_without_being_told(tmp_path, capsys):
    changed = tmp_path / "model" / "pixel_flow.yaml"
    changed.parent.mkdir()
    changed.write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["configs", str(tmp_path)])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert str(changed) in error
    assert "--overwrite" in error
    assert contents(tmp_path) == {"model/pixel_flow.yaml": "mine"}
    main(["configs", str(tmp_path), "--overwrite"])
    assert contents(tmp_path) == contents(CONFIGS)


def test_it_runs_behind_an_option_too(tmp_path):
    (tmp_path / "all.yaml").write_text(f"configs: {{folder: {tmp_path / 'here'}}}\n")
    FlowoodCLI(["--config", str(tmp_path / "all.yaml"), "configs"])
    assert contents(tmp_path / "here") == contents(CONFIGS)


def test_light_subcommands_load_neither_anomalib_nor_torch(tmp_path):
    code = (
        "import sys\nfrom anomalib_flowood.cli import main\n"
        "def run(*arguments):\n"
        "    try: main(list(arguments))\n    except SystemExit: pass\n"
        "    return {'torch', 'anomalib', 'lightning', 'pandas', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "for arguments in (['--version'], ['--help'], ['configs', sys.argv[1]], ['doctor'], ['report']):\n"
        "    assert not run(*arguments), arguments\n"
        "assert run('report', 'nowhere') <= {'pandas', 'numpy'}  # what reads a table"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "flowood: FOLDER has to be given." in done.stderr
    assert "flowood: nowhere is no folder." in done.stderr
    assert contents(tmp_path) == contents(CONFIGS)
