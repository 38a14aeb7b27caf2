# SPDX-License-Identifier: Apache-2.0
"""Where results go: beside the run that they are of, and over nothing."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder, PredictDataset
from model_helpers import TRAINER, data, engine, feature_map_flow, pixel_flow
from PIL import Image

from anomalib_flowood import load, open_checkpoint
from anomalib_flowood.cli import main
from anomalib_flowood.engine import RunEngine, new_folder, run_folder
from anomalib_flowood.models.components import root_beside


def run_engine(folder: Path, **kwargs) -> RunEngine:
    return RunEngine(default_root_dir=folder, **{**TRAINER, **kwargs})


def break_training(monkeypatch, detector, error=ArithmeticError):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(detector, "training_step", fail)
    return detector


@pytest.mark.parametrize("command", ["fit", "train"])
def test_a_failed_fit_leaves_latest_as_it_was(command, tmp_path, monkeypatch):
    sets = data(tmp_path)
    runs = tmp_path / "results/PixelFlow/CrossDataset/ramps-squares"
    broken = break_training(monkeypatch, pixel_flow())
    with pytest.raises(ArithmeticError):
        getattr(run_engine(tmp_path / "results"), command)(broken, datamodule=sets)
    assert not runs.exists()  # nor does an empty folder stay

    run_engine(tmp_path / "results").fit(pixel_flow(max_epochs=1), datamodule=sets)
    latest = runs / "latest"
    assert latest.resolve() == runs / "v0"
    for error in (ArithmeticError, KeyboardInterrupt):  # Lightning makes the latter an exit
        broken = break_training(monkeypatch, pixel_flow(), error)
        with pytest.raises((ArithmeticError, SystemExit)):
            getattr(run_engine(tmp_path / "results"), command)(broken, datamodule=sets)
        assert latest.resolve() == runs / "v0"
    run_engine(tmp_path / "results", fast_dev_run=True).fit(pixel_flow(), datamodule=sets)  # writes no weights
    assert latest.resolve() == runs / "v0"
    assert (latest / "weights/lightning/model.ckpt").is_file()

    # Training that fails late has left weights.
    late = pixel_flow(max_epochs=3)
    monkeypatch.setattr(late, "on_train_epoch_start", lambda: late.current_epoch == 2 and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_engine(tmp_path / "results").fit(late, datamodule=sets)
    assert latest.resolve() == runs / "v1"
    assert (latest / "weights/lightning/model.ckpt").is_file()


@pytest.mark.parametrize("command", ["fit", "train"])
def test_a_fit_that_no_validation_followed_leaves_a_checkpoint(command, tmp_path):
    engine = run_engine(tmp_path / "results", check_val_every_n_epoch=5)
    getattr(engine, command)(pixel_flow(max_epochs=2), datamodule=data(tmp_path))
    runs = tmp_path / "results/PixelFlow/CrossDataset/ramps-squares"
    checkpoint = runs / "v0/weights/lightning/model.ckpt"
    assert engine.best_model_path == str(checkpoint)
    assert (runs / "latest").resolve() == runs / "v0"
    assert not open_checkpoint(checkpoint).post_processor.calibrated
    # It is of a training that can go on.
    longer = run_engine(tmp_path / "results")
    longer.fit(pixel_flow(max_epochs=3), datamodule=data(tmp_path), ckpt_path=checkpoint)
    assert open_checkpoint(longer.best_model_path).post_processor.calibrated


@pytest.mark.parametrize("resumed_by", [engine, run_engine])
@pytest.mark.parametrize("limits", [{"check_val_every_n_epoch": 5}, {"check_val_every_n_epoch": 5, "max_steps": 4}])
def test_so_does_one_that_was_resumed(resumed_by, limits, tmp_path):
    first = run_engine(tmp_path / "results")
    first.fit(pixel_flow(max_epochs=1), datamodule=data(tmp_path))
    longer = resumed_by(tmp_path if resumed_by is engine else tmp_path / "results", **limits)
    detector = pixel_flow(max_epochs=2)
    longer.fit(detector, datamodule=data(tmp_path), ckpt_path=first.best_model_path)
    runs = tmp_path / "results/PixelFlow/CrossDataset/ramps-squares"
    assert longer.best_model_path == str(runs / "v1/weights/lightning/model.ckpt")
    assert (runs / "latest").resolve() == runs / "v1"
    kept = open_checkpoint(longer.best_model_path)
    assert not kept.post_processor.calibrated
    for name, value in detector.model.state_dict().items():
        assert torch.equal(value, kept.model.state_dict()[name]), name
    # One that had ended leaves none, and says so.
    over = resumed_by(tmp_path if resumed_by is engine else tmp_path / "results")
    over.fit(pixel_flow(max_epochs=1), datamodule=data(tmp_path), ckpt_path=first.best_model_path)
    assert over.best_model_path == first.best_model_path
    assert not list((runs / "v2").rglob("*.ckpt"))


def test_what_a_callback_has_chosen_before_a_resumed_fit_stays_chosen(tmp_path):
    def chosen(**limits):
        return run_engine(
            tmp_path / "results", callbacks=[ModelCheckpoint(tmp_path / "kept", "best", monitor="val_loss")], **limits
        )

    first = chosen()
    first.fit(pixel_flow(max_epochs=1), datamodule=data(tmp_path))
    longer = chosen(check_val_every_n_epoch=5)
    longer.fit(pixel_flow(max_epochs=2), datamodule=data(tmp_path), ckpt_path=first.best_model_path)
    assert longer.best_model_path == first.best_model_path == str(tmp_path / "kept/best.ckpt")


@pytest.mark.parametrize("made_by", [engine, run_engine])
def test_the_checkpoint_that_save_last_leaves_without_a_validation_is_named(made_by, tmp_path):
    last = ModelCheckpoint(tmp_path / "kept", save_last=True)
    run = made_by(tmp_path, callbacks=[last], check_val_every_n_epoch=5)
    run.fit(pixel_flow(max_epochs=2), datamodule=data(tmp_path))
    assert run.best_model_path == str(tmp_path / "kept/last.ckpt")
    assert open_checkpoint(run.best_model_path)


@pytest.mark.parametrize(
    ("limits", "earlier"),
    [
        ({"check_val_every_n_epoch": 2, "max_epochs": 3}, True),
        ({"max_steps": 5}, False),
        ({"check_val_every_n_epoch": 2, "max_epochs": 4}, False),
        ({"check_val_every_n_epoch": 5, "max_epochs": 3}, False),  # the end itself is kept
    ],
)
def test_that_a_checkpoint_is_of_earlier_weights_is_said(limits, earlier, tmp_path, caplog):
    run = run_engine(tmp_path / "results", **limits)
    detector = pixel_flow()
    run.fit(detector, datamodule=data(tmp_path))
    kept = torch.load(run.best_model_path, weights_only=False)["global_step"]
    assert (kept < run.trainer.global_step) == earlier
    said = [
        text for text in caplog.messages if text.startswith(f"The checkpoint {run.best_model_path} is of step {kept}")
    ]
    assert len(said) == earlier
    assert all(f"is of step {run.trainer.global_step}." in text for text in said)


def test_a_folder_that_goes_while_checkpoints_are_looked_for_hides_none(tmp_path, monkeypatch):
    """Checkpoints are written in one, which is gone a moment later."""
    engine = RunEngine(default_root_dir=tmp_path)
    engine._new = tmp_path
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.ckpt").touch()
    (tmp_path / "weights" / ".flowood-0").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "weights", target_is_directory=True)
    scandir = os.scandir

    def gone(path):
        if str(path).endswith("-0"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", gone)
    assert engine.kept_checkpoint() == tmp_path / "weights" / "model.ckpt"
    with pytest.raises(FileNotFoundError, match=r"Name one of what lies below it: \S+weights.model\.ckpt$"):
        load(tmp_path)


def test_an_engine_that_has_ended_a_fit_takes_no_other(tmp_path):
    run = run_engine(tmp_path / "results")
    first = pixel_flow(max_epochs=1)
    run.fit(first, datamodule=data(tmp_path))
    for detector in (pixel_flow(max_epochs=1), pixel_flow(max_epochs=3), first):
        with pytest.raises(ValueError, match=r"would go on from its epoch 1: PixelFlow would not .* Make a new Engine"):
            run.fit(detector, datamodule=data(tmp_path))
    # Lightning's way to train on, which is no other fit.
    run.trainer.fit_loop.max_epochs = 2
    with pytest.raises(ValueError, match="Make a new Engine"):
        run.fit(pixel_flow(), datamodule=data(tmp_path))
    run.fit(first, datamodule=data(tmp_path))
    assert run.trainer.current_epoch == 2


def test_a_trial_leaves_no_checkpoint(tmp_path):
    run_engine(tmp_path / "results", fast_dev_run=True).fit(pixel_flow(), datamodule=data(tmp_path))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_folder_called_latest_is_no_link(tmp_path):
    folder = tmp_path / "results/PixelFlow/CrossDataset/ramps-squares/latest"
    folder.mkdir(parents=True)
    with pytest.raises(FileExistsError, match="latest is a folder, where a link to the newest run has to be"):
        run_engine(tmp_path / "results").fit(pixel_flow(), datamodule=data(tmp_path))


def test_the_folder_that_a_checkpoint_belongs_to(tmp_path, monkeypatch):
    run = tmp_path / "results/PixelFlow/tiny/v3"
    checkpoint = run / "weights/lightning/model.ckpt"
    checkpoint.parent.mkdir(parents=True)
    latest = run.parent / "latest"
    latest.symlink_to(run)
    root = tmp_path / "results"
    assert run_folder(latest / "weights/lightning/model.ckpt", root, "PixelFlow") == run
    assert run_folder(checkpoint, tmp_path / "other", "PixelFlow") == tmp_path / "other/PixelFlow"
    assert run_folder(tmp_path / "results/model.ckpt", root, "PixelFlow") == root / "PixelFlow"
    assert run_folder(None, root, "PixelFlow") == root / "PixelFlow"
    default = tmp_path / "other"
    assert run_folder(checkpoint, default, "PixelFlow", chosen=False) == run
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert run_folder(checkpoint, default, "PixelFlow", chosen=False) == default / "PixelFlow"


def test_a_new_folder_is_new(tmp_path):
    folders = [new_folder(tmp_path / "a" / "b") for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() for folder in folders)


def write_images(folder: Path, count: int, mean: float) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.normal(mean, 20, (16, 16, 3)).clip(0, 255).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{number:03}.png")


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A folder with a configuration file and two runs."""
    folder = tmp_path_factory.mktemp("runs")
    data(folder)
    model = {"image_size": [12, 12], "channels": 1, "coupling_layers": 4, "hidden_channels": 8, "max_epochs": 1}
    sets = {"in_distribution": "ramps", "out_of_distribution": ["squares"], "val_split_ratio": 0.2}
    content = {
        "model": {"class_path": "PixelFlow", "init_args": {**model, "bottleneck_dim": 2}},
        "data": {"class_path": "CrossDataset", "init_args": sets},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    (folder / "detector.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for _ in range(2):
            main(["fit", "--config", "detector.yaml", "--seed_everything", "0"])
    return folder


@pytest.fixture
def trained(two_runs, tmp_path, monkeypatch):
    """The folder of two runs, in a copy of the folder that they are in, which is the current one."""
    shutil.copytree(two_runs, tmp_path / "copy", symlinks=True)
    runs = tmp_path / "copy/results/PixelFlow/CrossDataset/ramps-squares"
    (runs / "latest").unlink()
    (runs / "latest").symlink_to(runs / "v1")
    monkeypatch.chdir(tmp_path / "copy")
    return runs


def test_predictions_go_to_the_run_wherever_it_lies(trained, tmp_path, monkeypatch):
    write_images(tmp_path / "elsewhere/new", 3, 90)
    monkeypatch.chdir(tmp_path / "elsewhere")
    given = ["predict", "--data", "new", "--ckpt_path", str(trained / "v0/weights/lightning/model.ckpt")]
    main([*given, "--trainer.accelerator", "cpu"])
    (folder,) = (trained / "v0/predict").iterdir()
    assert (folder / "predictions.csv").is_file()
    assert [path.name for path in Path.cwd().iterdir()] == ["new"]
    main([*given, "--trainer.accelerator", "cpu", "--default_root_dir", "chosen"])
    assert len(list(Path("chosen").rglob("predictions.csv"))) == 1


def test_predictions_say_which_run_they_belong_to(trained, capsys):
    given = ["--config", "detector.yaml", "--seed_everything", "7"]
    checkpoint = trained / "v0/weights/lightning/model.ckpt"
    for _ in range(2):  # on the same data, with the same checkpoint: nothing is lost
        main(["predict", *given, "--ckpt_path", str(checkpoint)])
    out = capsys.readouterr().out
    folders = sorted((trained / "v0/predict").iterdir())
    assert len(folders) == 2
    assert f"All predictions: {folders[1] / 'predictions.csv'}" in out
    assert f"Data: CrossDataset ramps-squares. Checkpoint: {checkpoint}." in out
    record = json.loads((folders[0] / "run.json").read_text())
    assert record["command"] == "predict"
    decision, drift = (record["settings"].pop(name) for name in ("decision", "drift_p_value"))
    assert record["settings"] == {"checkpoint": str(checkpoint), "seed": 7}
    assert decision in out
    assert 0 <= drift <= 1
    assert record["detectors"]["PixelFlow"]["init_args"]["image_size"] == [12, 12]

    write_images(Path("new"), 3, 90)
    latest = trained / "latest/weights/lightning/model.ckpt"
    main(["predict", *given, "--data", "new", "--ckpt_path", str(latest), "--output", "here/there"])
    assert len(pd.read_csv("here/there/predictions.csv")) == 3
    record = json.loads(Path("here/there/run.json").read_text())
    assert record["data"] == {"new": "new"}
    assert record["settings"]["checkpoint"] == str(trained / "v1/weights/lightning/model.ckpt")
    assert "All predictions: here/there/predictions.csv" in capsys.readouterr().out
    assert sorted(path.name for path in Path("results/PixelFlow").iterdir()) == ["CrossDataset"]
    with pytest.raises(SystemExit):
        main(["predict", *given, "--data", "new", "--ckpt_path", str(checkpoint), "--output", "scores.csv"])
    assert "--output scores.csv has to be a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", *given, "--data", "gone", "--ckpt_path", str(latest)])
    assert not (trained / "v1/predict").exists()


