# SPDX-License-Identifier: Apache-2.0
import pickle
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from model_helpers import BACKBONE, idx_folder, write_idx

from anomalib_flowood import PixelFlow
from benchmarks.paper import report, study
from benchmarks.results import KEY, append_rows, finished, read_rows


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


# -- plan -----------------------------------------------------------------------------------------------------------


def test_the_plan_covers_the_study():
    fits = study.plan(study.LAPTOP)
    count = {part: sum(fit.part == part for fit in fits) for part in study.PARTS}
    first = {"mask_time": 18, "mask_epochs": 6, "logit": 3, "bottleneck": 6}
    assert count == {**first, "multi_scale": 2, "samples": 2, "embedding": 3, "one_class": 30}
    # The paper's logit where its claims are checked, flatter ones where it is said.
    alphas = {part: {fit.arguments.get("logit_alpha") for fit in fits if fit.part == part} for part in study.PARTS}
    assert alphas["mask_time"] == alphas["mask_epochs"] == alphas["multi_scale"] == {study.PAPERS_ALPHA}
    assert alphas["logit"] == {study.FLATTER_ALPHA}
    assert len({fit.key for fit in fits}) == len(fits)
    seeds = [fit.seed for fit in fits]
    assert seeds == sorted(seeds)  # the first seed of everything first
    assert {fit.arguments["bottleneck_dim"] for fit in fits if fit.part == "bottleneck"} == {2, 5, 10, 20, 50, 100}
    assert {fit.normal_class for fit in fits if fit.part == "one_class"} == set(range(10))
    assert pickle.loads(pickle.dumps(fits)) == fits
    assert {fit.part for fit in study.plan(study.LAPTOP, ["embedding"])} == {"embedding"}


def test_masks_are_compared_with_the_same_subnet():
    for profile in study.PROFILES.values():
        compared = [profile.flows[name] for name in (study.CHECKERBOARD, study.HORIZONTAL, study.CYCLE)]
        rest = [{key: value for key, value in each.items() if key not in {"mask", "native"}} for each in compared]
        assert rest[0] == rest[1] == rest[2]
        assert len({flow["learning_rate"] for flow in profile.flows.values()}) == 1


def test_the_laptop_has_45_minutes():
    fits = study.plan(study.LAPTOP)
    rows = read_rows(report.HERE).set_index(list(KEY))
    assert {fit.key for fit in fits} == finished(report.HERE)  # what was published is the whole plan
    for fit in fits:
        if fit.budget.seconds and fit.detector != study.EMBEDDING:
            assert rows.loc[fit.key, "fit_s"] == pytest.approx(fit.budget.seconds, abs=2)
    assert rows["wall_s"].sum() / study.LAPTOP.workers < 45 * 60


def test_the_full_profile_has_the_published_settings():
    flows = study.FULL.flows
    assert {budget.batch_size for budget in study.FULL.budgets.values()} == {32}
    assert {flow["learning_rate"] for flow in flows.values()} == {5e-5}
    assert {name: flow["max_epochs"] for name, flow in flows.items()} == {
        name: 151 if name == study.GLOW else 81 for name in report.FLOWS
    }
    assert flows[study.CHANNEL]["num_blocks"] == flows[study.HORIZONTAL]["num_blocks"] == 6
    assert {flow["logit_alpha"] for flow in (*flows.values(), study.FULL.bottleneck)} == {0.05}
    glow = flows[study.GLOW]
    assert (glow["architecture"], glow["scales"], glow["coupling_layers"]) == ("glow", 2, 16)
    assert "subnet" not in glow  # Glow's own is the highway network
    for fit in study.plan(study.FULL):
        assert fit.budget.train_limit is fit.budget.test_limit is fit.budget.epochs is None
        if (fit.part, fit.seed) == ("mask_epochs", 0):
            assert fit.build().max_epochs == flows[fit.detector]["max_epochs"]


# -- fits -----------------------------------------------------------------------------------------------------------


