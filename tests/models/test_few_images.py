# SPDX-License-Identifier: Apache-2.0
"""Folders as most users have them, of few normal images: what detectors and data modules do where nothing is typed."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.data import Folder, MVTecAD
from model_helpers import BACKBONE, engine
from PIL import Image

from anomalib_flowood import EmbeddingFlow, FeatureMapFlow, OneClass, PixelFlow, exported
from anomalib_flowood.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SMALL = {"backbone": BACKBONE, "pre_trained": False, "image_size": (64, 64)}
FEW_STEPS = {"max_epochs": 1, "limit_train_batches": 2}
# All other settings are the default ones.
DETECTORS = {
    "PixelFlow": lambda: PixelFlow(image_size=(12, 12), channels=1, max_epochs=2),
    "EmbeddingFlow": lambda: EmbeddingFlow(**SMALL),
    "FeatureMapFlow": lambda: FeatureMapFlow(**{**SMALL, "image_size": (160, 160)}, visualizer=False),
}
LEAST = {"PixelFlow": 1, "EmbeddingFlow": 2, "FeatureMapFlow": 3}


def photographs(folder: Path, count: int, spot: bool, seed: int) -> None:
    """Photographs of stripes, in 12 bits and two sizes; a bright spot on them is what does not belong."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        height, width = (24, 30) if number % 2 else (32, 28)
        pixels = 1500 + 600 * np.sin(np.arange(width) / rng.uniform(2, 4)) + rng.normal(0, 120, (height, width))
        if spot:
            pixels[4:13, 4:13] += 1500
        Image.fromarray(pixels.clip(0, 4095).astype(np.uint16)).save(folder / f"{number:03}.png")


def parts(folder: Path, normal: int, test: int = 8) -> Path:
    photographs(folder / "train/good", normal, False, 0)
    photographs(folder / "test/good", test, False, 1)
    photographs(folder / "test/scratch", test, True, 2)
    return folder


