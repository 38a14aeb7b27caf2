# SPDX-License-Identifier: Apache-2.0
"""What memory large images take, which a detector with tiles gets in 8 bits, and one at a time."""

import json
import logging
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.models import Padim
from model_helpers import BACKBONE, engine
from PIL import Image
from torchvision.transforms.v2 import Resize

import anomalib_flowood
from anomalib_flowood import FeatureMapFlow, OneClass
from anomalib_flowood.cli import main, results
from anomalib_flowood.data import decoding, pictures, read_image, resizing
from anomalib_flowood.data.items import SourcedImageBatch, SourcedImageItem, in_unit_range
from anomalib_flowood.data.path_dataset import PathDataset
from anomalib_flowood.explain import explain
from anomalib_flowood.metrics import bins
from anomalib_flowood.models.components import flow_module
from anomalib_flowood.report.predictions import PredictionKeeper
from benchmarks.peak import Peak, anonymous

SIZE, TILE = (60, 90), (32, 32)
SMALL = {"backbone": BACKBONE, "pre_trained": False, "map_layers": (1, 2), "score_layers": (2,), "subspace_dim": 4}
SMALL |= {"layout_dims": 8, "visualizer": False}


def write(folder, count, seed, size=SIZE):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    write(folder / "train" / "good", 40, 0)
    write(folder / "test" / "good", 4, 1)
    write(folder / "test" / "another", 3, 2, size=(70, 80))
    (folder / "ground_truth" / "another").mkdir(parents=True)
    for number in range(3):
        mask = Image.new("L", (80, 70))
        mask.paste(255, (10, 10 + number, 30, 25))
        mask.save(folder / "ground_truth" / "another" / f"{number}.png")
    return folder


def data(photographs):
    return OneClass(photographs, "good", val_split_ratio=0.5)


@pytest.fixture(scope="module")
def trained(photographs, tmp_path_factory):
    torch.manual_seed(0)
    detector = FeatureMapFlow(**SMALL, image_size=SIZE, tile_size=TILE)
    run = engine(tmp_path_factory.mktemp("run"))
    seen = []
    judge = detector.judged
    detector.judged = lambda batch: (seen.append((batch.image.dtype, len(batch.image))), judge(batch))[1]
    prepare = detector.prepare_features
    detector.prepare_features = lambda features: (seen.append(("prepared", len(features[0]))), prepare(features))[1]
    kept = []
    keep = detector.keep_reference
    detector.keep_reference = lambda features, copies: (kept.extend(features), keep(features, copies))
    run.fit(detector, datamodule=data(photographs))
    del detector.judged, detector.prepare_features, detector.keep_reference
    detector.twice = not all(map(torch.Tensor.is_set_to, kept, run.trainer.train_dataloader.dataset.features))
    detector.seen = seen
    return detector.eval(), run


def test_a_fit_sees_bytes_one_image_at_a_time(trained):
    """Whatever the batch size of the data, 32 here."""
    detector, _ = trained
    assert detector.seen[-20:] == [(torch.uint8, 1)] * 20
    assert [entry for entry in detector.seen if "prepared" in entry] == [("prepared", 1)] * 20
    assert len(detector.post_processor.calibration) == 20


def test_a_fit_keeps_features_once(trained):
    assert not trained[0].twice


def test_bytes_are_scored_as_floats(trained):
    model = trained[0].model
    pixels = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    with torch.no_grad():
        found, want = model(pixels), model(in_unit_range(pixels))
        judged, losses = model.judged(pixels)
        inputs = model.inputs(pixels)
    assert torch.equal(found.pred_score, want.pred_score)
    assert torch.equal(found.anomaly_map, want.anomaly_map)
    torch.testing.assert_close(judged.pred_score, found.pred_score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses, model.nll(model, inputs), rtol=1e-4, atol=1e-5)


