# SPDX-License-Identifier: Apache-2.0
"""A seed is a seed: what a command draws can be drawn again."""

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from model_helpers import BACKBONE, data
from PIL import Image

from anomalib_flowood.cli import main
from anomalib_flowood.cli.commands import FlowoodCLI

FLOW = {"max_epochs": 1, "coupling_layers": 4, "hidden_channels": 8}
NETWORK = {"backbone": BACKBONE, "pre_trained": False, "subspace_dim": 4}
DETECTORS = {
    "PixelFlow": {"image_size": [12, 12], "channels": 1, "bottleneck_dim": 2},
    "EmbeddingFlow": {**NETWORK, "image_size": [32, 32]},
    "FeatureMapFlow": {**NETWORK, "image_size": [48, 48], "map_layers": [1, 2], "bank_size": 50, "visualizer": False},
}


def config(path: Path, detector: str, data_module: str, **arguments) -> list[str]:
    content = {
        "model": {"class_path": f"anomalib_flowood.{detector}", "init_args": {**FLOW, **DETECTORS[detector]}},
        "data": {"class_path": data_module, "init_args": arguments},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return ["--config", str(path)]


def disturb() -> None:
    """What a process has drawn before must not matter."""
    random.seed()
    np.random.seed(None)  # noqa: NPY002 (the global generator is the one to seed)
    torch.seed()


def state(checkpoint: Path) -> dict[str, bytes]:
    """The checkpoint's numbers, bit by bit: NaN equals itself."""
    content = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name: value.numpy().tobytes() for name, value in content.items()}


@pytest.mark.parametrize("detector", DETECTORS)
def test_two_trainings_with_a_seed_are_identical(detector, tmp_path, monkeypatch):
    data(tmp_path)
    monkeypatch.chdir(tmp_path)
    sets = {"in_distribution": "ramps", "out_of_distribution": ["squares"], "val_split_ratio": 0.2, "num_workers": 1}
    given = config(tmp_path / "train.yaml", detector, "anomalib_flowood.data.CrossDataset", **sets)
    for folder in ("one", "two"):
        disturb()
        main(["train", *given, "--seed_everything", "7", "--default_root_dir", folder])
    one, two = (next(Path(folder).glob("*/*/*/v0")) for folder in ("one", "two"))
    assert state(one / "weights/lightning/model.ckpt") == state(two / "weights/lightning/model.ckpt")
    assert (one / "scores.csv").read_text() == (two / "scores.csv").read_text()
    assert pd.read_csv(one / "results.csv")["seed"].tolist() == [7]


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """Arguments for images whose validation part anomalib draws, and a detector that was trained without a seed."""
    folder = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for name, mean in [("train", 90), ("good", 90), ("bad", 200)]:
        (folder / name).mkdir()
        for i in range(44):
            pixels = rng.normal(mean, 20, (12, 12, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    split = {"val_split_mode": "from_train", "val_split_ratio": 0.5, "num_workers": 0}
    sets = {
        "name": "tiny",
        "root": str(folder),
        "normal_dir": "train",
        "normal_test_dir": "good",
        "abnormal_dir": "bad",
    }
    given = config(folder / "train.yaml", "PixelFlow", "Folder", **sets, **split)
    main(["train", *given, "--default_root_dir", str(folder / "results")])
    return given, folder / "results/PixelFlow/tiny/v0"


def test_without_a_seed_one_is_drawn_recorded_and_repeats_the_run(folder_run, tmp_path):
    given, run = folder_run
    (seed,) = pd.read_csv(run / "results.csv")["seed"]
    assert 0 <= seed < 2**32
    assert set(pd.read_csv(run / "scores.csv")["seed"]) == {seed}
    assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == seed
    disturb()
    main(["train", *given, "--seed_everything", str(seed), "--default_root_dir", str(tmp_path)])
    again = tmp_path / "PixelFlow/tiny/v0"
    assert state(run / "weights/lightning/model.ckpt") == state(again / "weights/lightning/model.ckpt")
    assert (run / "scores.csv").read_text() == (again / "scores.csv").read_text()
    disturb()
    main(["train", *given, "--default_root_dir", str(tmp_path)])
    other = tmp_path / "PixelFlow/tiny/v1"
    assert pd.read_csv(other / "results.csv")["seed"].tolist() != [seed]
    assert state(run / "weights/lightning/model.ckpt") != state(other / "weights/lightning/model.ckpt")


def test_every_command_with_a_model_takes_the_seed(folder_run, tmp_path, monkeypatch):
    given, run = folder_run
    monkeypatch.chdir(tmp_path)
    checkpoint = ["--ckpt_path", str(run / "weights/lightning/model.ckpt")]
    for command, *arguments in (
        ["train"],
        ["fit"],
        ["validate", *checkpoint],
        ["test", *checkpoint],
        ["predict", *checkpoint],
        ["export", *checkpoint, "--export_type", "torch"],
        ["score", *checkpoint, "--score", "typicality"],
        ["explain", *checkpoint],
    ):
        disturb()
        FlowoodCLI([command, *given, *arguments, "--seed_everything", "4294967295"], run=False)
        assert torch.initial_seed() == 4294967295, command
    drawn = []
    for _ in range(2):
        disturb()
        FlowoodCLI(["fit", *given, "--seed_everything", "7"], run=False)
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
    assert drawn[0] == drawn[1]


def test_two_scores_with_a_seed_are_identical(folder_run, tmp_path, monkeypatch):
    given, run = folder_run
    monkeypatch.chdir(tmp_path)
    given = [*given, "--ckpt_path", str(run / "weights/lightning/model.ckpt"), "--score", "typicality"]
    for name in ("one.ckpt", "two.ckpt"):
        disturb()
        main(["score", *given, "--seed_everything", "7", "--output", name])
    assert state(Path("one.ckpt")) == state(Path("two.ckpt"))


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_that_numpy_cannot_take(seed, folder_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["train", *folder_run[0], "--seed_everything", seed])
    assert caught.value.code == 1
    assert (
        f"seed_everything has to be an integer from 0 to 4294967295 (32 bits), got {seed}." in capsys.readouterr().err
    )