def small_profile(**budgets):
    tiny = {"image_size": (12, 12), "channels": 1, "coupling_layers": 4, "hidden_channels": 8, "learning_rate": 1e-3}
    flows = {
        study.CHECKERBOARD: {**tiny, "mask": "checkerboard", "subnet": "resnet", "num_blocks": 1},
        study.CYCLE_BOTTLENECK: {**tiny, "bottleneck_dim": 3, "max_epochs": 2},
    }
    embedding = {"backbone": BACKBONE, "pre_trained": False, "image_size": (32, 32), "subspace_dim": 8, "max_epochs": 1}
    bottleneck, sampled = flows[study.CYCLE_BOTTLENECK], {study.GLOW: {**tiny, "architecture": "glow", "num_blocks": 1}}
    return study.Profile(
        "small", "cpu", 1, flows, bottleneck, sampled, embedding, budgets, bottleneck_dims=(2,), classes=(0,)
    )


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Two folders of idx files in the place of clothes and digits, the first with two classes."""
    for name, folder in (("INSIDE", "ramps"), ("OUTSIDE", "squares")):
        texture = "plain" if name == "INSIDE" else "square"
        path = idx_folder(tmp_path / folder, texture, train=60, test=20)
        for split, count in (("train", 60), ("t10k", 20)):
            write_idx(path / f"{split}-labels-idx1-ubyte", np.arange(count) % 2)
        monkeypatch.setattr(study, name, str(path))
    return tmp_path


def test_every_part_runs_and_is_not_run_again(sets, monkeypatch):
    budgets = {
        "mask_time": study.Budget((0,), seconds=0.3),
        "mask_epochs": study.Budget((0,), epochs=1, train_limit=40),
        "logit": study.Budget((0,), epochs=1, train_limit=20),
        "bottleneck": study.Budget((0,)),
        "samples": study.Budget((0,), epochs=1, train_limit=20),
        "embedding": study.Budget((0,), test_limit=10),
        "one_class": study.Budget((0,), seconds=0.2),
    }
    profile, output = small_profile(**budgets), sets / "out"
    work, ran = study.run_fit, []

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
    assert ran[12:] == [("embedding", study.PAIR, study.EMBEDDING, 0)]  # only the failed one
    assert rows["error"].isna().all()
    assert study.run(profile, output, pool=None).equals(rows)  # nothing left: no pool is made
    assert finished(output) == {fit.key for fit in study.plan(profile)}

    rows = rows.set_index(["part", "detector"])
    timed = rows.loc["mask_time"]
    assert timed["fit_s"].between(0.3, 3).all()
    assert (timed["train_images"] == 54).all()
    assert (timed["test_images"] == 40).all()
    epochs = rows.loc["mask_epochs"]
    assert (epochs["epochs"] == 1).all()
    assert (epochs["images_seen"] == 36).all()
    bottleneck = rows.loc[("bottleneck", "K = 2")]
    assert bottleneck["epochs"] == 2  # the flow's own
    assert 0 <= bottleneck["coadaptation"] <= 1
    for name in ("bits_per_dim", "bits_per_dim_outside"):
        assert bottleneck[[name, f"{name}_median", f"{name}_centres"]].nunique() == 3
        assert bottleneck[name] > bottleneck[f"{name}_centres"] > 0
    assert rows.loc["one_class", "bits_per_dim"].isna().all()  # which nobody compares
    embedding = rows.loc[("embedding", study.EMBEDDING)]
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
    assert {some.shape for some in images.values()} == {(study.SAMPLES, 12, 12)}
    assert images["0.6"].std() < images["1"].std()
    into = sets / "into"
    report.write(output, into)
    assert {path.name for path in into.iterdir()} >= {"likelihood.png", "masks.png", "one_class.png", "samples.png"}


def test_under_a_time_limit_the_learning_rate_follows_a_cosine(sets, monkeypatch):
    profile = small_profile(mask_time=study.Budget((0,), seconds=1.5))
    fit = next(fit for fit in study.plan(profile) if fit.detector == study.CYCLE_BOTTLENECK)
    rates = []
    step = PixelFlow.training_step

    def watched(self, batch, batch_idx):
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(PixelFlow, "training_step", watched)
    study.run_fit(fit, "unused", sets / "out")
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1e-3, rel=0.05)
    assert rates[-1] < 1e-4


def test_metrics_are_those_of_the_raw_scores():
    detector = study.plan(small_profile(mask_time=study.Budget((0,))))[0].build()
    scores = pd.DataFrame({"score": [-2.0, -1.0, 0.0, 1.0], "label": [0, 0, 1, 1]})
    metrics = study._metrics(detector, scores)
    assert metrics["auroc"] == 1
    assert metrics["fpr95"] == 0
    assert metrics["bits_per_dim_centres"] == pytest.approx(8 - 1.5 / np.log(2))
    assert metrics["bits_per_dim_outside_centres"] == pytest.approx(8 + 0.5 / np.log(2))


def test_a_trial_is_small():
    for profile in study.PROFILES.values():
        fits = study.plan(study.trial(profile, 60))
        samples = len(profile.sampled)
        assert samples == (2 if profile is study.LAPTOP else 0)
        assert {fit.budget.train_limit for fit in fits} == {60}
        assert {fit.seed for fit in fits} == {0}
        assert len(fits) == 6 + 6 + 3 + 6 + 2 + samples + 1 + 2 * 3


def test_a_process_pool_runs_fits_and_outlives_their_errors(sets):
    profile = small_profile(bottleneck=study.Budget((0,), epochs=1))
    (fit,) = study.plan(profile)
    broken = replace(fit, arguments={**fit.arguments, "bottleneck_dim": 0})
    # The other process knows the fit alone, not the folders that stand in for its data sets.
    with study.processes(profile) as pool:
        with pytest.raises(ValueError, match="bottleneck_dim"):
            pool.submit(study.run_fit, broken, "unused", sets).result()
        assert pool.submit(torch.get_num_threads).result() == 1


# -- report ---------------------------------------------------------------------------------------------------------


def rows_of(part, detector, values, task=study.PAIR, **more):
    """A row for each value of AUROC, the seeds counted from 0."""
    common = {"bits_per_dim": 4.0, "bits_per_dim_outside": 3.0, "coadaptation": 0.2, "prediction": 0.4}
    common |= {"bits_per_dim_median": 3.875, "bits_per_dim_outside_median": 2.875}
    common |= {"bits_per_dim_centres": 2.25, "bits_per_dim_outside_centres": 2.5}
    common |= {"fit_s": 10, "wall_s": 20, "epochs": 1, "images_seen": 100, "train_images": 90, "test_images": 40}
    common |= {"machine": "abacus", "finished": "2026-11-01T10:00:00"}
    start = {"part": part, "task": task, "detector": detector, "fpr95": 0.1}
    return [{**start, "seed": seed, "auroc": value, **common, **more} for seed, value in enumerate(values)]


def as_study_would(**changes):
    """Rows in which every claim holds, with some parts changed."""
    parts = {
        "checkerboard": rows_of("mask_time", study.CHECKERBOARD, [0.02, 0.04], bits_per_dim=2.5),
        "channel": rows_of("mask_time", study.CHANNEL, [0.03, 0.04], bits_per_dim=2.6),
        "glow": rows_of("mask_time", study.GLOW, [0.1, 0.12], bits_per_dim=2.7),
        "horizontal": rows_of("mask_time", study.HORIZONTAL, [0.2, 0.22], coadaptation=0.5, bits_per_dim=2.8),
        "cycle": rows_of("mask_time", study.CYCLE, [0.5, 0.52], coadaptation=0.2, bits_per_dim=3.0),
        "bottleneck": rows_of("mask_time", study.CYCLE_BOTTLENECK, [0.8, 0.84], bits_per_dim=4.0),
        "flat": rows_of("logit", study.with_flatter_logit(study.CYCLE_BOTTLENECK), [0.85], bits_per_dim=4.2),
        "squeezed channel": rows_of("multi_scale", study.with_bottleneck(study.CHANNEL), [0.7], bits_per_dim=3.2),
        "squeezed glow": rows_of("multi_scale", study.with_bottleneck(study.GLOW), [0.7], bits_per_dim=3.2),
        "small": rows_of("samples", study.GLOW, [0.1], bits_per_dim=9.0),
        "k2": rows_of("bottleneck", "K = 2", [0.91, 0.93], bits_per_dim=4.5),
        "k100": rows_of("bottleneck", "K = 100", [0.7, 0.72], bits_per_dim=3.5),
        "embedding": rows_of("embedding", study.EMBEDDING, [0.98, 0.99], bits_per_dim=None),
    }
    for name, value in ((study.CHECKERBOARD, 0.5), (study.CYCLE_BOTTLENECK, 0.7), (study.EMBEDDING, 0.9)):
        for number, offset in enumerate((-0.1, 0.1)):
            task = f"fashion_mnist class {number}"
            parts[f"{name} {number}"] = rows_of("one_class", name, [value + offset], task)
    parts |= changes
    return pd.DataFrame([row for rows in parts.values() for row in rows], columns=list(study.COLUMNS))


def test_claims_that_hold():
    found = report.claims(as_study_would())
    assert len(found) == len(report._CLAIMS)
    assert [claim.text for claim in found if not claim.held] == []
    measured = "\n".join(claim.measured for claim in found)
    assert "0.030 ± 0.014 < 0.210 ± 0.014 < 0.820 ± 0.028" in measured
    assert "K = 2: 0.920 ± 0.014" in measured
    assert "2.50 times" in measured
    assert "0.985 ± 0.007 against 0.920 ± 0.014 (K = 2; the bottleneck)" in measured


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        # A gap of 0.03 between means of 0.05 and 0.08, whose standard deviations are 0.028 each.
        ("< horizontal <", {
            "checkerboard": rows_of("mask_time", study.CHECKERBOARD, [0.03, 0.07], bits_per_dim=2.5),
            "horizontal": rows_of("mask_time", study.HORIZONTAL, [0.06, 0.1], coadaptation=0.5, bits_per_dim=2.8),
        }),
        ("at least 0.90", {"k2": rows_of("bottleneck", "K = 2", [0.88, 0.91], bits_per_dim=4.5)}),
        ("Co-adaptation", {"cycle": rows_of("mask_time", study.CYCLE, [0.5, 0.52], coadaptation=0.26, bits_per_dim=3)}),
        ("Plain flows", {"glow": rows_of("mask_time", study.GLOW, [0.6, 0.6], bits_per_dim=3.2)}),
        ("smaller K detects", {"k100": rows_of("bottleneck", "K = 100", [0.89, 0.93], bits_per_dim=3.5)}),
        ("worse likelihood", {"k100": rows_of("bottleneck", "K = 100", [0.7, 0.72], bits_per_dim=4.6)}),
        ("multi-scale flows, too", {
            "squeezed glow": rows_of("multi_scale", study.with_bottleneck(study.GLOW), [0.09], bits_per_dim=2.7),
        }),
        ("pretrained", {"embedding": rows_of("embedding", study.EMBEDDING, [0.9, 0.95], bits_per_dim=None)}),
        ("One class", {"EmbeddingFlow 0": rows_of("one_class", study.EMBEDDING, [0.3], "fashion_mnist class 0")}),
    ],
)  # fmt: skip
def test_claims_that_do_not_hold(text, changes):
    found = report.claims(as_study_would(**changes))
    assert [text in claim.text for claim in found if not claim.held] == [True]


def test_better_likelihood_may_detect_better():
    better = rows_of("mask_time", study.CHECKERBOARD, [0.95, 0.96, 0.97, 0.98, 0.99], bits_per_dim=1.0)
    found = {claim.text: claim for claim in report.claims(as_study_would(checkerboard=better))}
    claim = next(found[text] for text in found if text.startswith("Better likelihood"))
    rows = report.pixel_runs(as_study_would(checkerboard=better))
    correlation = rows["bits_per_dim"].corr(rows["auroc"], method="spearman")
    assert correlation < 0.2
    assert f"{correlation:+.2f}" in claim.measured
    assert not claim.held


def test_report_writes_tables_and_plots(tmp_path):
    output, into = tmp_path / "out", tmp_path / "into"
    into.mkdir()
    (into / "README.md").write_text("before\n<!-- paper: begin -->\nold\n<!-- paper: end -->\nafter\n")
    for row in as_study_would().to_dict("records"):
        append_rows(output, [row], study.COLUMNS)
    (failed,) = rows_of("mask_epochs", study.GLOW, [None], error="X: y")
    append_rows(output, [failed], study.COLUMNS)
    report.write(output, into)
    text = (into / "README.md").read_text()
    assert text.startswith("before\n<!-- paper: begin -->")
    assert text.endswith("<!-- paper: end -->\nafter\n")
    assert "old" not in text
    assert "| Co-adaptation: horizontal at least twice that of cycle, same subnet | 0.500 ± 0.000 and 0.200" in text
    assert "| horizontal | 0.210 ± 0.014 |" in text
    assert "| fashion_mnist class 1 | 0.600 | 0.800 | 1.000 |" in text
    assert "| **mean ± spread** | **0.500 ± 0.141** | **0.700 ± 0.141** | **0.900 ± 0.141** |" in text
    assert "90 images to train on, 40 to test on; seeds 0, 1." in text
    assert "abacus; 2026-11-01; 28 fits" in text
    assert "lower by 0.25 to 2.25 on clothes and by 0.50 to 0.50 on digits" in text
    assert (
        "| K = 2 | 0.920 ± 0.014 | 0.100 ± 0.000 | 4.500 ± 0.000 | 3.875 ± 0.000 | 3.000 ± 0.000 | 2.875 ± 0.000 |"
        in text
    )
    assert "channel (RealNVP) 0.030 to 0.700, Glow 0.100 to 0.700" in text  # both of the first seed
    assert "| Glow, K = 50 | 0.700 |" in text
    assert "| cycle + bottleneck | 0.800 |" in text  # the first seed's of the mask study
    assert "| cycle + bottleneck, α = 0.25 | 0.850 |" in text
    assert "Failed: mask_epochs, Glow on fashion_mnist -> mnist." in text
    assert "samples.png" not in text  # none on this machine, and none drawn elsewhere
    for name in ("masks", "bottleneck", "likelihood", "one_class"):
        assert (into / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text
    assert read_rows(into).equals(read_rows(output))
    (into / "samples.png").write_bytes(b"drawn elsewhere")
    report.write(output, into)
    assert (into / "samples.png").read_bytes() == b"drawn elsewhere"
    assert "(samples.png)" in (into / "README.md").read_text()


def test_rows_that_measured_other_things_are_not_mixed_with_new_ones(tmp_path):
    append_rows(tmp_path, [dict(zip(KEY, ("mask_time", study.PAIR, study.GLOW, 0), strict=True))], KEY)
    with pytest.raises(ValueError, match=r"results\.csv was written by a version .*bits_per_dim.*--output"):
        study.run(small_profile(mask_time=study.Budget()), tmp_path, pool=None)


def test_no_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rows"):
        report.write(tmp_path)


def test_the_picture_shows_real_images_and_samples_of_both_flows(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(report, "draw_images", lambda rows, names, path: shown.update(rows))
    rows = pd.DataFrame(
        [
            *rows_of("samples", study.GLOW, [0.1]),
            *rows_of("mask_epochs", study.GLOW, [0.1]),
            *rows_of("mask_epochs", study.CHANNEL, [0.1, 0.1]),  # no fit of its own for the picture
            *rows_of("mask_time", study.CYCLE, [0.5]),
        ]
    )
    for value, row in enumerate(rows.to_dict("records")):
        path = study.sample_path(tmp_path, tuple(row[name] for name in ("part", "task", "detector", "seed")))
        path.parent.mkdir(exist_ok=True)
        names = ("real", *(f"{temperature:g}" for temperature in study.TEMPERATURES))
        counts = {name: 3 if name == "real" else 4 for name in names}
        np.savez(path, **{name: np.full((count, 2, 2), 51 * value, np.uint8) for name, count in counts.items()})
    assert report.draw_samples(rows, tmp_path, tmp_path / "samples.png")
    assert list(shown) == ["real", *(f"{flow}, T = {t}" for flow in ("RealNVP", "Glow") for t in ("1", "0.8", "0.6"))]
    assert {images.shape for images in shown.values()} == {(3, 1, 2, 2)}
    grey = {name: round(255 * float(images[0, 0, 0, 0])) for name, images in shown.items()}
    assert {grey[name] for name in grey if "RealNVP" in name} == {102}  # the first seed's
    assert {grey[name] for name in grey if "Glow" in name} == {0}
    assert not report.draw_samples(rows, tmp_path / "elsewhere", tmp_path / "samples.png")


def test_samples_are_laid_out_in_lines():
    mosaic = report._mosaic(np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8), columns=4)
    assert mosaic.shape == (9, 12)
    assert mosaic[3, 3] == 5  # second line, second image
    assert mosaic[2, 0] == 255
