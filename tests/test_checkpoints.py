# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is enough: its settings serve every command, a broken one is named, no calibration is another's."""

import pickle
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from anomalib.models import Padim
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from model_helpers import BACKBONE, data, embedding_flow, engine, feature_map_flow, pixel_flow

import anomalib_flowood
from anomalib_flowood import FeatureMapFlow, PixelFlow
from anomalib_flowood.cli import main
from anomalib_flowood.engine import RunEngine
from anomalib_flowood.features import weights
from anomalib_flowood.models.components import (
    CheckpointError,
    ConformalPostProcessor,
    FlowModule,
    SettingsError,
    open_checkpoint,
    read_checkpoint,
)

SETTINGS = {
    "backbone": BACKBONE, "pre_trained": False, "map_layers": [1, 2], "score_layers": [2], "image_size": [48, 48],
    "subspace_dim": 4, "layout_dims": 2, "coupling_layers": 2, "hidden_channels": 16, "bottleneck_dim": 3,
    "score_fraction": 0.1, "bank_size": 100, "max_epochs": 1, "visualizer": False,
}  # fmt: skip
MOST = [14, 4]
"""A tenth of the positions of each layer."""
TRAINER = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with images, ``detector.yaml``, ``data.yaml`` and ``model.ckpt``."""
    folder = tmp_path_factory.mktemp("trained")
    data(folder)  # writes ramps/ and squares/
    config = {
        "model": {"class_path": "anomalib_flowood.FeatureMapFlow", "init_args": SETTINGS},
        "data": {
            "class_path": "anomalib_flowood.data.CrossDataset",
            "init_args": {"in_distribution": str(folder / "ramps"), "out_of_distribution": [str(folder / "squares")]},
        },
        "trainer": TRAINER,
        "default_root_dir": str(folder / "results"),
    }
    config["data"]["init_args"] |= {"val_split_ratio": 0.2, "test_limit": 12}
    (folder / "detector.yaml").write_text(yaml.safe_dump(config))
    del config["model"]
    (folder / "data.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(folder / "detector.yaml")])
    (checkpoint,) = (folder / "results").rglob("model.ckpt")
    shutil.copy(checkpoint, folder / "model.ckpt")
    return folder


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """The checkpoint of a small PixelFlow."""
    folder = tmp_path_factory.mktemp("pixels")
    run = engine(folder)
    run.fit(pixel_flow(score="typicality"), datamodule=data(folder))
    return Path(shutil.copy(run.trainer.checkpoint_callback.best_model_path, folder / "typicality.ckpt"))


def predictions(folder, *args):
    """Run ``predict`` and return its table."""
    for old in folder.rglob("predictions*.csv"):
        old.unlink()
    main(["predict", "--config", str(folder / "data.yaml"), "--ckpt_path", str(folder / "model.ckpt"), *args])
    (path,) = folder.rglob("predictions*.csv")
    return pd.read_csv(path)


def error_of(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# -- the checkpoint's settings -----------------------------------------------------------------------------------------


def test_every_way_to_name_the_detector_predicts_alike(trained):
    expected = predictions(trained, "--config", str(trained / "detector.yaml"))
    assert (expected.pred_label[expected.source == "squares"] == 1).mean() > 0.5
    for args in ([], ["--model", "FeatureMapFlow"], ["--model.score_fraction", "0.1"]):
        pd.testing.assert_frame_equal(predictions(trained, *args), expected)


def test_test_and_validate_take_the_checkpoints_settings(trained, capsys):
    for command in ("test", "validate"):
        printed = []
        for config in ("detector.yaml", "data.yaml"):
            main([command, "--config", str(trained / config), "--ckpt_path", str(trained / "model.ckpt")])
            out = capsys.readouterr().out
            printed.append([line for line in out.splitlines() if "AUROC" in line or "val_loss" in line])
        assert printed[0]
        assert printed[0] == printed[1]


def test_export_takes_the_checkpoints_settings_and_another_level(trained, tmp_path):
    level = ["--model.post_processor.alpha", "0.3"]
    main(
        [
            "export",
            "--ckpt_path",
            str(trained / "model.ckpt"),
            "--export_type",
            "TORCH",
            "--export_root",
            str(tmp_path),
            *level,
        ]
    )
    (path,) = tmp_path.rglob("model.pt")
    exported = torch.load(path, weights_only=False)["model"]
    assert [layer.most for layer in exported.model.layers] == MOST
    assert exported.post_processor.alpha == 0.3


def test_an_unknown_type_of_export_is_refused_before_the_detector_is_built(trained, capsys, monkeypatch):
    monkeypatch.setattr(FlowModule, "load_from_checkpoint", None)
    with pytest.raises(SystemExit, match="1"):
        main(["export", "--ckpt_path", str(trained / "model.ckpt"), "--export_type", "openvin"])
    assert "Unknown export type 'openvin'. Did you mean 'openvino' or 'onnx'?" in capsys.readouterr().err


def test_a_record_of_a_test_has_the_checkpoints_settings(trained, capsys):
    main(["test", "--config", str(trained / "data.yaml"), "--ckpt_path", str(trained / "model.ckpt")])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "flowood report" in line]
    record = "".join(path.read_text() for path in Path(line.split("report ")[1]).glob("*.json"))
    assert '"score_fraction": 0.1' in record


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--model.score_fraction", "0.01"],
            "score_fraction is 0.1 there and 0.01 here",
        ),  # the default: given all the same
        (["--model", "FeatureMapFlow", "--model.layout_dims=3"], "layout_dims is 2 there and 3 here"),
        (["--model", "PixelFlow"], "written by FeatureMapFlow, so PixelFlow cannot load it"),
        (["--model", "Dfm", "--model.pre_trained=false"], "written by FeatureMapFlow, so Dfm cannot load it"),
        (["--model.post_processor.alpha", "0.01"], "alpha=0.01 takes at least 100"),
    ],
)
def test_what_is_given_against_the_checkpoint_is_refused_by_name(args, message, trained, capsys):
    base = ["predict", "--config", trained / "data.yaml", "--ckpt_path", trained / "model.ckpt"]
    assert message in error_of(capsys, *base, *args)


def test_another_level_is_applied(trained):
    table = predictions(trained, "--model.post_processor.alpha", "0.6")
    assert (table.pred_label == (table.p_value < 0.6)).all()
    assert ((table.p_value < 0.6) != (table.p_value < 0.05)).any()


def test_without_a_checkpoint_there_is_no_detector(trained, capsys):
    error = error_of(capsys, "predict", "--config", trained / "data.yaml")
    assert "There is no detector to predict: name its checkpoint (--ckpt_path)." in error


def test_a_checkpoint_of_anomalibs_needs_its_class(trained, tmp_path, capsys):
    few = {"train_limit": 8, "test_limit": 2}
    config = yaml.safe_load((trained / "data.yaml").read_text())
    config["data"]["init_args"] |= few
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))
    run = engine(tmp_path)
    detector = Padim(backbone=BACKBONE, layers=["blocks.1"], pre_trained=False, n_features=8, visualizer=False)
    run.fit(detector, datamodule=data(trained, **few))
    path = run.trainer.checkpoint_callback.best_model_path
    base = ["predict", "--config", str(tmp_path / "data.yaml"), "--ckpt_path", path]
    assert "not written by a detector of anomalib_flowood: name the class" in error_of(capsys, *base)
    given = [
        f"--model.{name}" for name in (f"backbone={BACKBONE}", "pre_trained=false", "n_features=8", "visualizer=false")
    ]
    main([*base, "--model", "Padim", "--model.layers=[blocks.1]", *given, "--default_root_dir", str(tmp_path / "new")])
    assert "Most anomalous of" in capsys.readouterr().out


def test_from_python_too(trained):
    path = trained / "model.ckpt"
    detector = open_checkpoint(path)
    assert isinstance(detector, FeatureMapFlow)
    assert [layer.most for layer in detector.model.layers] == MOST
    assert anomalib_flowood.open_checkpoint is open_checkpoint
    with pytest.raises(SettingsError, match=r"score_fraction is 0.1 there and 0.5 here.*What may change: cache_gib"):
        open_checkpoint(path, score_fraction=0.5)
    level = ConformalPostProcessor(alpha=0.2)
    assert FeatureMapFlow.load_from_checkpoint(path, post_processor=level).post_processor.alpha == 0.2
    with pytest.raises(CheckpointError, match="written by FeatureMapFlow, so PixelFlow cannot load it"):
        PixelFlow.load_from_checkpoint(path)


def test_the_engine_mixes_no_settings(trained, tmp_path):
    module, path = data(trained), trained / "model.ckpt"
    given = {name: value for name, value in SETTINGS.items() if name not in ("layout_dims", "score_fraction")}
    for run in ("test", "predict", "validate", "fit"):
        with pytest.raises(
            SettingsError, match=r"model.ckpt was trained.*layout_dims is 2 there and 256 here; score_frac"
        ):
            getattr(engine(tmp_path), run)(FeatureMapFlow(**given), datamodule=module, ckpt_path=path)
    # What counts in training alone may differ, and the level is the detector's own where it was chosen.
    same = FeatureMapFlow(**SETTINGS | {"max_epochs": 7, "feature_noise": 3.0})
    engine(tmp_path).predict(same, datamodule=module, ckpt_path=path)
    assert same.post_processor.alpha == 0.05
    chosen = FeatureMapFlow(**SETTINGS, post_processor=ConformalPostProcessor(alpha=0.2))
    engine(tmp_path).predict(chosen, datamodule=module, ckpt_path=path)
    assert chosen.post_processor.alpha == 0.2


def test_an_unchosen_level_is_the_checkpoints(tmp_path):
    run = engine(tmp_path)
    run.fit(pixel_flow(post_processor=ConformalPostProcessor(alpha=0.1)), datamodule=data(tmp_path))
    path = run.trainer.checkpoint_callback.best_model_path
    assert open_checkpoint(path).post_processor.alpha == 0.1
    with_default = pixel_flow(post_processor=ConformalPostProcessor())
    engine(tmp_path).predict(with_default, datamodule=data(tmp_path), ckpt_path=path)
    assert with_default.post_processor.alpha == 0.1


def test_no_hub_is_asked_and_a_moved_backbone_may_be_named(tmp_path, monkeypatch):
    folder = tmp_path / "first"
    save_random(folder)
    run = engine(tmp_path)
    run.fit(embedding_flow(backbone=f"local-dir:{folder}", pre_trained=True), datamodule=data(tmp_path))
    path = run.trainer.checkpoint_callback.best_model_path
    moved = folder.rename(tmp_path / "second")
    with pytest.raises(FileNotFoundError, match="no config.json in the folder"):
        open_checkpoint(path)
    assert open_checkpoint(path, backbone=f"local-dir:{moved}").post_processor.calibrated


def save_random(folder):
    """What ``flowood backbone`` writes, with random weights."""
    original = weights.create_backbone
    weights.create_backbone = partial(original, pre_trained=False)
    try:
        weights.save_local(BACKBONE, folder)
    finally:
        weights.create_backbone = original


def test_a_setting_that_an_old_checkpoint_lacks_is_not_compared(trained, tmp_path):
    checkpoint = torch.load(trained / "model.ckpt", weights_only=True)
    del checkpoint["hyper_parameters"]["feature_noise"]
    del checkpoint["state_dict"]["post_processor.calibrated_for"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    old = open_checkpoint(tmp_path / "old.ckpt")
    assert old.post_processor.calibrated
    engine(tmp_path).predict(FeatureMapFlow(**SETTINGS), datamodule=data(trained), ckpt_path=tmp_path / "old.ckpt")


# -- broken checkpoints ------------------------------------------------------------------------------------------------


class Something:
    """No part of a checkpoint."""


def truncate(good, bad):
    bad.write_bytes(good.read_bytes()[: good.stat().st_size // 2])


def flip(good, bad):
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 0xFF
    bad.write_bytes(content)


def resave(change, good, bad):
    checkpoint = torch.load(good, weights_only=True)
    torch.save(change(checkpoint), bad)


def without(name):
    return lambda checkpoint: {key: value for key, value in checkpoint.items() if key != name}


def broken_weight(name, value):
    def change(checkpoint):
        weight = next(
            weight for key, weight in checkpoint["state_dict"].items() if key.startswith(name) and weight.ndim
        )
        weight.view(-1)[0] = value
        return checkpoint

    return change


def other_version(checkpoint):
    state = checkpoint["state_dict"]
    state["model.flow.renamed"] = state.pop(next(key for key in state if key.startswith("model.flow.")))
    return checkpoint | {"anomalib_flowood_version": "9.9"}


def save(content, good, bad):
    del good
    torch.save(content, bad)


def write(content, good, bad):
    del good
    bad.write_bytes(content)


NAN, INFINITY = float("nan"), float("inf")
BROKEN = {
    "truncated": (truncate, "is truncated or damaged"),
    "damaged": (flip, "is damaged: .* fails its checksum|is truncated or damaged"),
    "random": (partial(write, bytes(range(256)) * 9), "is not in torch's format"),
    "empty": (partial(write, b""), "is empty"),
    "text": (partial(write, b"version https://git-lfs\noid 1\n"), "is a text file that begins with 'version https"),
    "folder": (lambda good, bad: bad.mkdir(), "is a folder"),
    "pickle": (partial(write, pickle.dumps({"a": 1})), "is not in torch's format"),
    "objects": (partial(save, {"model": Something()}), r"holds Python objects \(test_checkpoints.Something\)"),
    "list": (partial(save, [1]), "holds a list and no detector"),
    "weights": (partial(resave, lambda checkpoint: checkpoint["state_dict"]), "holds weights alone, without"),
    "no state_dict": (partial(resave, without("state_dict")), "has no state_dict. It has epoch"),
    "no settings": (partial(resave, without("hyper_parameters")), "has no hyper_parameters"),
    "NaN weight": (partial(resave, broken_weight("model.flow.", NAN)), r"1 of \d+ values of model.flow.* are NaN or"),
    "NaN statistic": (
        partial(resave, broken_weight("model.layers.0.", NAN)),
        r"1 of \d+ values of model.layers.0.* are NaN",
    ),
    "infinite": (partial(resave, broken_weight("model.flow.", INFINITY)), "are NaN or infinite"),
    "other version": (partial(resave, other_version), "version 9.9, this is .* does not fit FeatureMapFlow.*renamed"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_one_error_with_its_name(kind, trained, tmp_path):
    make, message = BROKEN[kind]
    path = tmp_path / "broken.ckpt"
    make(trained / "model.ckpt", path)
    for load in (FeatureMapFlow.load_from_checkpoint, open_checkpoint):
        with pytest.raises(CheckpointError, match=f"^The checkpoint {path} .*{message}"):
            load(path)


@pytest.mark.parametrize("command", ["fit", "train", "validate", "test", "predict", "export", "explain", "score"])
def test_every_command_names_a_broken_checkpoint(command, trained, tmp_path, capsys):
    path = tmp_path / "broken.ckpt"
    truncate(trained / "model.ckpt", path)
    more = {"export": ["--export_type=torch"], "score": ["--score=nll"]}.get(command, [])
    error = error_of(capsys, command, "--config", trained / "detector.yaml", "--ckpt_path", path, *more)
    assert f"flowood: The checkpoint {path} is truncated or damaged" in error


def test_weights_that_are_nan_give_no_scores(trained, tmp_path, capsys):
    path = tmp_path / "nan.ckpt"
    resave(broken_weight("model.flow.", NAN), trained / "model.ckpt", path)
    assert "NaN or infinite" in error_of(capsys, "predict", "--config", trained / "data.yaml", "--ckpt_path", path)
    with pytest.raises(CheckpointError, match=r"nan.ckpt is broken"):
        engine(tmp_path).predict(FeatureMapFlow(**SETTINGS), datamodule=data(trained), ckpt_path=path)
    detector = open_checkpoint(trained / "model.ckpt").eval()
    torch.nn.init.constant_(next(detector.model.flow.parameters()), float("nan"))
    for use in (
        lambda: detector(torch.rand(1, 3, 48, 48)),
        lambda: engine(tmp_path).predict(detector, datamodule=data(trained)),
        lambda: engine(tmp_path).test(detector, datamodule=data(trained), verbose=False),
        lambda: engine(tmp_path).export(detector, "torch", export_root=tmp_path),
    ):
        with pytest.raises(ValueError, match="This detector is broken"):
            use()


# -- whose calibration -------------------------------------------------------------------------------------------------


def p_values(run, detector, module, path=None):
    batches = run.predict(detector, datamodule=module, ckpt_path=path, return_predictions=True)
    return [getattr(batch, "p_value", None) for batch in batches]


def assert_own(detector, module):
    """Its calibration is of its present scores."""
    batch = module.val_data.__getitems__(list(range(len(module.val_data))))
    with torch.no_grad():
        scores = detector.eval().model(detector.pre_processor.transform(batch.image)).pred_score
    torch.testing.assert_close(detector.post_processor.calibration, scores.sort().values, rtol=1e-3, atol=1e-4)


def test_the_calibration_of_another_score_does_not_come_back(pixels, tmp_path):
    module = data(pixels.parent)
    # From Python, where Lightning restores the states of callbacks, too; the old way they held the calibration.
    old = read_checkpoint(pixels)
    old["callbacks"]["ConformalPostProcessor"] = open_checkpoint(pixels).post_processor.state_dict()
    for state, prefix in ((old["state_dict"], "post_processor."), (old["callbacks"]["ConformalPostProcessor"], "")):
        del state[f"{prefix}calibrated_for"]
    torch.save(old, tmp_path / "old.ckpt")
    for path in (pixels, tmp_path / "old.ckpt"):
        detector = pixel_flow()
        assert p_values(engine(tmp_path), detector, module, path) == [None] * 5
        assert not detector.post_processor.calibrated
    # The same by the command.
    config = {"data": {"class_path": "CrossDataset", "init_args": {"in_distribution": str(pixels.parent / "ramps")}}}
    config["data"]["init_args"] |= {"out_of_distribution": [str(pixels.parent / "squares")]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config | {"trainer": TRAINER}))
    shutil.copy(pixels, tmp_path / "model.ckpt")
    root = ["--default_root_dir", str(tmp_path / "results")]
    table = predictions(tmp_path, "--model.score", "nll", *root)
    assert "p_value" not in table
    assert table.pred_label.isna().all()
    # With its own score it has p-values.
    assert predictions(tmp_path, *root).p_value.notna().all()


def test_a_good_checkpoint_keeps_its_calibration(trained):
    for load in (open_checkpoint, FeatureMapFlow.load_from_checkpoint):
        assert load(trained / "model.ckpt").post_processor.calibrated
    checkpoint = read_checkpoint(trained / "model.ckpt")
    assert "ConformalPostProcessor" not in checkpoint["callbacks"]


def test_averaged_weights_have_a_calibration_of_their_own(tmp_path):
    module = data(tmp_path)
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    detector = pixel_flow(max_epochs=4)
    run = engine(tmp_path, callbacks=[average])
    run.fit(detector, datamodule=module)
    assert average.n_averaged > 1
    for averaged in (detector, open_checkpoint(run.trainer.checkpoint_callback.best_model_path)):
        assert_own(averaged, module)
        assert all(values is not None for values in p_values(run, averaged, module))


def test_weights_that_were_changed_after_all_have_no_calibration_of_others(tmp_path):
    class Change(Callback):
        """What averages in a way of its own."""

        def on_train_end(self, trainer, detector):
            with torch.no_grad():
                next(detector.model.flow.parameters()).add_(0.01)

    module = data(tmp_path)
    detector, run = pixel_flow(), engine(tmp_path, callbacks=[Change()])
    run.fit(detector, datamodule=module)
    assert not detector.post_processor.calibrated
    assert p_values(run, detector, module) == [None] * 5
    run.trainer.save_checkpoint(tmp_path / "changed.ckpt")
    assert not open_checkpoint(tmp_path / "changed.ckpt").post_processor.calibrated
    assert_own(open_checkpoint(run.trainer.checkpoint_callback.best_model_path), module)
    run.validate(detector, datamodule=module, verbose=False)
    assert_own(detector, module)
    assert all(values is not None for values in p_values(run, detector, module))


def test_a_later_epoch_has_no_calibration_of_an_earlier_one(tmp_path):
    module = data(tmp_path)
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="train_loss", save_top_k=-1, save_on_train_epoch_end=True)
    detector = pixel_flow(max_epochs=3)
    engine(tmp_path, callbacks=[keep], check_val_every_n_epoch=2).fit(detector, datamodule=module)
    assert not detector.post_processor.calibrated
    for epoch, own in enumerate([False, True, False]):
        again = open_checkpoint(tmp_path / f"epoch={epoch}.ckpt")
        assert again.post_processor.calibrated is own
        if own:
            assert_own(again, module)
        # Lightning's way, which restores callbacks.
        fresh = pixel_flow(max_epochs=3)
        values = p_values(engine(tmp_path), fresh, module, tmp_path / f"epoch={epoch}.ckpt")
        assert [value is not None for value in values] == [own] * 5


@pytest.mark.parametrize("build", [pixel_flow, embedding_flow, feature_map_flow])
def test_a_resumed_fit_has_its_own_calibration(build, tmp_path):
    module = data(tmp_path)

    class Interrupt(Callback):
        """Save in the midst of an epoch, when weights have moved on from the calibrated ones."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "midst.ckpt")

    engine(tmp_path, callbacks=[Interrupt()]).fit(build(), datamodule=module)
    if build is feature_map_flow:  # whose whitening is fitted to the last weights alone
        with pytest.raises(CheckpointError, match="before what scores need was fitted"):
            open_checkpoint(tmp_path / "midst.ckpt")
    else:
        assert not open_checkpoint(tmp_path / "midst.ckpt").post_processor.calibrated
        assert p_values(engine(tmp_path), build(), module, tmp_path / "midst.ckpt") == [None] * 5
    unvalidated = build(max_epochs=3)
    engine(tmp_path, limit_val_batches=0).fit(unvalidated, datamodule=module, ckpt_path=tmp_path / "midst.ckpt")
    assert not unvalidated.post_processor.calibrated
    resumed = build(max_epochs=3)
    run = engine(tmp_path)
    run.fit(resumed, datamodule=module, ckpt_path=tmp_path / "midst.ckpt")
    assert len(resumed.post_processor.calibration) == 24
    assert open_checkpoint(run.trainer.checkpoint_callback.best_model_path).post_processor.calibrated