def test_an_explanation_says_which_run_it_belongs_to(trained, capsys):
    checkpoint = ["--ckpt_path", str(trained / "v0/weights/lightning/model.ckpt")]
    main(["explain", "--config", "detector.yaml", *checkpoint, "--max_images", "2"])
    (folder,) = (trained / "v0/explain").iterdir()
    assert f"Page: {folder / 'index.html'}" in capsys.readouterr().out


def test_tests_say_which_run_they_belong_to(trained, capsys):
    main(["test", "--config", "detector.yaml", "--ckpt_path", str(trained / "v0/weights/lightning/model.ckpt")])
    (folder,) = (trained / "v0/test").iterdir()
    assert f"As a page: flowood report {folder}" in capsys.readouterr().out
    assert {"results.csv", "scores.csv", "run.json"} <= {path.name for path in folder.iterdir()}
    assert not list((trained / "v1").glob("*.csv"))
    # On data that it was never trained on, it leaves no folder in the way of a training.
    swapped = ["--data.in_distribution=squares", "--data.out_of_distribution=[ramps]"]
    main(
        ["test", "--config", "detector.yaml", *swapped, "--ckpt_path", str(trained / "v1/weights/lightning/model.ckpt")]
    )
    main(["fit", "--config", "detector.yaml", *swapped])
    assert (trained.with_name("squares-ramps") / "latest/weights/lightning/model.ckpt").is_file()


