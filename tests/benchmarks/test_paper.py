# SPDX-License-Identifier: Apache-2.0
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from model_helpers import idx_folder, write_idx
from paper_helpers import small_profile

from anomalib_flowood import PixelFlow
from benchmarks.paper import fits, report, study
from benchmarks.paper.fits import SAMPLES, run_fit
from benchmarks.paper.plan import PAIR, plan
from benchmarks.paper.profiles import (
    CYCLE_BOTTLENECK,
    EMBEDDING,
    GLOW,
    Budget,
)
from benchmarks.results import KEY, append_rows, finished


class Here:
    """A pool that works at once and in this process."""

    def __init__(self, profile):
        del profile

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures):
        assert cancel_futures


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Two folders of idx files in the place of clothes and digits, the first with two classes."""
    for name, folder in (("INSIDE", "ramps"), ("OUTSIDE", "squares")):
        texture = "plain" if name == "INSIDE" else "square"
        path = idx_folder(tmp_path / folder, texture, train=60, test=20)
        for split, count in (("train", 60), ("t10k", 20)):
            write_idx(path / f"{split}-labels-idx1-ubyte", np.arange(count) % 2)
        monkeypatch.setattr(f"benchmarks.paper.plan.{name}", str(path))
    return tmp_path


def test_every_part_runs_and_is_not_run_again(sets, monkeypatch):
    budgets = {
        "mask_time": Budget((0,), seconds=0.3),
        "mask_epochs": Budget((0,), epochs=1, train_limit=40),
        "logit": Budget((0,), epochs=1, train_limit=20),
        "bottleneck": Budget((0,)),
        "samples": Budget((0,), epochs=1, train_limit=20),
        "embedding": Budget((0,), test_limit=10),
        "one_class": Budget((0,), seconds=0.2),
    }
    profile, output = small_profile(**budgets), sets / "out"
    work, ran = run_fit, []

    def counted(fit, root, output):
        ran.append(fit.key)
        if fit.part == "embedding" and len(ran) < 13:
            raise RuntimeError("out of order\nand more")
        return work(fit, root, output)

    monkeypatch.setattr(study, "run_fit", counted)
    rows = study.run(profile, output, pool=Here)
    assert len(ran) == 2 + 2 + 2 + 1 + 1 + 1 + 3
    failed = rows[rows["error"].notna()]
    assert list(failed["error"]) == ["RuntimeError: out of order"]
    assert "and more" in (output / "errors.log").read_text()

    rows = study.run(profile, output, pool=Here)
    assert ran[12:] == [("embedding", PAIR, EMBEDDING, 0)]  # only the failed one
    assert rows["error"].isna().all()
    assert study.run(profile, output, pool=None).equals(rows)  # nothing left: no pool is made
    assert finished(output) == {fit.key for fit in plan(profile)}

    rows = rows.set_index(["part", "detector"])
    timed = rows.loc["mask_time"]
    assert timed["fit_s"].between(0.3, 3).all()
    assert (timed["train_images"] == 45).all()
    assert (timed["test_images"] == 40).all()
    epochs = rows.loc["mask_epochs"]
    assert (epochs["epochs"] == 1).all()
    assert (epochs["images_seen"] == 30).all()
    bottleneck = rows.loc[("bottleneck", "K = 2")]
    assert bottleneck["epochs"] == 2  # the flow's own
    assert 0 <= bottleneck["coadaptation"] <= 1
    for name in ("bits_per_dim", "bits_per_dim_outside"):
        assert bottleneck[[name, f"{name}_median", f"{name}_centres"]].nunique() == 3
        assert bottleneck[name] > bottleneck[f"{name}_centres"] > 0
    assert rows.loc["one_class", "bits_per_dim"].isna().all()  # which nobody compares
    embedding = rows.loc[("embedding", EMBEDDING)]
    assert np.isnan(embedding["bits_per_dim"])
    assert embedding["test_images"] == 20
    assert (rows.loc["one_class"]["test_images"] == 20).all()
    assert rows["auroc"].between(0, 1).all()
    samples = sorted(path.name for path in (output / "samples").iterdir())
    assert samples == [
        "bottleneck-k-2-0.npz",
        "logit-checkerboard-0-25-0.npz",
        "logit-cycle-bottleneck-0-25-0.npz",
        "mask_epochs-checkerboard-0.npz",
        "mask_epochs-cycle-bottleneck-0.npz",
        "mask_time-checkerboard-0.npz",
        "mask_time-cycle-bottleneck-0.npz",
        "samples-glow-0.npz",
    ]
    images = np.load(output / "samples" / samples[-1])
    assert list(images) == ["real", "1", "0.8", "0.6"]
    assert {some.shape for some in images.values()} == {(SAMPLES, 12, 12)}
    assert images["0.6"].std() < images["1"].std()
    into = sets / "into"
    report.write(output, into)
    assert {path.name for path in into.iterdir()} >= {"likelihood.png", "masks.png", "one_class.png", "samples.png"}


def test_under_a_time_limit_the_learning_rate_follows_a_cosine(sets, monkeypatch):
    profile = small_profile(mask_time=Budget((0,), seconds=1.5))
    fit = next(fit for fit in plan(profile) if fit.detector == CYCLE_BOTTLENECK)
    rates = []
    step = PixelFlow.training_step

    def watched(self, batch, batch_idx):
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(PixelFlow, "training_step", watched)
    run_fit(fit, "unused", sets / "out")
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1e-3, rel=0.05)
    assert rates[-1] < 1e-4


def test_metrics_are_those_of_the_raw_scores():
    detector = plan(small_profile(mask_time=Budget((0,))))[0].build()
    scores = pd.DataFrame({"score": [-2.0, -1.0, 0.0, 1.0], "label": [0, 0, 1, 1]})
    metrics = fits._detection(scores) | fits._bits_at_centres(detector.model, scores)
    assert metrics["auroc"] == 1
    assert metrics["fpr95"] == 0
    assert metrics["bits_per_dim_centres"] == pytest.approx(8 - 1.5 / np.log(2))
    assert metrics["bits_per_dim_outside_centres"] == pytest.approx(8 + 0.5 / np.log(2))


def test_a_process_pool_runs_fits_and_outlives_their_errors(sets):
    profile = small_profile(bottleneck=Budget((0,), epochs=1))
    (fit,) = plan(profile)
    broken = replace(fit, arguments={**fit.arguments, "bottleneck_dim": 0})
    # The other process knows the fit alone, not the folders that stand in for its data sets.
    with study.processes(profile) as pool:
        with pytest.raises(ValueError, match="bottleneck_dim"):
            pool.submit(run_fit, broken, "unused", sets).result()
        assert pool.submit(torch.get_num_threads).result() == 1


def test_rows_that_measured_other_things_are_not_mixed_with_new_ones(tmp_path):
    append_rows(tmp_path, [dict(zip(KEY, ("mask_time", PAIR, GLOW, 0), strict=True))], KEY)
    with pytest.raises(ValueError, match=r"results\.csv was written by a version .*bits_per_dim.*--output"):
        study.run(small_profile(mask_time=Budget()), tmp_path, pool=None)
