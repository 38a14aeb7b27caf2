# SPDX-License-Identifier: Apache-2.0
"""Training, test, prediction, explanations and pictures read images alike."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback
from model_helpers import engine, pixel_flow
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_flowood import OneClass, PixelFlow, exported
from anomalib_flowood.cli import main
from anomalib_flowood.data import PathDataset, SourcedDataset, pictures, read_image
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.pictures import as_read
from anomalib_flowood.data.prediction import ReadAsTrained
from anomalib_flowood.explain.images import image_sets
from benchmarks.peak import Peak

KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "8.png": lambda grey: grey.astype(np.uint8),
    "12.png": lambda grey: np.rint(grey / 255 * 4095).astype(np.uint16),
    "16.png": lambda grey: grey.astype(np.uint16) * 257,
    "float.tif": lambda grey: (grey / 255).astype(np.float32),
}


def write(folder: Path, kind: str, count: int, seed: int = 0, square: bool = False) -> Path:
    """Ramps with noise, 12 × 12 and 14 × 10, 255 among their grey levels; or the same with a square in it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        size = (12, 12) if i % 3 else (14, 10)
        grey = 100 * rng.uniform(0.5, 1) * np.linspace(0, 1, size[1])[None] + rng.normal(60, 6, size)
        grey[0, 0] = 255
        if square:
            grey[2:8, 2:8] = 20
        Image.fromarray(KINDS[kind](grey.round().clip(0, 255))).save(folder / f"{i:03d}.{kind.split('.')[1]}")
    return folder


def parts(folder: Path, kind: str) -> Path:
    write(folder / "train" / "good", kind, 60)
    write(folder / "test" / "good", kind, 8, seed=1)
    write(folder / "test" / "bad", kind, 8, seed=2, square=True)
    return folder