def pictures(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder / "images").as_posix() for path in (folder / "images").rglob("*.png"))


def test_pictures_do_not_overwrite_each_other(tmp_path, monkeypatch):
    parts = tmp_path / "parts"
    write_images(tmp_path / "train", 25, 90)
    for number, lot in enumerate(("lot1", "lot2")):
        write_images(parts / lot / "good", 1 + number, 90)
        write_images(parts / lot / "bad", 1, 200)
    sets = Folder(
        "tiles", tmp_path / "train", parts, ["lot1/bad", "lot2/bad"], ["lot1/good", "lot2/good"],
        num_workers=0, val_split_mode="from_train", val_split_ratio=0.8, seed=0,
    )  # fmt: skip
    detector = feature_map_flow(image_size=(32, 32), max_epochs=1, visualizer=True)
    trainer = engine(tmp_path)
    trainer.fit(detector, datamodule=sets)
    trainer.test(detector, datamodule=sets)
    run = tmp_path / "results/FeatureMapFlow/tiles/v0"
    expected = ["lot1/bad/000.png", "lot1/good/000.png", "lot2/bad/000.png", "lot2/good/000.png", "lot2/good/001.png"]
    assert pictures(run) == expected
    assert (run / "images/lot1/good/000.png").read_bytes() != (run / "images/lot1/bad/000.png").read_bytes()

    monkeypatch.chdir(parts)  # relative paths, a folder of folders, one folder, one file
    for given, names in (
        (".", expected),
        ("lot1", ["bad/000.png", "good/000.png"]),
        ("lot2/good", ["good/000.png", "good/001.png"]),
        ("lot2/good/001.png", ["good/001.png"]),
    ):
        predictor = engine(tmp_path / "predicted" / given.replace("/", "-"))
        predictor.predict(detector, dataset=PredictDataset(given))
        assert pictures(Path(predictor.trainer.default_root_dir)) == names