def test_whatever_reads_them_scores_are_the_same(trained, photographs):
    """Images of another size are resized, as floats."""
    detector, run = trained
    checkpoint = run.trainer.checkpoint_callback.best_model_path
    test = {path.name: photographs / "test" / path.name for path in (photographs / "test").iterdir()}
    by_path = {name: run.predict(detector, data_path=folder) for name, folder in test.items()}
    kinds = {name: {batch.image.dtype for batch in batches} for name, batches in by_path.items()}
    assert kinds == {"good": {torch.uint8}, "another": {torch.float32}}
    by_module = run.predict(detector, datamodule=data(photographs))
    assert [len(batch.image) for batch in by_module] == [1] * 7
    scores = {str(batch.image_path[0]): batch.raw_score for batch in by_module}
    for name, folder in test.items():
        loaded = anomalib_flowood.load(checkpoint).score(folder)
        of_path = torch.cat([batch.raw_score for batch in by_path[name]])
        np.testing.assert_allclose(of_path, loaded.raw_score, rtol=1e-4, atol=1e-5)
        assert [scores[path].item() for path in loaded.paths] == of_path.tolist()
        floats = [np.asarray(Image.open(path), dtype=np.float32) / 255 for path in loaded.paths]
        assert np.array_equal(anomalib_flowood.load(checkpoint).score(floats).raw_score, loaded.raw_score)


def test_nothing_is_said_of_arrays_that_cannot_be_written_to(trained, photographs):
    detector = anomalib_flowood.load(trained[1].trainer.checkpoint_callback.best_model_path)
    colour = Image.open(photographs / "test" / "good" / "0.png")
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for image in (colour, colour.convert("L"), np.asarray(colour), np.asarray(colour.resize((70, 50)))):
                detector.score(image)
    finally:
        torch.set_warn_always(False)


def test_the_command_keeps_what_is_said_alone(trained, photographs, tmp_path, monkeypatch):
    kept = []
    keep = results.keep_predictions
    monkeypatch.setattr(
        results, "keep_predictions", lambda batches, *rest: (kept.extend(batches), keep(batches, *rest))[1]
    )
    checkpoint = str(trained[1].trainer.checkpoint_callback.best_model_path)
    folder = photographs / "test" / "good"
    main(["predict", "--data", str(folder), "--ckpt_path", checkpoint, "--output", str(tmp_path)])
    assert len(kept) == 4
    assert all(torch.as_tensor(value).ndim < 2 for batch in kept for value in (batch.raw_score, batch.p_value))
    assert not any(hasattr(batch, name) for batch in kept for name in ("image", "anomaly_map", "pred_mask"))
    table = pd.read_csv(tmp_path / "predictions.csv")
    want = anomalib_flowood.load(checkpoint).score(folder)
    assert table["image_path"].tolist() == list(want.paths)
    np.testing.assert_allclose(table["raw_score"], want.raw_score, rtol=1e-4, atol=1e-5)
    assert table["pred_label"].tolist() == want.label.astype(int).tolist()


def test_the_command_lets_a_batch_go_before_the_next_is_scored(trained, photographs, tmp_path, monkeypatch):
    detector, _ = trained
    keeper, held = PredictionKeeper(), []
    step = detector.predict_step
    monkeypatch.setattr(detector, "predict_step", lambda *given: (held.append(keeper._last), step(*given))[1])
    run = engine(tmp_path, callbacks=[keeper])
    run.predict(detector, data_path=photographs / "test" / "good", return_predictions=False)
    assert held == [None] * 4
    assert [len(batch.p_value) for batch in keeper.batches] == [1] * 4