@pytest.mark.parametrize("name", DETECTORS)
def test_forty_images_are_enough_for_every_detector_as_it_is(name, tmp_path):
    module = OneClass(parts(tmp_path / "parts", 40), "good")
    detector, run = DETECTORS[name](), engine(tmp_path, **FEW_STEPS)
    run.fit(detector, datamodule=module)
    assert (len(module.train_data), len(module.val_data)) == (30, 10)
    post_processor = detector.post_processor
    assert (len(post_processor.calibration), post_processor.level) == (10, 1 / 11)
    (results,) = run.test(detector, datamodule=module, verbose=False)
    if name != "PixelFlow":  # two epochs of one batch
        assert results["image_AUROC"] > 0.9
    for batch in run.predict(detector, datamodule=module, return_predictions=True):
        assert torch.equal(batch.pred_label, batch.p_value <= 1 / 11)
        assert ((batch.pred_score > 0) & (batch.pred_score <= 1)).all()
    path = run.export(detector, "torch", tmp_path)
    known = json.loads(path.with_suffix(".json").read_text())
    assert (known["alpha"], known["level"]) == (0.05, 1 / 11)
    assert known["check"]["passed"]
    raw = batch.raw_score.numpy()
    np.testing.assert_array_equal(exported.p_values(path, raw) <= known["level"], batch.pred_label.numpy())


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("normal", [2, 3, 5, 12])
def test_fewer_images_fit_or_are_refused_before_the_backbone_sees_them(name, normal, tmp_path, monkeypatch):
    module, detector = OneClass(parts(tmp_path / "parts", normal), "good"), DETECTORS[name]()
    fitted = normal - max(1, normal // 4)
    if fitted >= LEAST[name]:
        run = engine(tmp_path, **FEW_STEPS)
        run.fit(detector, datamodule=module)
        assert len(detector.post_processor.calibration) == normal - fitted
        assert detector.post_processor.level == 1 / (1 + normal - fitted)
        scores = torch.cat([batch.pred_score for batch in run.predict(detector, datamodule=module)])
        assert ((scores >= 0) & (scores <= 1)).all()
        return
    monkeypatch.setattr(type(detector), "extract", lambda *_: pytest.fail("the backbone has seen images"))
    with pytest.raises(ValueError, match=rf"{name} is fitted to at least {LEAST[name]} images, and there (is|are) \d "):
        engine(tmp_path).fit(detector, datamodule=module)


MODULES = {
    "Folder": lambda root: Folder("parts", "train/good", root, "test/scratch", num_workers=0),
    "Folder, from_train": lambda root: Folder(
        "parts", "train/good", root, "test/scratch", "test/good", num_workers=0, val_split_mode="from_train",
        val_split_ratio=0.1,
    ),
    "MVTecAD": lambda root: MVTecAD(root.parent, "parts", num_workers=0),
    "MVTecAD, from_train": lambda root: MVTecAD(
        root.parent, "parts", num_workers=0, val_split_mode="from_train", val_split_ratio=0.1
    ),
}  # fmt: skip
"""anomalib's."""


@pytest.mark.parametrize(("name", "validation"), list(zip(MODULES, [4, 4, 8, 4], strict=True)))
def test_anomalibs_data_modules_have_few_validation_images(name, validation, tmp_path, caplog):
    root = parts(tmp_path / "parts", 40)
    (root / "ground_truth/scratch").mkdir(parents=True)
    for image in (root / "test/scratch").iterdir():
        with Image.open(image) as opened:
            Image.new("L", opened.size, 255).save(root / "ground_truth/scratch" / f"{image.stem}_mask.png")
    detector, run = PixelFlow(image_size=(12, 12), channels=1, max_epochs=2), engine(tmp_path)
    run.fit(detector, datamodule=MODULES[name](root))
    assert len(detector.post_processor.calibration) == validation
    (said,) = [text for text in caplog.messages if text.startswith(f"With {validation} held-out normal images")]
    assert f"hold out {20 - validation} more (val_split_ratio of the data module" in said
    for batch in run.predict(detector, datamodule=MODULES[name](root)):
        assert torch.equal(batch.pred_label, batch.p_value == 1 / (validation + 1))


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """The README's configuration file in a folder of its own, and its commands."""
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```yaml\n(# detector\.yaml\n.*?)```", README, re.DOTALL)
    Path("detector.yaml").write_text(text)
    after = README.partition(text)[2]
    console = re.search(r"```console\n(.*?)```", after, re.DOTALL)[1]
    return [shlex.split(line)[1:] for line in console.splitlines()]


@pytest.mark.parametrize(("normal", "held_out"), [(40, 10), (120, 20)])
def test_the_readmes_configuration_trains_on_a_small_folder(normal, held_out, readme, tmp_path, capsys):
    train, predict, export = readme
    parts(tmp_path / "datasets/parts", normal)
    photographs(tmp_path / "new_images", 5, True, 3)
    smaller = [f"--model.backbone={BACKBONE}", "--model.pre_trained=false", "--model.image_size=[64, 64]"]
    main([*train, *smaller, "--trainer.accelerator=cpu"])
    main([*predict, "--trainer.accelerator=cpu"])
    out = capsys.readouterr().out
    assert f"the {held_out} calibration images" in out
    assert ("Labels: With 10 held-out normal images the smallest p-value is 1/11 = 0.091" in out) is (held_out < 20)
    (path,) = Path("results").rglob("predictions.csv")
    table = pd.read_csv(path)
    assert (table["pred_label"] == (table["p_value"] == 1 / (held_out + 1))).all()
    assert table["pred_label"].any()
    export[export.index("--export_type") + 1] = "torch"
    main(export)
    (described,) = Path("results").rglob("model.json")
    assert json.loads(described.read_text())["level"] == 1 / (held_out + 1)


def test_a_benchmark_takes_a_small_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts(tmp_path / "parts", 40)
    embedding = {"class_path": "EmbeddingFlow", "init_args": {**SMALL, "image_size": [64, 64]}}
    pixels = {"class_path": "PixelFlow", "init_args": {"image_size": [12, 12], "channels": 1, "max_epochs": 1}}
    data = {"class_path": "OneClass", "init_args": {"dataset": "parts", "normal_class": "good"}}
    config = {"accelerator": "cpu", "benchmark": {"seed": 0, "model": {"grid": [embedding, pixels]}, "data": data}}
    Path("benchmark.yaml").write_text(yaml.safe_dump(config))
    main(["benchmark", "--config", "benchmark.yaml"])
    (results,) = Path("runs").rglob("results.csv")
    assert len(pd.read_csv(results)) == 2
    assert "error" not in pd.read_csv(results)