def test_a_test_without_anomalies_says_so(trained, capsys):
    write_images(Path("good"), 3, 90)
    data_module = ["--data", "Folder", "--data.name", "good", "--data.root", ".", "--data.normal_dir", "good"]
    data_module += ["--data.normal_test_dir", "good", "--data.num_workers", "0"]
    checkpoint = trained / "v0/weights/lightning/model.ckpt"
    Path("model.yaml").write_text(yaml.safe_dump({"model": yaml.safe_load(Path("detector.yaml").read_text())["model"]}))
    main(["test", "--config", "model.yaml", *data_module, "--ckpt_path", str(checkpoint)])
    out = capsys.readouterr().out
    assert "AUROC, FPR95, AUPROut, AUPRIn, DetectionError are not defined: all test images are normal" in out
    (folder,) = (trained / "v0/test").iterdir()
    header, line = (folder / "results.csv").read_text().splitlines()
    assert dict(zip(header.split(","), line.split(","), strict=True))["AUROC"] == ""
    main(["report", str(folder)])
    assert "not defined" in (folder / "report/index.html").read_text()


@pytest.mark.parametrize("within", [".", "v0", "v0/weights", "v0/weights/lightning"])
def test_an_export_lies_beside_its_checkpoint_wherever_the_command_runs(within, tmp_path, monkeypatch):
    """From within `weights` it went to `lightning/weights`."""
    (tmp_path / "v0/weights/lightning").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / within)
    given = Path(os.path.relpath(tmp_path / "v0/weights/lightning/model.ckpt"))
    assert root_beside(given).absolute() == tmp_path / "v0"