def module(folder: Path, **kwargs) -> OneClass:
    return OneClass(folder, "good", **{"val_split_ratio": 0.4, "train_batch_size": 36, "eval_batch_size": 24, **kwargs})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a detector that was trained on each kind of file."""
    checkpoints = {}
    for kind in ("8.png", "12.png"):
        folder = tmp_path_factory.mktemp("trained")
        torch.manual_seed(0)
        run = engine(folder)
        run.fit(pixel_flow(max_epochs=1), datamodule=module(parts(folder / "parts", kind)))
        checkpoints[kind] = Path(run.trainer.checkpoint_callback.best_model_path)
    return checkpoints


def predict(tmp_path: Path, checkpoint: Path, path: Path, **kwargs) -> torch.Tensor:
    """Raw scores from a detector that knows nothing but its checkpoint."""
    batches = engine(tmp_path).predict(
        pixel_flow(**kwargs), ckpt_path=checkpoint, data_path=path, return_predictions=True
    )
    return torch.cat([batch.raw_score for batch in batches])


def test_a_picture_has_one_score_in_whatever_file_it_comes(tmp_path: Path, trained: dict[str, Path]) -> None:
    scores = {
        (trained_on, kind): predict(tmp_path, checkpoint, write(tmp_path / trained_on / kind, kind, 6, seed=1))
        for trained_on, checkpoint in trained.items()
        for kind in KINDS
        # 12 bits look dark to who expects 16, and 16 bits are no image to who expects 12.
        if (trained_on, kind) not in {("8.png", "12.png"), ("12.png", "16.png")}
    }
    expected = scores["8.png", "8.png"]
    assert len(expected) == 6
    for which, values in scores.items():
        torch.testing.assert_close(values, expected, rtol=0, atol=0.02 * float(expected.std()), msg=str(which))
    dark = predict(tmp_path, trained["8.png"], write(tmp_path / "dark", "12.png", 6, seed=1))
    assert (dark - expected).abs().min() > expected.std()
    with pytest.raises(ValueError, match=r"000.png: its values run .* where 0 to 4095 is expected. Set max_value"):
        predict(tmp_path, trained["12.png"], write(tmp_path / "bright", "16.png", 1))


def test_max_value_travels_with_the_checkpoint(
    tmp_path: Path, trained: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert PixelFlow.load_from_checkpoint(trained["8.png"]).max_value is None
    detector = PixelFlow.load_from_checkpoint(trained["12.png"])
    assert detector.max_value == 4095
    assert exported.read_description(detector.to_torch(tmp_path / "export"))["max_value"] == 4095
    # Another folder would say 1023. The detector's word counts, before setup, after it, and without a trainer.
    dark = tmp_path / "dark"
    for path in parts(tmp_path / "parts", "12.png").rglob("*.png"):
        values = np.asarray(Image.open(path)) // 5
        (dark / path.relative_to(tmp_path / "parts")).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(dark / path.relative_to(tmp_path / "parts"))
    data = module(dark)
    data.setup()
    assert data.max_value == 1023
    assert data.test_data[0].image.max() > 0.7
    before, fresh = module(dark), module(dark)
    engine(tmp_path).test(detector, datamodule=before, verbose=False)
    engine(tmp_path).test(pixel_flow(), datamodule=fresh, ckpt_path=trained["12.png"], verbose=False)
    image_sets(detector, data, 4)
    for which in (before, fresh, data):
        assert which.max_value == 4095
        assert which.test_data[0].image.max() < 0.3
        assert which.val_data[0].image.max() < 0.3
    assert "taking the latter" not in caplog.text
    # An argument that was given is meant.
    given = module(dark, max_value=1023)
    engine(tmp_path).test(detector, datamodule=given, verbose=False)
    assert given.test_data[0].image.max() > 0.6
    assert "trained with max_value 4095, and the data module has 1023: taking the latter" in caplog.text


@pytest.mark.parametrize("limit", [0, 512])
def test_max_value_of_images_in_memory_and_on_the_disk(tmp_path: Path, limit: int) -> None:
    write(tmp_path / "train" / "good", "12.png", 6)
    for path in [*(tmp_path / "train" / "good").glob("000.*"), *(tmp_path / "train" / "good").glob("003.*")]:
        path.unlink()  # of the other size
    write(tmp_path / "test" / "good", "12.png", 1)
    data = module(tmp_path, memory_limit_mib=limit, val_split_ratio=0.3)
    data.setup()
    assert data.max_value == 4095
    assert (data.train_data._stores[0].pixels is None) == (limit == 0)
    assert data.train_data[0].image.max() == 1
    data.read_for(65535)
    assert data.train_data[0].image.max() == pytest.approx(16 / 255)
    with pytest.raises(ValueError, match="max_value has to be at least 1"):
        module(tmp_path, max_value=0)


def test_a_detector_that_was_just_trained_predicts_as_it_was_trained(tmp_path: Path) -> None:
    folder = parts(tmp_path / "parts", "12.png")
    run, detector, data = engine(tmp_path), pixel_flow(max_epochs=1), module(folder)
    run.fit(detector, datamodule=data)
    by_path = run.predict(detector, data_path=folder / "test", return_predictions=True)
    by_module = run.predict(detector, datamodule=data, return_predictions=True)
    scores = [
        {
            path: score
            for batch in batches
            for path, score in zip(batch.image_path, batch.raw_score.tolist(), strict=True)
        }
        for batches in (by_path, by_module)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_data_sets_to_predict_on_read_at_the_detectors_size_and_white(tmp_path: Path, trained: dict[str, Path]) -> None:
    write(tmp_path / "b", "12.png", 6)
    for data in (PathDataset(tmp_path / "b"), PredictDataset(tmp_path / "b")):
        engine(tmp_path).predict(pixel_flow(), dataset=data, ckpt_path=trained["12.png"])
        assert data[0].image.shape == data[1].image.shape == (3, 12, 12)
        assert data[0].image.max() > 0.5


def test_files_to_predict_on_are_read_several_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "b", "8.png", 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    together, alone = threading.Barrier(2), PathDataset(folder, resize=Resize((12, 12), antialias=True))
    expected = [alone[place] for place in range(8)]
    read = Images.read

    def met(self: Images, rows: np.ndarray) -> object:
        together.wait(timeout=20)  # breaks where one thread reads all
        return read(self, rows)

    monkeypatch.setattr(Images, "read", met)
    for item, one in zip(alone.__getitems__(range(8)), expected, strict=True):
        assert item.image_path == one.image_path
        assert torch.equal(item.image, one.image)


def test_predict_goes_on_where_a_file_cannot_be_read(
    tmp_path: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "new", "12.png", 40)
    (folder / "005.png").write_bytes((folder / "005.png").read_bytes()[:60])
    (folder / "zero.png").write_bytes(b"")
    (folder / "._001.png").write_bytes(b"resource fork")
    os.mkfifo(folder / "pipe.png")
    Image.fromarray(np.array([[0.5, np.nan]], np.float32)).save(folder / "nan.tif")
    arguments = ["predict", "--model", "PixelFlow", "--model.image_size", "[12, 12]", "--model.channels", "1"]
    arguments += ["--model.coupling_layers", "4", "--model.hidden_channels", "16", "--model.bottleneck_dim", "3"]
    arguments += ["--ckpt_path", str(trained["12.png"]), "--trainer.accelerator", "cpu"]
    arguments += ["--default_root_dir", str(tmp_path / "results")]
    with pytest.raises(SystemExit) as info:
        main([*arguments, "--data", str(folder)])
    assert info.value.code == 3
    (path,) = tmp_path.rglob("predictions.csv")
    frame = pd.read_csv(path)
    assert len(frame) == 42
    lost = frame[frame["error"].notna()]
    assert [Path(name).name for name in lost["image_path"]] == ["005.png", "nan.tif", "zero.png"]
    assert lost["pred_score"].isna().all()
    assert lost["pred_label"].isna().all()
    assert set(frame["pred_label"].dropna()) <= {0, 1}
    assert frame[frame["error"].isna()]["raw_score"].notna().all()
    out = capsys.readouterr().out
    assert "Most anomalous of 39 images" in out
    tail = out[out.index("All predictions:") :]
    assert "3 of 42 files could not be read:" in tail
    for name in lost["image_path"]:
        assert f"Cannot read the image {name}" in tail
    # A folder that can be read ends as ever, one that cannot at all too.
    for name in lost["image_path"]:
        Path(name).unlink()
    main([*arguments, "--data", str(folder)])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"")
    with pytest.raises(SystemExit) as info:
        main([*arguments, "--data", str(broken)])
    assert info.value.code == 3
    assert "1 of 1 files could not be read" in capsys.readouterr().out


def test_predict_on_a_data_module_goes_on_too_and_a_test_does_not(
    tmp_path: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = parts(tmp_path / "parts", "12.png")
    (folder / "test" / "bad" / "000.png").write_bytes(b"")
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {class_path: PixelFlow, init_args: {image_size: [12, 12], channels: 1, coupling_layers: 4, "
        "hidden_channels: 16, bottleneck_dim: 3}}\n"
        f"data: {{class_path: OneClass, init_args: {{dataset: {folder}, normal_class: good}}}}\n"
        "trainer: {accelerator: cpu, enable_progress_bar: false}\n"
    )
    arguments = ["--config", str(config), "--ckpt_path", str(trained["12.png"])]
    arguments += ["--default_root_dir", str(tmp_path / "results")]
    with pytest.raises(SystemExit) as info:
        main(["predict", *arguments])
    assert info.value.code == 3
    (path,) = tmp_path.rglob("predictions.csv")
    frame = pd.read_csv(path)
    assert len(frame) == 16
    assert frame["error"].notna().sum() == 1
    assert set(frame["source"].dropna()) == {"good", "bad"}
    with pytest.raises(SystemExit) as info:
        main(["test", *arguments])
    assert info.value.code == 1
    assert f"Cannot read the image {folder / 'test' / 'bad' / '000.png'}" in capsys.readouterr().err


def test_score_takes_files_of_two_sizes(
    tmp_path: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, output = parts(tmp_path / "parts", "12.png"), tmp_path / "scored.ckpt"
    data = ["--data", "OneClass", "--data.dataset", str(folder), "--data.normal_class", "good"]
    data += ["--data.val_split_ratio", "0.4", "--trainer.accelerator", "cpu"]
    given = ["--model", "PixelFlow", "--ckpt_path", str(trained["12.png"]), "--score", "typicality"]
    main(["score", *given, *data, "--output", str(output)])
    before, after = (PixelFlow.load_from_checkpoint(path) for path in (trained["12.png"], output))
    # By the same images, read alike: how far their -log p is from its mean over the training images.
    expected = (before.post_processor.calibration - after.model.scorer.mean).abs().sort().values
    torch.testing.assert_close(after.post_processor.calibration, expected, rtol=1e-4, atol=1e-5)
    assert after.max_value == 4095


def test_hidden_folders_are_no_class(tmp_path: Path) -> None:
    folder = parts(tmp_path / "parts", "8.png")
    write(folder / "test" / ".ipynb_checkpoints", "8.png", 2)
    write(folder / "train" / "good" / ".ipynb_checkpoints", "8.png", 2)
    data = module(folder)
    data.setup()
    assert set(data.test_data.samples["source"]) == {"good", "bad"}
    assert (len(data.train_data), len(data.val_data), len(data.test_data)) == (36, 24, 16)
    assert len(PathDataset(folder)) == 76


def test_photographs_are_resized_as_they_are_read(tmp_path: Path) -> None:
    """To the same numbers as a batch that was read whole, and without the memory of one."""
    photograph = tmp_path / "parts" / "train" / "good" / "000.jpg"
    photograph.parent.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((1600, 1200)).save(photograph)
    for i in range(1, 40):
        photograph.with_name(f"{i:03d}.jpg").symlink_to(photograph)
    images = Images("photographs", [str(path) for path in sorted(photograph.parent.iterdir())])
    data = SourcedDataset(images, 0, "train", augmentations=Resize([32, 48], antialias=True))
    with Peak() as peak:
        batch = data.__getitems__(range(40))
    assert peak.above_rest is not None
    assert peak.above_rest / 2**20 < 250  # 40 of them are 880 MiB
    whole = Resize([32, 48], antialias=True)(read_image(photograph).float().unsqueeze(0) / 255)
    assert torch.equal(batch.image, whole.expand(40, -1, -1, -1))
    kept = SourcedDataset(images.select(np.arange(2)).in_memory(64), 0, "train", augmentations=data.augmentations)
    assert torch.equal(kept.__getitems__([0, 1]).image, batch.image[:2])


def test_all_splits_together_stay_within_the_memory_limit(tmp_path: Path) -> None:
    for part in ("train/good", "test/good", "test/bad"):
        (tmp_path / part).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (512, 256), i).save(tmp_path / part / f"{i}.png")
    data = module(tmp_path, memory_limit_mib=1)
    data.setup()
    kept = [part._stores[0].pixels is not None for part in (data.train_data, data.val_data, data.test_data)]
    assert kept == [True, True, False]


def test_pictures_show_what_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a", "12.png", 2) / "001.png"
    batch = ImageBatch(image=torch.rand(1, 3, 8, 8), image_path=[str(path)], anomaly_map=torch.rand(1, 8, 8))
    batch.update(pred_score=torch.rand(1), pred_label=torch.ones(1).bool())
    picture = ImageVisualizer(fields=["image"], overlay_fields=None, field_size=(12, 12))(batch)
    shown = np.asarray(picture)[..., 0]
    expected = np.rint(np.asarray(Image.open(path)) / 4095 * 255)
    assert np.abs(shown[-12:, :12] - expected).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)])
def test_images_of_one_row_or_column_are_drawn(shape: tuple[int, int], tmp_path: Path) -> None:
    """anomalib takes an axis of one pixel away: a prediction ended at such an image, or drew three grey rows of it."""
    Image.fromarray(np.full((*shape, 3), (200, 100, 0), np.uint8)).save(tmp_path / "line.png")
    batch = ImageBatch(
        image=torch.rand(1, 3, 8, 8), image_path=[str(tmp_path / "line.png")], anomaly_map=torch.rand(1, 8, 8)
    )
    batch.update(pred_score=torch.rand(1), pred_label=torch.ones(1).bool())
    picture = ImageVisualizer(fields=["image"], overlay_fields=None, field_size=(12, 12))(batch)
    assert (np.asarray(picture)[-12:, :12] == (200, 100, 0)).all()


def test_large_pictures_are_drawn_from_smaller_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of maps and masks the highest pixels, so that a small defect stays; no side is longer than what is drawn."""
    rows = np.add.outer(np.arange(30), np.arange(41)).astype(np.uint8)
    Image.fromarray(np.stack([rows] * 3, -1)).save(tmp_path / "large.png")
    spot = torch.zeros(30, 41)
    spot[29, 40] = 1
    fields = {"anomaly_map": spot - 5, "pred_mask": spot.bool(), "gt_mask": spot.bool()}
    item = ImageItem(
        image=torch.zeros(3, 30, 41), image_path=str(tmp_path / "large.png"), gt_label=torch.tensor(True), **fields
    )
    whole = as_read(item)
    assert whole.image.shape == (3, 30, 41)
    monkeypatch.setattr(pictures, "_MOST_DRAWN", 14)  # every third row and column
    small = as_read(item)
    assert small.image.shape == (3, 10, 14)
    assert torch.allclose(small.image[0, 0, 0], whole.image[0, :3, :3].mean(), atol=0.5 / 255)
    for name, values in fields.items():
        shown = getattr(small, name)
        assert shown.shape == (10, 14)
        assert shown.dtype == values.dtype
        assert shown[9, 13] == values.max()
        assert (shown[:9] == values.min()).all()
        assert torch.equal(getattr(item, name), values)
    assert ImageVisualizer()(ImageBatch.collate([item])) is not None


