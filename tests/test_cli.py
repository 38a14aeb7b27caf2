# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from anomalib_flowood import OneClass, PixelFlow, open_checkpoint
from anomalib_flowood.benchmark import Benchmark
from anomalib_flowood.cli import main
from anomalib_flowood.cli.commands import FlowoodCLI
from anomalib_flowood.cli.subcommands import SUBCOMMANDS, Subcommand
from anomalib_flowood.report.predictions import keep_predictions


def test_version_and_help_do_not_import_anomalib():
    code = (
        "import sys; from anomalib_flowood.cli import main; main(['--version']); main(['--help']);"
        "assert 'torch' not in sys.modules and 'anomalib' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.startswith("flowood ")
    for name in SUBCOMMANDS:
        assert f"\n  {name} " in out


def test_run_as_a_module():
    command = [sys.executable, "-m", "anomalib_flowood"]
    assert "anomalib 2." in subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout
    bare = subprocess.run(command, check=False, capture_output=True, text=True)
    assert bare.returncode == 2
    assert "usage: flowood" in bare.stderr


def test_the_help_lists_what_the_parser_has():
    cli = FlowoodCLI(["backbone", "resnet18", "somewhere"], run=False)
    assert set(cli.subcommand_parsers) == set(SUBCOMMANDS)


def test_a_subcommand_is_one_entry_and_its_methods(monkeypatch, capsys):
    class Dancer(FlowoodCLI):
        def add_dance_arguments(self, parser: ArgumentParser) -> None:
            parser.add_argument("--steps", type=int, default=3)

        def dance(self) -> None:
            print(f"{self.config['dance']['steps']} steps")

    monkeypatch.setitem(SUBCOMMANDS, "dance", Subcommand("Show that one entry is enough.", ours=True))
    main(["--help"])
    assert "  dance      Show that one entry is enough." in capsys.readouterr().out
    Dancer(["dance"])
    assert capsys.readouterr().out == "3 steps\n"


def test_the_benchmark_is_ours():
    from anomalib.cli.pipelines import PIPELINE_REGISTRY

    FlowoodCLI(["backbone", "resnet18", "somewhere"], run=False)
    assert PIPELINE_REGISTRY is not None
    assert PIPELINE_REGISTRY["benchmark"] is Benchmark


def test_backbone_says_how_to_use_it(monkeypatch, capsys):
    import anomalib_flowood.features

    calls = []
    monkeypatch.setattr(
        anomalib_flowood.features,
        "save_local",
        lambda name, folder: calls.append((name, folder)) or folder,
    )
    main(["backbone", "resnet18", "nets/r18"])
    assert calls == [("resnet18", Path("nets/r18"))]
    assert "backbone: local-dir:nets/r18" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["benchmark", "--config", "gone"], "flowood: There is no configuration file gone."),
        (["backbone", "no_such_net", "x"], "flowood: Unknown backbone 'no_such_net'."),
    ],
)
def test_a_users_error_is_one_message(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWOOD_DEBUG", raising=False)
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    assert exit_info.value.code == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("flowood:")]) == 1

    monkeypatch.setenv("FLOWOOD_DEBUG", "1")
    with pytest.raises((ValueError, FileNotFoundError)):
        main(args)