def test_a_resumed_training_tests_what_it_gave(tmp_path):
    module = data(tmp_path)
    run = RunEngine(default_root_dir=tmp_path / "results", accelerator="cpu", enable_progress_bar=False)
    run.train(pixel_flow(max_epochs=1), datamodule=module)
    path = run.trainer.checkpoint_callback.best_model_path
    detector = pixel_flow(max_epochs=4)
    run = RunEngine(default_root_dir=tmp_path / "results", accelerator="cpu", enable_progress_bar=False)
    (tested,) = run.train(detector, datamodule=module, ckpt_path=path)
    newest = run.trainer.checkpoint_callback.best_model_path
    first, last = (
        engine(tmp_path).test(open_checkpoint(each), datamodule=module, verbose=False)[0] for each in (path, newest)
    )
    assert tested == last != first


def test_weights_loaded_by_hand_lose_the_calibration(pixels):
    images = torch.rand(2, 3, 12, 12)
    other = pixel_flow(score="typicality").state_dict()
    # All of it, the torch model's, the flow's alone, and one weight.
    for change in (
        lambda detector: detector.load_state_dict(
            {
                key: other[key] if key.startswith("model.flow.") else value
                for key, value in detector.state_dict().items()
            }
        ),
        lambda detector: detector.model.load_state_dict(pixel_flow(score="typicality").model.state_dict()),
        lambda detector: detector.model.flow.load_state_dict(pixel_flow().model.flow.state_dict()),
        lambda detector: torch.nn.init.constant_(detector.model.flow[-1].scale, 0.5),
    ):
        detector = open_checkpoint(pixels).eval()
        with torch.no_grad():
            assert detector(images).pred_label is not None
            change(detector)
            detector.model.scorer.fitted.fill_(True)
            assert detector(images).pred_label is None
        assert not detector.post_processor.calibrated


def test_a_fingerprint_is_that_of_weights_score_and_settings(pixels):
    detector = open_checkpoint(pixels)
    same = detector.fingerprint()
    assert same.shape == (32,)
    assert torch.equal(open_checkpoint(pixels).double().fingerprint(), same)
    assert not torch.equal(open_checkpoint(pixels, score="nll").fingerprint(), same)
    detector.hparams["logit_alpha"] = 0.1
    assert not torch.equal(detector.fingerprint(), same)
