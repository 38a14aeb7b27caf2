# SPDX-License-Identifier: Apache-2.0
"""Metrics for every outside set, in one test pass through anomalib's engine."""

import math
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Folder
from anomalib.metrics import Evaluator
from anomalib.models import Padim
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from model_helpers import embedding_flow, engine, feature_map_flow, idx_folder, pixel_flow
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.utils.data import DataLoader

from anomalib_flowood import CrossDataset, OneClass, PixelFlow
from anomalib_flowood.benchmark import ScoreRecorder, build
from anomalib_flowood.data.datasets import SourcedImageBatch
from anomalib_flowood.metrics import (
    AUROC,
    DETECTION_METRICS,
    MOST_SETS,
    BitsPerDim,
    PerSetEvaluator,
    per_set,
)

OVERALL = {"image_AUROC", "image_FPR95", "image_F1Score"}
BITS = {f"{name}/{side}" for name in ("BitsPerDim", "BitsPerDimMedian") for side in ("inside", "outside")}


class Raw(Callback):
    """Keeps what the detector gives before the post-processor, and counts the images."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.bits: list[float] = []
        self.labels: list[int] = []
        self.sources: list[str] = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.scores += outputs.pred_score.tolist()
        self.bits += outputs.bits_per_dim.tolist()
        self.labels += batch.gt_label.int().tolist()
        self.sources += batch.source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    idx_folder(root / "ramps", "plain")
    idx_folder(root / "squares", "square", seed=1, test=30)
    idx_folder(root / "others", "plain", seed=2, test=20)
    return root


def cross(folder: Path, *outside: str) -> CrossDataset:
    outside_folders = [folder / name for name in outside]
    return CrossDataset(folder / "ramps", outside_folders, eval_batch_size=16, val_split_ratio=0.2)


@pytest.fixture(scope="module")
def fitted(folder: Path) -> PixelFlow:
    torch.manual_seed(0)
    detector = pixel_flow()
    engine(folder).fit(detector, datamodule=cross(folder, "squares"))
    return detector


def run_test(detector: PixelFlow, module: CrossDataset | OneClass | Folder, tmp_path: Path, **kwargs) -> dict:
    (metrics,) = engine(tmp_path, **kwargs).test(detector, datamodule=module, verbose=False)
    return metrics


def test_two_outside_sets_show_all_the_numbers(fitted, folder, tmp_path, capsys):
    evaluator, fitted.evaluator = fitted.evaluator, PerSetEvaluator()
    raw, logger = Raw(), CSVLogger(tmp_path)
    try:
        run = engine(tmp_path, callbacks=[raw], logger=logger)
        (metrics,) = run.test(fitted, datamodule=cross(folder, "squares", "others"))
    finally:
        fitted.evaluator = evaluator
    assert len(raw.scores) == 40 + 30 + 20  # each image once
    scores, labels, sources = torch.tensor(raw.scores), torch.tensor(raw.labels), np.array(raw.sources)

    expected = {}
    for name, metric in DETECTION_METRICS.items():
        expected[f"image_{name}"] = metric(scores, labels)
        expected |= {f"{name}/{key}": value for key, value in per_set(metric, scores, labels, raw.sources).items()}
    assert {f"{name}/{key}" for name in DETECTION_METRICS for key in ("squares", "others", "mean")} <= expected.keys()
    for source in ("squares", "others"):  # scikit-learn's, of a pass of its own
        chosen = np.isin(sources, ["ramps", source])
        pair = labels[chosen].numpy(), scores[chosen].numpy()
        assert metrics[f"AUROC/{source}"] == pytest.approx(roc_auc_score(*pair), abs=1e-6)
        assert metrics[f"AUPROut/{source}"] == pytest.approx(average_precision_score(*pair), abs=1e-6)
    bits = torch.tensor(raw.bits).double()
    assert (bits != scores.double() / np.log(2) + 8).all()  # which are those at the centres of the grey levels
    for name, middle in (("BitsPerDim", np.mean), ("BitsPerDimMedian", np.median)):
        expected[f"{name}/inside"] = middle(bits[sources == "ramps"].numpy())
        expected[f"{name}/outside"] = middle(bits[labels == 1].numpy())
        for source in ("squares", "others"):
            expected[f"{name}/{source}"] = middle(bits[sources == source].numpy())
        expected[f"{name}/mean"] = (expected[f"{name}/squares"] + expected[f"{name}/others"]) / 2
    expected["image_F1Score"] = metrics["image_F1Score"]
    assert metrics == pytest.approx(expected, abs=1e-6)

    logger.save()
    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv").iloc[-1]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    shown = capsys.readouterr().out
    assert all(name in shown for name in expected)


def test_one_pass_is_as_good_as_a_pass_for_each_set(fitted, folder, tmp_path):
    both = run_test(fitted, cross(folder, "squares", "others"), tmp_path)
    alone = {name: run_test(fitted, cross(folder, name), tmp_path) for name in ("squares", "others")}
    sets = ("squares", "others")
    per_set_names = {f"{metric}/{name}" for metric in ("AUROC", "FPR95") for name in (*sets, "mean")}
    per_set_names |= {f"{bits}/{name}" for bits in ("BitsPerDim", "BitsPerDimMedian") for name in (*sets, "mean")}
    assert both.keys() == OVERALL | BITS | per_set_names
    for name, metrics in alone.items():
        assert metrics.keys() == OVERALL | BITS  # a single set has no lines of its own
        assert both[f"AUROC/{name}"] == metrics["image_AUROC"]
        assert both[f"FPR95/{name}"] == metrics["image_FPR95"]
        assert both[f"BitsPerDim/{name}"] == pytest.approx(metrics["BitsPerDim/outside"], abs=1e-9)
        assert both["BitsPerDim/inside"] == pytest.approx(metrics["BitsPerDim/inside"], abs=1e-9)
    # AUROC is linear in the outside images, so that all of them together are the sets' weighted mean.
    assert both["image_AUROC"] == pytest.approx((30 * both["AUROC/squares"] + 20 * both["AUROC/others"]) / 50)
    assert both["AUROC/mean"] == pytest.approx((both["AUROC/squares"] + both["AUROC/others"]) / 2)


def test_bits_per_dimension_are_those_of_the_model(fitted, folder, tmp_path):
    module = cross(folder, "squares")
    metrics = run_test(fitted, module, tmp_path)
    batch = module.test_data.__getitems__(range(len(module.test_data)))
    with torch.no_grad():
        bits = fitted.model.bits_per_dim(fitted.pre_processor.transform(batch.image)).double()
    assert metrics["BitsPerDim/inside"] == pytest.approx(bits[batch.gt_label == 0].mean().item(), abs=1e-5)
    assert metrics["BitsPerDim/outside"] == pytest.approx(bits[batch.gt_label == 1].mean().item(), abs=1e-5)


def test_a_score_that_is_no_likelihood_has_no_bits(fitted, folder, tmp_path, monkeypatch):
    assert embedding_flow().model.scores_are_likelihoods
    assert not feature_map_flow().model.scores_are_likelihoods
    monkeypatch.setattr(type(fitted.model), "scores_are_likelihoods", False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*before the ``update`` method")
        assert run_test(fitted, cross(folder, "squares"), tmp_path).keys() == OVERALL


def test_a_second_test_and_one_after_an_interruption_begin_anew(fitted, folder, tmp_path):
    class Interrupt(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
            if batch_idx == 2:
                raise RuntimeError

    module = cross(folder, "squares", "others")
    first = run_test(fitted, module, tmp_path)
    assert run_test(fitted, module, tmp_path) == first
    with pytest.raises(RuntimeError):
        run_test(fitted, module, tmp_path, callbacks=[Interrupt()])
    assert run_test(fitted, module, tmp_path) == first


def test_the_classes_of_one_class_are_sets(fitted, tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(("good", "crack", "dent")):
            (tmp_path / "part" / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = rng.normal(80 + 40 * number, 9, (12, 12)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(tmp_path / "part" / split / name / f"{i}.png")
    metrics = run_test(fitted, OneClass(tmp_path / "part", "good"), tmp_path)
    assert {"AUROC/crack", "AUROC/dent", "AUROC/mean", "BitsPerDim/dent"} <= metrics.keys()
    assert "AUROC/good" not in metrics


def test_a_data_module_without_sources_has_one_outside_set(fitted, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train", "good", "bad", "worse"):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    module = Folder("part", root=tmp_path, normal_dir="train", normal_test_dir="good", abnormal_dir=["bad", "worse"])
    module.num_workers = 0
    assert run_test(fitted, module, tmp_path).keys() == OVERALL | BITS


def test_anomalibs_own_evaluator_takes_the_metrics_too(fitted, folder, tmp_path):
    evaluator, fitted.evaluator = fitted.evaluator, Evaluator(test_metrics=[AUROC(prefix="image_"), BitsPerDim()])
    try:
        metrics = run_test(fitted, cross(folder, "squares", "others"), tmp_path)
    finally:
        fitted.evaluator = evaluator
    assert metrics.keys() == {"image_AUROC", "BitsPerDim/inside"}


def test_barebones_returns_the_same(fitted, folder, tmp_path):
    module = cross(folder, "squares", "others")
    expected = run_test(fitted, module, tmp_path)
    run = engine(tmp_path, barebones=True)
    run.test(fitted, datamodule=module, verbose=False)
    values = {name: value.item() for name, value in run.trainer.callback_metrics.items()}
    assert values == pytest.approx(expected, abs=1e-9)


def test_a_detector_of_anomalib_may_have_its_scores_in_a_column(folder, tmp_path):
    small = {"backbone": "test_resnet", "layers": ["layer1"], "n_features": 8, "pre_trained": False}
    padim = Padim(
        **small, pre_processor=Padim.configure_pre_processor(image_size=(32, 32)), evaluator=PerSetEvaluator()
    )
    module = cross(folder, "squares", "others")
    engine(tmp_path).fit(padim, datamodule=module)
    metrics = run_test(padim, module, tmp_path)
    batches = engine(tmp_path).predict(padim, dataloaders=module.test_dataloader())
    scores, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("pred_score", "gt_label"))
    assert scores.shape == (len(labels), 1)
    assert metrics["image_AUROC"] == roc_auc_score(labels, scores)
    assert metrics.keys() >= {"AUROC/squares", "AUROC/others", "AUROC/mean", "image_F1Score", "DetectionError/mean"}


def test_a_config_file_takes_all_metrics_or_some():
    def evaluator(**init_args: object) -> PerSetEvaluator:
        entry = {"class_path": "anomalib_flowood.metrics.PerSetEvaluator", "init_args": init_args}
        small = {
            "backbone": "test_resnet",
            "layers": ["layer1"],
            "n_features": 8,
            "pre_trained": False,
            "evaluator": entry,
        }
        return build("model", {"class_path": "Padim", "init_args": small}).evaluator

    names = [metric.name for metric in evaluator().test_metrics]
    bits = ["BitsPerDim/inside", "BitsPerDimMedian/inside"]
    assert names == [*(f"image_{name}" for name in (*DETECTION_METRICS, "F1Score")), *bits]
    metric = {"class_path": "anomalib_flowood.metrics.DetectionError", "init_args": {"prefix": "image_"}}
    assert [metric.name for metric in evaluator(test_metrics=[metric]).test_metrics] == ["image_DetectionError"]


@pytest.mark.parametrize("sets", [MOST_SETS, MOST_SETS + 1])
def test_many_sets_do_not_bury_the_table(sets, monkeypatch):
    names = [f"set {number}" for number in range(sets)]
    batch = SourcedImageBatch(
        image=torch.zeros(sets + 1, 3, 2, 2),
        pred_score=torch.arange(sets + 1.0),
        gt_label=torch.tensor([0] + [1] * sets),
        source=["in", *names],
    )
    batch.bits_per_dim = batch.pred_score  # type: ignore[attr-defined]
    evaluator = PerSetEvaluator(test_metrics=[AUROC(prefix="image_"), BitsPerDim()])
    logged = []
    module = SimpleNamespace(log=lambda name, value, sync_dist: logged.append(name))
    evaluator.on_test_batch_end(None, None, None, batch, 0)
    evaluator.on_test_epoch_end(SimpleNamespace(barebones=False), module)
    each = {f"{metric}/{name}" for metric in ("AUROC", "BitsPerDim") for name in names} if sets <= MOST_SETS else set()
    both = {"BitsPerDim/inside", "BitsPerDim/outside"}
    assert set(logged) == {"image_AUROC", "AUROC/mean", "BitsPerDim/mean", *both, *each}
    assert len(evaluator.test_metrics[0].compute_sets()) == sets + 1  # all of them, for who asks


def test_bits_are_computed_for_those_who_want_them_and_cost_no_speed(fitted, folder, tmp_path, monkeypatch):
    def slow(images: torch.Tensor, **_: object) -> torch.Tensor:
        time.sleep(0.5)
        return torch.zeros(len(images))

    monkeypatch.setattr(fitted.model, "bits_per_dim", slow)
    recorder = ScoreRecorder()
    start = time.perf_counter()
    run_test(fitted, cross(folder, "squares"), tmp_path, callbacks=[recorder])
    batches = math.ceil(70 / 16)
    assert recorder.seconds + batches * 0.5 < time.perf_counter() - start
    monkeypatch.setattr(fitted.model, "bits_per_dim", None)
    evaluator, fitted.evaluator = fitted.evaluator, PerSetEvaluator(test_metrics=[AUROC()])
    try:
        run_test(fitted, cross(folder, "squares"), tmp_path)
    finally:
        fitted.evaluator = evaluator


@pytest.mark.parametrize("label", [0, 1])
def test_the_table_says_what_is_not_defined(label, fitted, folder, tmp_path, capsys):
    module = cross(folder, "squares", "others")
    module.setup()
    images = module.test_data
    images.samples = images.samples[images.samples["label_index"] == label]
    loader = DataLoader(images, batch_size=16, collate_fn=images.collate_fn)
    with pytest.warns(UserWarning, match="image_F1Score is not defined"):
        (metrics,) = engine(tmp_path).test(fitted, dataloaders=loader)
    assert all(math.isnan(metrics[name]) for name in OVERALL)
    assert math.isfinite(metrics["BitsPerDim/outside" if label else "BitsPerDim/inside"])
    lines = capsys.readouterr().out.splitlines()
    for name in (*OVERALL, "BitsPerDim/inside" if label else "BitsPerDim/outside"):
        (line,) = (line for line in lines if f" {name} " in line)
        assert "not defined" in line
    assert not any("nan" in line for line in lines)


def test_of_several_devices_nothing_is_said_and_one_later_has_its_metrics_in_main_memory(caplog):
    evaluator = PerSetEvaluator()
    with patch.object(evaluator, "metrics_to_cpu") as moved:
        evaluator.setup(SimpleNamespace(num_devices=2, world_size=2), None, "validate")
        assert not moved.called
        evaluator.setup(SimpleNamespace(num_devices=1, world_size=2), None, "validate")  # of each of two machines
        assert not moved.called
        evaluator.setup(SimpleNamespace(num_devices=1, world_size=1), None, "validate")
        assert moved.called
    assert not caplog.records