def test_pixels_of_a_test_are_counted_and_not_kept(trained, photographs, monkeypatch, caplog):
    detector, run = trained
    pixel_metrics = [metric for metric in detector.evaluator.test_metrics if metric.name.startswith("pixel_")]
    (exact,) = run.test(detector, datamodule=data(photographs), verbose=False)
    kept = []
    monkeypatch.setattr(bins, "MOST_KEPT", 1000)
    monkeypatch.setattr(
        detector, "on_test_epoch_end", lambda: kept.extend(len(metric.preds) for metric in pixel_metrics)
    )
    with caplog.at_level(logging.INFO):
        (found,) = run.test(detector, datamodule=data(photographs), verbose=False)
    assert len(pixel_metrics) == 2
    assert kept == [0, 0]
    assert {name: pytest.approx(value, abs=1e-4) for name, value in exact.items()} == found
    assert {metric.name for metric in pixel_metrics} == {
        said.partition(":")[0] for said in caplog.messages if " bins;" in said
    }


def test_explaining_reads_one_image_at_a_time(trained, photographs, tmp_path):
    detector, run = trained
    seen = []
    judge = detector.judged
    detector.judged = lambda batch: (seen.append((batch.image.dtype, len(batch.image))), judge(batch))[1]
    module = data(photographs)
    explain(detector, module, tmp_path)
    del detector.judged
    assert seen == [(torch.uint8, 1)] * 4 + [(torch.float32, 1)] * 3
    assert module.test_data._stores[0].pixels is None
    sets = json.loads((tmp_path / "explain.json").read_text())["sets"]
    (tested,) = run.test(detector, datamodule=data(photographs), verbose=False)
    assert sets["another"]["auroc"] == pytest.approx(tested["image_AUROC"])


def test_what_returned_predictions_take_is_said(trained, photographs, monkeypatch, caplog):
    detector, run = trained

    def said(**arguments):
        caplog.clear()
        run.predict(detector, data_path=photographs / "test" / "good", **arguments)
        return [message for message in caplog.messages if "return_predictions" in message]

    assert not said()
    monkeypatch.setattr(flow_module, "_MUCH", 4 * (3 + 4 + 1) * SIZE[0] * SIZE[1])  # bytes, a map and a mask
    assert not said(return_predictions=False)
    (message,) = said()
    assert "all 4 batches, which will take 0.0 GiB" in message


@pytest.mark.parametrize("tile_size", [None, (32, 32)])
def test_what_is_lost_of_large_images_is_said(photographs, tmp_path, monkeypatch, caplog, tile_size):
    """By all detectors, unless tiles show them at their own size; and not of images that are little larger."""
    size = (32, 32) if tile_size is None else SIZE
    detector = FeatureMapFlow(**SMALL, image_size=size, tile_size=tile_size)

    def said():
        caplog.clear()
        with caplog.at_level(logging.INFO):
            engine(tmp_path, fast_dev_run=True).fit(detector, datamodule=data(photographs))
        return [message for message in caplog.messages if "are resized to" in message]

    monkeypatch.setattr(flow_module, "_SHRUNK", 60 / 32 - 0.01)
    messages = said()
    assert len(messages) == (tile_size is None)
    for message in messages:
        assert message.startswith("Images of 90 x 60 pixels are resized to 32 x 32: of details smaller than some 1 ")
        assert "In tiles FeatureMapFlow sees them" in message
        assert "image_size [60, 90], tile_size [224, 224]" in message
    monkeypatch.setattr(flow_module, "_SHRUNK", 60 / 32)
    assert not said()
    monkeypatch.setattr(flow_module, "_SMALLER", 60 / 32 - 0.01)
    messages = said()
    assert len(messages) == (tile_size is None)
    for message in messages:
        assert message.startswith("Images of 90 x 60 pixels are resized to 32 x 32. A larger image_size finds smaller ")


def test_other_detectors_get_floats_of_the_same_data(trained, photographs, tmp_path):
    detector, run = trained
    module = data(photographs)
    run.test(detector, datamodule=module, verbose=False)
    assert module.test_data[0].image.dtype == torch.uint8
    assert module.eval_batch_size == 1
    other = Padim(backbone="resnet18", pre_trained=False, n_features=10, visualizer=False, evaluator=False)
    engine(tmp_path).fit(other, datamodule=module)
    assert module.test_data[0].image.dtype == torch.float32
    assert module.eval_batch_size == 32