def test_a_wrong_option_ends_with_status_two(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["benchmark", "--confg", "x.yaml"])
    assert exit_info.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_train_then_predict(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, mean in [("train", 90), ("good", 90), ("bad", 200)]:
        (tmp_path / name).mkdir()
        for i in range(12 if name == "bad" else 6):
            pixels = np.clip(rng.normal(mean, 20, (32, 32, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    model = (
        "model: {class_path: Dfm, init_args: {backbone: test_resnet, layer: layer1, pre_trained: false, "
        "visualizer: false, pooling_kernel_size: 4}}\n"
    )
    Path("train.yaml").write_text(
        f"{model}data: {{class_path: Folder, init_args: {{name: tiny, root: {tmp_path}, normal_dir: train, "
        "normal_test_dir: good, abnormal_dir: bad, num_workers: 0, train_batch_size: 6}}\n"
        "trainer: {enable_progress_bar: false}\n",
    )
    Path("predict.yaml").write_text(f"{model}data: {tmp_path / 'bad'}\ntrainer: {{enable_progress_bar: false}}\n")
    main(["train", "--config", "train.yaml"])
    (checkpoint,) = (tmp_path / "results").rglob("v0/**/model.ckpt")
    capsys.readouterr()
    main(["predict", "--config", "predict.yaml", "--ckpt_path", str(checkpoint)])
    (path,) = (tmp_path / "results").rglob("predictions.csv")
    frame = pd.read_csv(path)
    assert list(frame.columns) == ["image_path", "pred_score", "pred_label"]
    assert len(frame) == 12
    assert set(frame["pred_label"]) <= {0, 1}
    out = capsys.readouterr().out
    assert "Most anomalous of 12 images" in out
    assert f"All predictions: {path}" in out


@pytest.fixture(scope="module")
def pixel_flow_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config file and the checkpoint of a small PixelFlow trained with it."""
    folder = tmp_path_factory.mktemp("pixel_flow")
    rng = np.random.default_rng(0)
    for name, mean in [("train", 90), ("good", 90), ("bad", 200)]:
        (folder / name).mkdir()
        for i in range(20):
            pixels = np.clip(rng.normal(mean, 20, (16, 16, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    config = folder / "train.yaml"
    config.write_text(
        "model: {class_path: anomalib_flowood.PixelFlow, init_args: {image_size: [8, 8], channels: 1, "
        "coupling_layers: 4, hidden_channels: 8, bottleneck_dim: 2, max_epochs: 1}}\n"
        f"data: {{class_path: Folder, init_args: {{name: tiny, root: {folder}, normal_dir: train, "
        "normal_test_dir: good, abnormal_dir: bad, num_workers: 0, val_split_mode: same_as_test}}\n"
        f"default_root_dir: {folder / 'results'}\n"
        "trainer: {accelerator: cpu, enable_progress_bar: false}\n",
    )
    main(["train", "--config", str(config)])
    (checkpoint,) = (folder / "results").rglob("v0/**/model.ckpt")
    return config, checkpoint


def test_images_that_set_the_threshold_are_no_others_that_it_is_tried_on(pixel_flow_run, tmp_path, capsys):
    config, trained = pixel_flow_run
    checkpoint = Path(shutil.copy(trained, tmp_path))
    main(["test", "--config", str(config), "--default_root_dir", str(tmp_path), "--ckpt_path", str(checkpoint)])
    out = " ".join(capsys.readouterr().out.split())
    assert "of 20 normal images raise an alarm (" in out
    assert "Validation and test images are the same (val_split_mode same_as_test): the threshold is from them" in out
    assert "expected" not in out
    assert "held-out" not in out
    (results,) = tmp_path.rglob("results.csv")
    (row,) = pd.read_csv(results).to_dict("records")
    assert row["judged_twice"] == 20
    assert "level" not in row
    assert "are the same" in json.loads(results.with_name("run.json").read_text())["settings"]["decision"]


def test_data_without_validation_images_say_which_option_gives_some(pixel_flow_run, tmp_path, capsys, caplog):
    config, checkpoint = pixel_flow_run
    given = ["--config", str(config), "--default_root_dir", str(tmp_path), "--data.val_split_mode", "none"]
    said = "Folder has no validation images (val_split_mode none): set val_split_mode from_train"
    for command in (
        ["train"],
        ["train", "--data.test_split_mode", "none"],
        ["validate", "--ckpt_path", str(checkpoint)],
    ):
        with pytest.raises(SystemExit) as ended:
            main([command[0], *given, *command[1:]])
        assert ended.value.code == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", *given, "--data.val_split_mode", "from_dir"])
    assert "Folder has no validation images (val_split_mode from_dir): set" in capsys.readouterr().err
    main(["fit", *given, "--trainer.limit_val_batches", "0"])
    assert "Next: flowood predict" in capsys.readouterr().out
    assert "The fit ended without a calibration" in caplog.text


def test_a_validation_calibrates_a_checkpoint_that_had_none(pixel_flow_run, tmp_path, capsys):
    config, trained = pixel_flow_run
    content = torch.load(trained, weights_only=False)
    empty = {name: value[:0] for name, value in content["state_dict"].items() if "post_processor.calib" in name}
    content["state_dict"].update(empty)
    bare, written = tmp_path / "bare.ckpt", tmp_path / "bare-calibrated.ckpt"
    torch.save(content, bare)
    given = ["validate", "--config", str(config), "--default_root_dir", str(tmp_path), "--ckpt_path"]
    main([*given, str(bare)])
    assert f"Checkpoint, with the calibration: {os.path.relpath(written)}\n" in capsys.readouterr().out
    calibration = open_checkpoint(written).post_processor.calibration
    torch.testing.assert_close(calibration, open_checkpoint(trained).post_processor.calibration)
    main([*given, str(written)])
    assert "with the calibration" not in capsys.readouterr().out
    assert not (tmp_path / "bare-calibrated-calibrated.ckpt").exists()


def test_a_validation_on_other_images_calibrates_anew(pixel_flow_run, tmp_path, capsys):
    """The new calibration was thrown away without a word."""
    config, trained = pixel_flow_run
    given, written = tmp_path / "model.ckpt", tmp_path / "model-calibrated.ckpt"
    shutil.copy(trained, given)
    common = ["--config", str(config), "--default_root_dir", str(tmp_path), "--ckpt_path", str(given)]
    main(["validate", *common])
    assert not written.exists()
    main(["validate", *common, "--data.val_split_mode", "from_train", "--data.val_split_ratio", "0.5"])
    before, now = (open_checkpoint(path).post_processor.calibration for path in (given, written))
    assert len(now) == 10
    said = capsys.readouterr().out
    assert f"Checkpoint, with the calibration: {os.path.relpath(written)}\n" in said
    assert f"It is based on {len(now)} normal images instead of {len(before)}, and valid if the training had" in said


def test_a_logger_of_its_own_does_not_take_the_configuration_away(pixel_flow_run, tmp_path):
    config, _ = pixel_flow_run
    logger = json.dumps({"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}})
    root = tmp_path / "results"
    main(["fit", "--config", str(config), "--default_root_dir", str(root), "--trainer.logger", logger])
    (kept,) = root.rglob("v0/config.yaml")
    (of_logger,) = (tmp_path / "lightning_logs").rglob("config.yaml")
    assert kept.read_text() == of_logger.read_text()


def test_explain_writes_a_page(pixel_flow_run, tmp_path, capsys):
    config, checkpoint = pixel_flow_run
    output = tmp_path / "new" / "page"
    # The configuration that it was trained with serves; and since the checkpoint holds it, so does the class alone.
    for more in ([], ["--model", "PixelFlow"]):
        arguments = ["--ckpt_path", str(checkpoint), "--output", str(output), "--max_images", "6"]
        main(["explain", "--config", str(config), *more, *arguments])
        assert f"Page: {output / 'index.html'}\n" in capsys.readouterr().out
        sets = json.loads((output / "explain.json").read_text())["sets"]
        assert {name: entry["images"] for name, entry in sets.items()} == {"inside": 6, "outside": 6}
        assert len(sets["outside"]["coadaptation"]["layers"]) == 4
        page = output / "index.html"
        for name in ("histograms", "latents", "scales", "shifts", "coadaptation", "samples"):
            assert f'src="{name}.png"' in page.read_text()
            assert (output / f"{name}.png").stat().st_size > 5000
        page.unlink()


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--ckpt_path", "gone.ckpt"], 1, "There is no checkpoint gone.ckpt."),
        ([], 2, "ckpt_path"),
        (["--model", "Padim", "--ckpt_path", "CHECKPOINT"], 1, "Padim cannot be explained: it is no flow."),
        (["--model", "EmbeddingFlow", "--ckpt_path", "CHECKPOINT"], 1, "written by PixelFlow, so EmbeddingFlow cannot"),
    ],
)
def test_explain_says_what_is_wrong(args, status, message, pixel_flow_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, checkpoint = pixel_flow_run
    args = [str(checkpoint) if arg == "CHECKPOINT" else arg for arg in args]
    with pytest.raises(SystemExit) as exit_info:
        main(["explain", "--config", str(config), *args])
    assert exit_info.value.code == status
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_score_gives_a_checkpoint_another_score(pixel_flow_run, tmp_path, capsys, caplog):
    config, trained = pixel_flow_run
    checkpoint = Path(shutil.copy(trained, tmp_path))
    before = PixelFlow.load_from_checkpoint(checkpoint)
    caplog.clear()
    given = ["score", "--config", str(config)]
    main([*given, "--score", "typicality", "--ckpt_path", str(checkpoint)])
    written = tmp_path / "model-typicality.ckpt"
    assert f"Checkpoint: {written}\n" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [written, checkpoint]
    assert "left behind" not in caplog.text  # the score is fitted, and calibrated, by the same command
    torch.load(written, weights_only=True)
    detector = PixelFlow.load_from_checkpoint(written)
    assert detector.model.scorer.name == "typicality"
    # Calibrated anew, from the same validation images, by how far their -log p is from the mean.
    likelihoods, calibration = before.post_processor.calibration, detector.post_processor.calibration
    expected = (likelihoods - detector.model.scorer.mean).abs().sort().values
    torch.testing.assert_close(calibration, expected, rtol=1e-4, atol=1e-5)
    # The class alone serves, and a scored checkpoint may be scored again; elsewhere.
    output = tmp_path / "new" / "states.ckpt"
    more = ["--model", "PixelFlow", "--score", "density_of_states", "--output", str(output)]
    main([*given, *more, "--ckpt_path", str(written)])
    assert f"Checkpoint: {output}\n" in capsys.readouterr().out
    again = PixelFlow.load_from_checkpoint(output)
    assert again.model.scorer.ready
    assert len(again.post_processor.calibration) == 20
    for name, weight in before.model.flow.state_dict().items():
        assert torch.equal(again.model.flow.state_dict()[name], weight)

    main(["test", "--config", str(config), "--model.score", "typicality", "--ckpt_path", str(written)])
    assert "image_F1Score" in capsys.readouterr().out  # there are labels, so that the calibration is there


def test_the_page_on_scores_gives_one_from_python(pixel_flow_run, tmp_path, monkeypatch):
    """Of images of several sizes, too, which no batch holds as they are."""
    page = (Path(__file__).parents[1] / "docs" / "scores.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?fit_score.*?)```", page, re.DOTALL)
    shutil.copy(pixel_flow_run[1], tmp_path)
    (tmp_path / "parts").mkdir()
    for number in range(60):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number % 2, 18), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "parts" / f"{number:02}.png")
    monkeypatch.chdir(tmp_path)
    names = {"datamodule": OneClass(tmp_path / "parts")}
    exec(code, names)
    detector = names["detector"]
    assert detector.model.scorer.name == "typicality"
    assert detector.model.scorer.ready
    assert len(detector.post_processor.calibration)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--score", "typicality", "--ckpt_path", "gone.ckpt"], 1, "There is no checkpoint gone.ckpt."),
        (["--ckpt_path", "CHECKPOINT"], 2, "score"),
        (["--score", "typical", "--ckpt_path", "CHECKPOINT"], 1, "Unknown score 'typical'. Did you mean 'typicality'"),
        (["--score", "ensemble", "--ckpt_path", "CHECKPOINT"], 1, "flows that train together"),
        (
            ["--model", "FeatureMapFlow", "--score", "nll", "--ckpt_path", "CHECKPOINT"],
            1,
            "FeatureMapFlow takes no other score. Detectors that do: EmbeddingFlow, PixelFlow.",
        ),
        (["--model", "Padim", "--score", "nll", "--ckpt_path", "CHECKPOINT"], 1, "Padim takes no other score"),
        (
            ["--model", "EmbeddingFlow", "--score", "typicality", "--ckpt_path", "CHECKPOINT"],
            1,
            "written by PixelFlow, so EmbeddingFlow cannot",
        ),
    ],
)
def test_score_says_what_is_wrong(args, status, message, pixel_flow_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, trained = pixel_flow_run
    before = sorted(trained.parent.iterdir())
    args = [str(trained) if arg == "CHECKPOINT" else arg for arg in args]
    with pytest.raises(SystemExit) as exit_info:
        main(["score", "--config", str(config), *args])
    assert exit_info.value.code == status
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
    assert sorted(trained.parent.iterdir()) == before


def test_predictions_with_sources_and_without_labels(tmp_path, capsys):
    batch = SimpleNamespace(
        image_path=["a.png", "b.png"],
        source=["mnist", "kmnist"],
        pred_score=torch.tensor([1.0, 2.0]),
        pred_label=None,
    )
    path, findings = keep_predictions([[batch], [batch]], tmp_path / "new")  # a list for each data loader
    assert findings == {}
    assert path == tmp_path / "new" / "predictions.csv"
    frame = pd.read_csv(path)
    assert list(frame.columns) == ["image_path", "source", "pred_score", "pred_label"]
    assert list(frame["source"]) == ["mnist", "kmnist"] * 2
    out = capsys.readouterr().out
    assert out.index("b.png") < out.index("a.png")
    assert keep_predictions(None, tmp_path) is None
    assert "nothing to write" in capsys.readouterr().out
