# SPDX-License-Identifier: Apache-2.0
"""From a configuration to jobs; one job."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from benchmark_helpers import DFM, PADIM, folder, jobs

from anomalib_flowood.benchmark.checking import Counts

COUNTS = Counts(train=100, val=20)


def test_a_training_without_end_is_refused(images: Path) -> None:
    fastflow = {"class_path": "Fastflow", "init_args": {"backbone": "resnet18", "pre_trained": False}}
    with pytest.raises(ValueError, match=r"1,000 epochs. Set benchmark.trainer.max_epochs"):
        jobs(model=fastflow, data=folder(images))[0].check(COUNTS)
    jobs(model=fastflow, data=folder(images), trainer={"max_steps": 3})[0].check(COUNTS)
    ours = {"class_path": "PixelFlow", "init_args": {"image_size": [8, 8]}}
    jobs(model=ours, data=folder(images))[0].check(COUNTS)  # brings its own max_epochs


def test_labels_say_what_differs(images: Path) -> None:
    def labels(*entries: dict) -> list[str]:
        return [job.detector for job in jobs(model={"grid": list(entries)}, data=folder(images))]

    def dfm(**args: object) -> dict:
        return {"class_path": "Dfm", "init_args": args}

    assert labels(dfm(), PADIM) == ["Dfm", "Padim"]
    assert labels(dfm(layer="layer1", pca_level=0.9), dfm(layer="layer2", pca_level=0.9)) == [
        "Dfm (layer=layer1)",
        "Dfm (layer=layer2)",
    ]
    assert labels(dfm(), dfm(layer="layer2")) == ["Dfm", "Dfm (layer=layer2)"]
    named = {**dfm(layer="layer1"), "name": "mine"}, {**dfm(layer="layer2"), "name": "mine"}
    assert labels(*named) == ["mine (layer=layer1)", "mine (layer=layer2)"]
    long = [dfm(layer=start + "x" * 40) for start in "ab"]
    assert len(set(labels(*long))) == 2
    # Two jobs of one name would be one to `--resume`, and share their scores.
    padim = {"class_path": "Padim"}
    alike = [{**dfm(), "name": "set #1"}, {**padim, "name": "set #1"}]
    assert labels(*alike) == ["set #1", "set #1 #2"]
    numbered = [{**padim, "name": "a #2"}, {**dfm(), "name": "a"}, {**padim, "name": "a"}]
    assert labels(*numbered) == ["a #2", "a", "a #3"]


def test_seeds_expand_and_the_trainer_reaches_every_job(images: Path) -> None:
    both = jobs(seed={"grid": [1, 2]}, model=DFM, data=folder(images), trainer={"max_epochs": 1})
    assert [(job.seed, job.detector, job.trainer) for job in both] == [
        (1, "DFM tiny", {"max_epochs": 1}),
        (2, "DFM tiny", {"max_epochs": 1}),
    ]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"seed": {"grid": []}}, "has no jobs: a grid of its configuration is empty"),  # it ended without a word
        ({"model": {"grid": []}}, "has no jobs: a grid of its configuration is empty"),
        ({"trainer": ["max_epochs"]}, r"benchmark.trainer has to be arguments of .* by name, got \['max_epochs'\]"),
        ({"trainer": "fast"}, "benchmark.trainer has to be arguments of .* by name, got 'fast'"),
    ],
)
def test_what_is_no_benchmark_is_refused(images: Path, section: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        jobs(**{"model": DFM, "data": folder(images), **section})


def test_the_same_seed_draws_the_same_weights(here: Path, images: Path) -> None:
    """anomalib builds the model before it sets the seed."""
    values = []
    for _ in range(2):
        (job,) = jobs(seed=5, model=DFM, data=folder(images, seed=0, val_split_mode="same_as_test"))
        torch.rand(7)
        job.run()
        values.append(job.scores["score"].to_numpy())
    np.testing.assert_array_equal(values[0], values[1])


def test_our_configurations_are_valid() -> None:
    paths = sorted((Path(__file__).parents[2] / "configs" / "benchmark").glob("*.yaml"))
    assert {path.stem for path in paths} >= {"cross_dataset", "one_class", "quickstart"}
    for path in paths:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["benchmark"]
        assert len(jobs(**section)) >= 4
