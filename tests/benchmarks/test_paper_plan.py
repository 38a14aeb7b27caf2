# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest

from benchmarks.paper import report
from benchmarks.paper.plan import plan
from benchmarks.paper.profiles import (
    CHANNEL,
    CHECKERBOARD,
    CYCLE,
    EMBEDDING,
    FLATTER_ALPHA,
    FLOWS,
    FULL,
    GLOW,
    HORIZONTAL,
    LAPTOP,
    PAPERS_ALPHA,
    PARTS,
    PROFILES,
    trial,
)
from benchmarks.results import KEY, finished, read_rows


def test_the_plan_covers_the_study():
    fits = plan(LAPTOP)
    count = {part: sum(fit.part == part for fit in fits) for part in PARTS}
    first = {"mask_time": 18, "mask_epochs": 6, "logit": 3, "bottleneck": 6}
    assert count == {**first, "multi_scale": 2, "samples": 2, "embedding": 3, "one_class": 30}
    # The paper's logit where its claims are checked, flatter ones where it is said.
    alphas = {part: {fit.arguments.get("logit_alpha") for fit in fits if fit.part == part} for part in PARTS}
    assert alphas["mask_time"] == alphas["mask_epochs"] == alphas["multi_scale"] == {PAPERS_ALPHA}
    assert alphas["logit"] == {FLATTER_ALPHA}
    assert len({fit.key for fit in fits}) == len(fits)
    seeds = [fit.seed for fit in fits]
    assert seeds == sorted(seeds)  # the first seed of everything first
    assert {fit.arguments["bottleneck_dim"] for fit in fits if fit.part == "bottleneck"} == {2, 5, 10, 20, 50, 100}
    assert {fit.normal_class for fit in fits if fit.part == "one_class"} == set(range(10))
    assert pickle.loads(pickle.dumps(fits)) == fits
    assert {fit.part for fit in plan(LAPTOP, ["embedding"])} == {"embedding"}


def test_masks_are_compared_with_the_same_subnet():
    for profile in PROFILES.values():
        compared = [profile.flows[name] for name in (CHECKERBOARD, HORIZONTAL, CYCLE)]
        rest = [{key: value for key, value in each.items() if key not in {"mask", "native"}} for each in compared]
        assert rest[0] == rest[1] == rest[2]
        assert len({flow["learning_rate"] for flow in profile.flows.values()}) == 1


def test_the_laptop_has_45_minutes():
    fits = plan(LAPTOP)
    rows = read_rows(report.HERE).set_index(list(KEY))
    assert {fit.key for fit in fits} == finished(report.HERE)  # what was published is the whole plan
    for fit in fits:
        if fit.budget.seconds and fit.detector != EMBEDDING:
            assert rows.loc[fit.key, "fit_s"] == pytest.approx(fit.budget.seconds, abs=2)
    assert rows["wall_s"].sum() / LAPTOP.workers < 45 * 60


def test_the_full_profile_has_the_published_settings():
    flows = FULL.flows
    assert {budget.batch_size for budget in FULL.budgets.values()} == {32}
    assert {flow["learning_rate"] for flow in flows.values()} == {5e-5}
    assert {name: flow["max_epochs"] for name, flow in flows.items()} == {
        name: 151 if name == GLOW else 81 for name in FLOWS
    }
    assert flows[CHANNEL]["num_blocks"] == flows[HORIZONTAL]["num_blocks"] == 6
    assert {flow["logit_alpha"] for flow in (*flows.values(), FULL.bottleneck)} == {0.05}
    glow = flows[GLOW]
    assert (glow["architecture"], glow["scales"], glow["coupling_layers"]) == ("glow", 2, 16)
    assert "subnet" not in glow  # Glow's own is the highway network
    for fit in plan(FULL):
        assert fit.budget.train_limit is fit.budget.test_limit is fit.budget.epochs is None
        if (fit.part, fit.seed) == ("mask_epochs", 0):
            assert fit.build().max_epochs == flows[fit.detector]["max_epochs"]


def test_a_trial_is_small():
    for profile in PROFILES.values():
        fits = plan(trial(profile, 60))
        samples = len(profile.sampled)
        assert samples == (2 if profile is LAPTOP else 0)
        assert {fit.budget.train_limit for fit in fits} == {60}
        assert {fit.seed for fit in fits} == {0}
        assert len(fits) == 6 + 6 + 3 + 6 + 2 + samples + 1 + 2 * 3