def test_anomalibs_detectors_predict_by_path_as_they_were_trained(tmp_path: Path) -> None:
    class Seen(Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            self.highest = batch.image.max()

    def padim(**kwargs) -> Padim:
        return Padim(backbone="test_resnet", layers=["layer1"], n_features=4, pre_trained=False, **kwargs)

    pre_processor = PreProcessor(Resize([32, 32], antialias=True))
    detector, seen = padim(visualizer=False, pre_processor=pre_processor), Seen()
    run = engine(tmp_path, callbacks=[ReadAsTrained(), seen])
    run.fit(detector, datamodule=module(parts(tmp_path / "parts", "12.png")))
    run.predict(
        detector, data_path=tmp_path / "parts" / "test", ckpt_path=run.trainer.checkpoint_callback.best_model_path
    )
    assert seen.highest > 0.5


def test_anomalibs_detectors_predict_by_the_same_reader(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", "16.png", 3)
    write(tmp_path / "b", "8.png", 3)
    detector = Padim(
        backbone="test_resnet", layers=["layer1"], n_features=4, pre_trained=False, visualizer=False,
        post_processor=False,
    )  # fmt: skip
    seen: list[torch.Tensor] = []
    detector.predict_step = lambda batch, *_, **__: seen.append(batch.image.clone())
    for path in (folder, tmp_path / "b"):
        engine(tmp_path).predict(detector, data_path=path)
    for deep, shallow in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(deep, shallow)
