# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest

from benchmarks.contest import detectors
from benchmarks.contest.plan import TRAIN_LONG, plan
from benchmarks.contest.tasks import Options


def test_the_plan_covers_the_contest():
    options = Options(parts=("one_class", "cross"))
    jobs = plan(options)
    count = {name: sum(job.detector.name == name for job in jobs) for name in detectors.DETECTORS}
    assert count["EmbeddingFlow"] == 3 * 22
    assert count["KNN"] == count["Patchcore"] == 22
    # Class 0 of each set alone.
    assert [count[name] for name in TRAIN_LONG] == [2, 2, 2]
    keys = [key for job in jobs for key in job.keys(options.parts)]
    assert len(keys) == len(set(keys))
    named = plan(replace(options, parts=("one_class",), tasks=("mnist class 1",), detectors=("KNN",)))
    assert [job.task.name for job in named] == ["mnist class 1"]
    with pytest.raises(ValueError, match="no detector 'Nobody'"):
        plan(replace(options, detectors=("Nobody",)))
    with pytest.raises(ValueError, match="Nothing to run"):
        plan(replace(options, parts=("industrial",)))


def test_only_detectors_on_embeddings_run_on_what_was_left_out():
    jobs = plan(Options(parts=("left_out",)))
    count = {name: sum(job.detector.name == name for job in jobs) for name in detectors.DETECTORS}
    assert {name: number for name, number in count.items() if number} == {
        **dict.fromkeys(("EmbeddingFlow", "EmbeddingFlow (flow)"), 60),
        **dict.fromkeys(("KNN", "Mahalanobis", "PPCA"), 20),
    }
    assert len({key for job in jobs for key in job.keys(("left_out",))}) == len(jobs)
