# SPDX-License-Identifier: Apache-2.0
"""Every command of the README is run, as it stands there; and a newcomer's first hour is made of them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from model_helpers import BACKBONE, idx_folder, write_idx
from PIL import Image

from anomalib_flowood.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = ROOT / "tests/first_hour.sh"

ELSEWHERE = {
    "pip": "they install",
    "make": "they install, and run benchmarks for minutes; CI runs `make lint` and `make test`",
    "curl": "first_hour.sh asks the server so",
    "serve": "first_hour.sh starts one",
    "backbone": "it needs a network; tests/test_cli.py and tests/features run it without",
}
"""What is not run here, and why."""


def commands_of(text: str) -> list[list[str]]:
    """The words of each command in the blocks that are for a terminal, and of those within sentences."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(
        r"`(flowood -?[a-z-]+ [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )
    return [shlex.split(line, comments=True) for line in lines]


def names_of(command: list[str]) -> set[str]:
    """The program and, of ours, the subcommand."""
    return {command[0], *command[1:2]} if command[0] == "flowood" else {command[0]}


HOUR = commands_of(README.partition("**From a folder**")[2].partition("**From a config file.**")[0])[:5]
CONFIGURED = commands_of(README.partition("# detector.yaml")[2].partition("A checkpoint is enough")[0])
"""Those that tests/models/test_few_images.py runs."""


def test_the_tests_run_with_the_readmes_command():
    assert ["make", "test"] in commands_of(README)
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1] == "make test"


def test_the_readme_begins_with_a_folder():
    assert HOUR[0] == ["flowood", "train", "--data", "./parts"]
    assert [command[1] for command in HOUR] == ["train", "test", "predict", "export", "report"]
    assert [command[1] for command in CONFIGURED] == ["train", "predict", "export"]


def test_the_first_hour(tmp_path):
    """Its commands are the README's, all end well, and no warning is one that nobody can act on."""
    script = SCRIPT.read_text(encoding="utf-8")
    paths = dict(re.findall(r"^(CHECKPOINT|EXPORTED)=(\S+)$", script, re.MULTILINE))
    for name, path in paths.items():
        script = script.replace(f'"${name}"', path).replace(f"${name}", path)
    run = [shlex.split(line, comments=True) for line in re.findall(r"^step \w+ \$(FLOWOOD .*)$", script, re.MULTILINE)]
    assert [["flowood", *words[1:]] for words in run] == HOUR
    assert f"$FLOWOOD serve {paths['EXPORTED']} --port 0" in script
    assert ["flowood", "serve", "weights/openvino"] in commands_of(README)
    assert "`--port 0`" in README

    environment = {**os.environ, "FLOWOOD": f"{sys.executable} -m anomalib_flowood", "PYTHON": sys.executable}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(
        r"^(\w+): [\d.]+ s, warnings: (\d+), of which nobody can act on: (\d+)$", done.stdout, re.MULTILINE
    )
    assert [name for name, _, _ in steps] == ["pictures", "train", "test", "predict", "export", "report", "serve"]
    assert not any(int(useless) for _, _, useless in steps)
    assert (tmp_path / "train.log").read_text().count("Seed set to") == 1
    said = (tmp_path / "test.log").read_text()
    assert re.search(r"of 9 normal images raise an alarm .* of 16 anomalous images are found", said)
    assert re.search(r'"file":.*"p_value":0\.\d+,"label":"anomalous"', (tmp_path / "serve.log").read_text())


@pytest.fixture
def here(cases, tmp_path, monkeypatch):
    """A folder with whatever the README's commands name: data sets, a checkpoint, an export, configuration files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    for name, texture in (("FashionMNIST", "plain"), ("MNIST", "square")):
        raw = idx_folder(tmp_path / "datasets" / name / "raw", texture, train=60, test=20)
        for part, count in (("train", 60), ("t10k", 20)):
            write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count) % 2)
    case = cases("pixel_flow")
    shutil.copy(case.checkpoint, "model.ckpt")
    shutil.copytree(case.export("openvino").parent, "weights/openvino")
    Path("arriving").mkdir()
    Image.fromarray(np.full((12, 12), 90, np.uint8)).save("arriving/part.png")
    os.utime("arriving/part.png", (0, 0))
    (text,) = re.findall(r"```yaml\n(# benchmark\.yaml\n.*?)```", README, re.DOTALL)
    Path("benchmark.yaml").write_text(yaml.safe_dump(smaller(yaml.safe_load(text))))
    return tmp_path


def smaller(config: dict) -> dict:
    """The README's benchmark on a network of timm's tests, without weights; one class and one seed of three."""
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [32, 32]}}
    pre_processor = {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": resize}}
    theirs = {"backbone": "test_resnet", "layers": ["layer1"], "pre_trained": False, "pre_processor": pre_processor}
    section = config["benchmark"]
    for entry in section["model"]["grid"]:
        if entry["class_path"] == "EmbeddingFlow":
            entry["init_args"] = {"backbone": BACKBONE, "pre_trained": False, "image_size": [32, 32]}
        else:
            entry["init_args"] = theirs | ({"n_features": 8} if entry["class_path"] == "Padim" else {})
    section["seed"] = section["seed"]["grid"][0]
    section["data"]["init_args"]["normal_class"] = section["data"]["init_args"]["normal_class"]["grid"][0]
    return config


def test_every_other_command_of_the_readme_runs(here, monkeypatch, capsys):
    left = [words for words in commands_of(README) if words not in HOUR + CONFIGURED]
    left = [words for words in left if not names_of(words) & ELSEWHERE.keys()]
    assert {words[1] for words in left if words[0] == "flowood"} >= {"score", "watch", "benchmark", "report", "explain"}
    looks = []

    def look_again(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        wait(seconds)

    wait = time.sleep
    runs = here / "runs/benchmark"
    for words in left:
        command = " ".join(words)
        if words[0] == "eval":  # of a shell, in which it completes commands
            words = shlex.split(re.search(r"\$\((.*)\)", command)[1])
        assert words[0] == "flowood", f"{command} is run by no test: say so in ELSEWHERE, with a reason."
        if runs.is_dir():  # whose name is a time
            (run,) = runs.iterdir()
            words = [re.sub(r"runs/benchmark/\S+", f"runs/benchmark/{run.name}", word) for word in words]
        try:
            with monkeypatch.context() as patched:
                if words[1] == "watch":  # which ends with Ctrl-C
                    patched.setattr(time, "sleep", look_again)
                main(words[1:])
        except SystemExit as end:
            if end.code != (130 if words[1] == "watch" else None):
                pytest.fail(f"{command}: {capsys.readouterr().err}")
    assert "complete" in capsys.readouterr().out
    assert Path("model-complexity.ckpt").is_file()
    assert len(pd.read_csv("arriving/watch.csv")) == 1
    assert (run / "report/index.html").is_file()
    assert (here / "results/explain/index.html").is_file()
    assert len(pd.read_csv(run / "results.csv")) == 3
