# SPDX-License-Identifier: Apache-2.0
"""The command line end to end: config file, train, test, predict, export; and anomalib's own with our class paths."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from model_helpers import BACKBONE, data

from anomalib_flowood.cli import main

REPOSITORY = Path(__file__).parents[1]
TRAINER = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture
def here(tmp_path, monkeypatch):
    data(tmp_path)  # writes ramps/ and squares/
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_config(path: Path, detector: str, **init_args) -> Path:
    config = {
        "model": {"class_path": detector, "init_args": {"max_epochs": 2, **init_args}},
        "data": {
            "class_path": "anomalib_flowood.data.CrossDataset",
            "init_args": {"in_distribution": "ramps", "out_of_distribution": ["squares"], "val_split_ratio": 0.2},
        },
        "trainer": TRAINER,
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


PIXELS = {"image_size": [12, 12], "channels": 1, "coupling_layers": 4, "hidden_channels": 16, "bottleneck_dim": 3}
EMBEDDINGS = {"backbone": BACKBONE, "pre_trained": False, "image_size": [32, 32], "subspace_dim": 8}


def test_a_metric_that_nobody_logs_is_named_beside_those_that_are_there(here, capsys):
    config = write_config(here / "pixels.yaml", "anomalib_flowood.PixelFlow", **PIXELS)
    settings = yaml.safe_load(config.read_text())
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val_bitz"}}
    settings["trainer"] = {**TRAINER, "callbacks": [stopping]}
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit, match="1"):
        main(["train", "--config", str(config)])
    err = capsys.readouterr().err
    assert "`val_bitz` which is not available" in err
    assert "`val_loss`" in err
    assert "Traceback" not in err


def test_train_test_predict_and_export(here, capsys):
    config = write_config(here / "pixels.yaml", "anomalib_flowood.PixelFlow", **PIXELS)
    main(["train", "--config", str(config)])
    assert "image_AUROC" in capsys.readouterr().out
    checkpoint = "results/PixelFlow/CrossDataset/ramps-squares/latest/weights/lightning/model.ckpt"

    main(["test", "--config", str(config), "--ckpt_path", checkpoint])
    out = capsys.readouterr().out
    assert "image_FPR95" in out
    run = Path(out.partition("As a page: flowood report ")[2].splitlines()[0])
    (results,) = pd.read_csv(run / "results.csv").to_dict("records")
    printed = re.search(r"image_AUROC\W+([\d.]+)", out)
    assert results["AUROC"] == pytest.approx(float(printed[1]))
    scores = pd.read_csv(run / "scores.csv")
    alarms = int((scores.loc[scores["label"] == 0, "score"] > results["threshold"]).sum())
    assert results["alpha"] == 0.05
    main(["report", str(run)])
    page = (run / "report" / "index.html").read_text()
    assert "<h1>Test of PixelFlow on CrossDataset ramps-squares</h1>" in page
    assert page.count("data:image/png") == len(scores) == 80  # all of so few
    assert f"At α = 0.05: {alarms} of {(scores['label'] == 0).sum()} inside images raise an alarm" in page
    assert str(Path(checkpoint).resolve()) in page
    capsys.readouterr()

    main(["predict", "--config", str(config), "--ckpt_path", checkpoint])
    out = capsys.readouterr().out
    assert "Most anomalous of 80 images" in out
    (path,) = here.rglob("predictions.csv")
    predictions = pd.read_csv(path)
    assert set(predictions["source"]) == {"ramps", "squares"}
    assert predictions["pred_score"].between(0, 1).all()
    assert (predictions["pred_label"] == (predictions["p_value"] < 0.05)).all()
    assert predictions.sort_values("raw_score")["pred_score"].is_monotonic_increasing
    assert "the 24 calibration images" in out
    drift = float(out.partition("Drift: p = ")[2].partition(",")[0])
    assert drift < 0.001  # half of them are squares
    assert predictions.sort_values("pred_score").tail(20)["source"].eq("squares").all()

    model = ["--model", "PixelFlow", *(f"--model.{key}={value}" for key, value in PIXELS.items())]
    export = ["export", *model, "--ckpt_path", checkpoint, "--export_type", "torch"]
    main([*export, "--export_root", "results", "--no-check"])  # the folder of all runs, if that is what one wants
    assert (here / "results" / "weights" / "torch" / "model.pt").is_file()
    assert "Check of" not in capsys.readouterr().out
    main(export)
    beside = Path(checkpoint).parents[1] / "torch" / "model.pt"
    assert beside.is_file()
    assert f"Check of {beside}: largest differences from PyTorch on 10 normal images: raw score 0, score 0" in (
        capsys.readouterr().out
    )


def test_a_trial_ends_well_and_keeps_nothing(here, capsys):
    config = write_config(here / "pixels.yaml", "anomalib_flowood.PixelFlow", **PIXELS)
    main(["train", "--config", str(config), "--trainer.fast_dev_run", "true"])
    out = capsys.readouterr().out
    assert "Nothing is kept of a trial with fast_dev_run" in out
    assert "Next:" not in out
    assert not [path for path in (here / "results").rglob("*") if path.is_file()]


def test_anomalibs_own_command_takes_our_class_paths(here):
    config = write_config(here / "embeddings.yaml", "anomalib_flowood.EmbeddingFlow", **EMBEDDINGS)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "anomalib"), "train", "--config", str(config)],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "image_AUROC" in done.stdout


@pytest.mark.parametrize("model", sorted((REPOSITORY / "configs" / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_model_configs_train_on_the_data_config(model, here, capsys):
    given = yaml.safe_load(model.read_text(encoding="utf-8"))["model"]["init_args"]
    small = [f"--model.backbone={BACKBONE}", "--model.pre_trained=false"] if "backbone" in given else []
    small += ["--model.image_size=[128, 128]"] if "backbone" in given else []
    small += ["--model.subspace_dim=16"] if "subspace_dim" in given else []
    folders = ["--data.in_distribution=ramps", "--data.out_of_distribution=[squares]", "--data.val_split_ratio=0.2"]
    config = ["--config", str(model), "--data", str(REPOSITORY / "configs" / "data" / "cross_dataset.yaml")]
    main(["train", *config, *small, *folders, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"])
    assert "image_AUROC" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["watch", "model.ckpt", ""], "An argument"),
        (["watch", "model.ckpt", ".", "--aside", ""], "--aside"),
        (["predict", "--ckpt_path=model.ckpt", "--data", ""], "--data"),
        (["predict", "--ckpt_path=model.ckpt", "--data", "a", "--output="], "--output"),
        (["configs", ""], "An argument"),
    ],
)
def test_empty_arguments_are_not_the_folder_in_which_the_command_runs(args, name, here, capsys):
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        main(args)
    assert f"flowood: {name} is empty. Is it a variable of the shell that is not set?" in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model=PixelFlow", "--model.mask=cicle"], "Unknown mask 'cicle'. Did you mean 'cycle'"),
        (["--model=EmbeddingFlow", "--model.backbone=resnet188"], "Did you mean 'resnet18'"),
        (["--model=PixelFlow", "--data.in_distribution=fashion_mnst"], "Did you mean 'fashion_mnist'"),
        (["--model=PixelFlow", "--data.in_distribution=./nowhere"], "There is no folder nowhere"),
        (["--model=PixelFlow", "--trainer.devices=x"], "flowood: The trainer cannot be set up so: `devices`"),
    ],
)
def test_users_errors_are_one_message(args, message, here, capsys):
    base = ["--data=CrossDataset", "--data.in_distribution=ramps", "--data.out_of_distribution=[squares]"]
    with pytest.raises(SystemExit) as caught:
        main(["train", *base, *args, "--trainer.accelerator=cpu"])
    assert caught.value.code in {1, 2}
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