def test_a_batch_of_bytes_and_floats_is_one_of_floats(photographs):
    dataset = PathDataset(photographs / "test")
    dataset.read_for(None, None, keep_bytes=True)
    items = [dataset[len(dataset) - 1], dataset[len(dataset) - 2]]
    assert {item.image.dtype for item in items} == {torch.uint8}
    want = in_unit_range(torch.stack([item.image for item in items]))
    items[0].image = in_unit_range(items[0].image)
    assert torch.equal(dataset.collate_fn(items).image, want)


def test_a_single_image_is_no_copy_and_is_checked():
    pixels = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    item = SourcedImageItem(image=pixels)
    (again,) = SourcedImageBatch(image=item.image)
    assert item.image.data_ptr() == pixels.data_ptr()
    assert torch.equal(again.image, pixels)
    with pytest.raises(ValueError, match="3 channels"):
        SourcedImageItem(image=pixels[:2])


def test_items_of_a_batch_share_its_memory(photographs, monkeypatch):
    """And a picture is drawn of what was read: a photograph is not read again, unless its white may be another."""
    path = str(photographs / "test" / "good" / "0.png")
    pixels = read_image(path)
    batch = SourcedImageBatch(
        image=pixels[None],
        anomaly_map=torch.rand(1, *SIZE),
        pred_mask=torch.zeros(1, *SIZE, dtype=torch.bool),
        image_path=[path],
        source=["a"],
    )
    (item,) = batch
    assert (item.source, item.image_path) == ("a", path)
    for name in ("image", "anomaly_map", "pred_mask"):
        assert getattr(item, name).data_ptr() == getattr(batch, name).data_ptr()
    monkeypatch.setattr(pictures, "read_picture", lambda path: torch.zeros(3, *SIZE, dtype=torch.uint8))
    assert torch.equal(pictures.as_read(item).image, pixels / 255)
    deep = photographs.parent / "deep.png"
    Image.fromarray(pixels[0].numpy().astype(np.uint16) * 16).save(deep)
    assert not pictures.as_read(item.update(in_place=False, image_path=str(deep))).image.any()


def bytes_a_pixel(folder):
    """The most memory that predicting a folder's photographs takes, and that reading one for a small size does."""
    size = (1500, 2000)
    write(folder / "new", 3, 0, size=size)
    detector = FeatureMapFlow(**SMALL, image_size=size, tile_size=(100, 100)).eval()
    detector.max_value = None  # as a fit leaves it
    detector.model.fitted.fill_(True)  # what it takes is the same
    run = engine(folder)
    run.predict(detector, data_path=folder / "new" / "0.png", return_predictions=False)
    with Peak(anonymous, 0.002) as peak:
        run.predict(detector, data_path=folder / "new", return_predictions=False)
    decoding._AT_ONCE = resizing._STRIP = 2**17  # parts that are small beside these photographs, too
    with Peak(anonymous, 0.002) as of_reading:
        PathDataset(folder / "new", resize=Resize((100, 100), antialias=True))[0]
    found = peak.above_rest, of_reading.above_rest
    return None if None in found else [most / (size[0] * size[1]) for most in found]


def test_memory_is_bounded_whatever_the_number(tmp_path):
    """To the photograph that is read, the one before, and their maps; no floats.

    In a process of its own: in the holes that other tests leave in the heap, megabytes come and go.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        found = process.submit(bytes_a_pixel, tmp_path).result()
    if found is None:
        pytest.skip("anonymous memory is read from /proc, which this system lacks")
    most, of_reading = found
    assert most < 24
    assert of_reading < 12  # Pillow's pixels, ours, and strips of floats
