# SPDX-License-Identifier: Apache-2.0
"""The jobs of a benchmark: the grids of a configuration laid out, and one detector on one data set with one seed."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Generator
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from anomalib.engine import Engine
from anomalib.pipelines.benchmark.job import BenchmarkJob as AnomalibBenchmarkJob
from anomalib.pipelines.components import Job, JobGenerator
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict
from lightning import seed_everything
from lightning.fabric.utilities.seed import max_seed_value, min_seed_value
from lightning.pytorch import Callback, Trainer

from anomalib_flowood.data.datamodules.cross_dataset import grouped_sets
from anomalib_flowood.look import shorten
from anomalib_flowood.names import check_known
from anomalib_flowood.report.progress import JobProgress

from .building import KINDS, build, check_entry, config_key, find_class
from .checking import Counts, check_detector
from .recording import ScoreRecorder, measure

# The job sets these itself: a second value would be lost or clash.
_RESERVED_TRAINER_ARGUMENTS = ("accelerator", "callbacks", "default_root_dir")


class BenchmarkJob(AnomalibBenchmarkJob):
    """One detector on one data set with one seed.

    Unlike anomalib's job it holds the configuration, not the objects: the weights are drawn after the seed is set, and
    only one detector is in memory at a time.

    Args:
        accelerator: Lightning's name of the accelerator.
        detector: The detector's label in tables.
        data: The data set's label in tables.
        config: This job's share of the configuration: ``seed``, ``model``, ``data``.
        trainer: Arguments for Lightning's trainer.
    """

    def __init__(self, accelerator: str, detector: str, data: str, config: dict, trainer: dict[str, Any]) -> None:
        # anomalib's own constructor wants the finished objects, so it is not called.
        self.accelerator = accelerator
        self.detector = detector
        self.data = data
        self.config = config
        self.seed = config["seed"]
        self.flat_cfg = flatten_dict(config)
        self.trainer = trainer
        self.progress: JobProgress | None = None
        self.scores = pd.DataFrame()
        self.maps: dict[str, Any] = {}

    @property
    def title(self) -> str:
        """What the job is, for a person."""
        return f"{self.detector} on {self.data}, seed {self.seed}"

    def check(self, counts: Counts) -> None:
        """Build the detector once and throw it away.

        Args:
            counts: The numbers of images of the data module.

        Raises:
            ValueError: If the configuration names something unknown, the training would not end in reasonable time, or
                the images are too few.
            FileNotFoundError: If something is not there.
        """
        check_detector(build("model", self.config["model"]), self.trainer, counts)

    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Train and test.

        Args:
            task_id: The device to use, if jobs are spread over several.

        Returns:
            Labels, all metrics of the raw scores (of every out-of-distribution set too, where the data name several),
            times, anomalib's own test metrics and the configuration.
        """
        start = time.perf_counter()
        seed_everything(self.seed, verbose=False)
        model, datamodule = build("model", self.config["model"]), build("data", self.config["data"])
        model.visualizer = None  # it would write one picture per test image
        recorder = ScoreRecorder()
        callbacks: list[Callback] = [recorder, *([self.progress] if self.progress else [])]
        defaults = {
            "devices": 1 if task_id is None else [task_id],
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        with TemporaryDirectory() as folder:
            engine = Engine(
                accelerator=self.accelerator,
                default_root_dir=folder,
                callbacks=callbacks,
                **(defaults | self.trainer),
            )
            fit_start = time.perf_counter()
            engine.fit(model=model, datamodule=datamodule)
            test_start = time.perf_counter()
            tested = engine.test(model=model, datamodule=datamodule, verbose=False)
        end = time.perf_counter()
        self.scores = recorder.scores.assign(detector=self.detector, data=self.data, seed=self.seed)
        self.maps = recorder.shown_maps
        result = {
            **self.row(),
            **measure(recorder),
            "job_duration": end - start,
            "fit_duration": test_start - fit_start,
            "test_duration": end - test_start,
        }
        # What is in both comes from the raw scores: our detectors' evaluator sees the post-processed ones.
        return {**result, **self.flat_cfg, **tested[0], **result}

    def row(self) -> dict[str, Any]:
        """The part of a result that is known before the job has run."""
        return {"detector": self.detector, "data": self.data, "seed": self.seed, "accelerator": self.accelerator}


class BenchmarkJobGenerator(JobGenerator):
    """Turns a configuration into jobs.

    Args:
        accelerators: Lightning's names of the accelerators; every job is run on each.
    """

    def __init__(self, accelerators: list[str]) -> None:
        self.accelerators = accelerators

    @property
    def job_class(self) -> type[Job]:
        """The class of the jobs."""
        return BenchmarkJob

    def generate_jobs(self, args: dict | None = None, prev_stage_result: Any = None) -> Generator[Job, None, None]:
        """Expand the grids.

        Args:
            args: The ``benchmark`` section of the configuration.
            prev_stage_result: Unused; there is one stage.

        Yields:
            A job for every combination.

        Raises:
            ValueError: If the section has unknown or missing keys, or gives no job.
        """
        del prev_stage_result
        args = copy.deepcopy(args or {})
        check_known("key in the benchmark section", args, ("seed", "model", "data", "trainer"))
        missing = [key for key in ("model", "data") if not args.get(key)]
        if missing:
            msg = f"The benchmark section of the configuration lacks {' and '.join(missing)}."
            raise ValueError(msg)
        trainer = args.pop("trainer", None) or {}
        _check_trainer(trainer)
        configs = [copy.deepcopy(config) for config in get_iterator_from_grid_dict({"seed": 42} | args)]
        if not configs:
            msg = "The benchmark has no jobs: a grid of its configuration is empty."
            raise ValueError(msg)
        for config in configs:
            check_seed("benchmark.seed", config["seed"])
        for kind in KINDS:
            for entry in {config_key(config[kind]): config[kind] for config in configs}.values():
                check_entry(kind, entry)
        detectors, data = ([*_labels(kind, [config[kind] for config in configs])] for kind in ("model", "data"))
        for accelerator in self.accelerators:
            suffix = f" [{accelerator}]" if len(self.accelerators) > 1 else ""
            for config, detector, name in zip(configs, detectors, data, strict=True):
                yield BenchmarkJob(accelerator, detector + suffix, name, config, trainer)


def _check_trainer(trainer: object) -> None:
    if not isinstance(trainer, dict):
        msg = f"benchmark.trainer has to be arguments of Lightning's trainer by name, got {trainer!r}."
        raise ValueError(msg)
    allowed = set(inspect.signature(Trainer.__init__).parameters) - {"self", *_RESERVED_TRAINER_ARGUMENTS}
    for key, value in trainer.items():
        if key in _RESERVED_TRAINER_ARGUMENTS:
            msg = f"benchmark.trainer.{key} is set by the benchmark itself: remove it."
            raise ValueError(msg)
        if isinstance(value, dict) and "grid" in value:
            msg = f"benchmark.trainer.{key}: a grid is possible in seed, model and data only."
            raise ValueError(msg)
    check_known("trainer argument", trainer, allowed)


def check_seed(name: str, seed: object) -> None:
    """Refuse what NumPy's generator cannot be seeded with: :class:`ValueError` with the argument's name."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not min_seed_value <= seed <= max_seed_value:
        msg = f"{name} has to be an integer from {min_seed_value} to {max_seed_value} (32 bits), got {seed!r}."
        raise ValueError(msg)


def _base(kind: str, entry: dict) -> str:
    """What an entry is called where no other is called so: its name, the folders that it names, or its class."""
    arguments = entry.get("init_args") or {}
    inside = arguments.get("dataset") or arguments.get("in_distribution")
    if entry.get("name") or kind == "model" or not inside:
        return str(entry.get("name") or find_class(kind, entry["class_path"]).__name__)
    outside = [name for _, name in grouped_sets(arguments.get("out_of_distribution") or [])]
    return " → ".join(filter(None, [_folder(inside), ", ".join(map(_folder, outside))]))


def _folder(data_set: object) -> str:
    return Path(str(data_set)).resolve().name


def _labels(kind: str, entries: list[dict]) -> list[str]:
    """A short unique label for each distinct entry: its name, or its class and what sets it apart from the others."""
    distinct = {config_key(entry): entry for entry in entries}
    bases = {key: _base(kind, entry) for key, entry in distinct.items()}
    labels: dict[str, str] = {}
    taken: set[str] = set()
    for key, entry in distinct.items():
        alike = [
            flatten_dict(distinct[other].get("init_args") or {}) for other in distinct if bases[other] == bases[key]
        ]
        mine = flatten_dict(entry.get("init_args") or {})
        differing = [
            f"{name.rpartition('.')[2]}={_value(value)}"
            for name, value in mine.items()
            if any(name not in other or other[name] != value for other in alike)
        ]
        label = f"{bases[key]} ({', '.join(differing)})" if differing else bases[key]
        numbered = (f"{label} #{number}" for number in count(2))
        labels[key] = next(name for name in chain([label], numbered) if name not in taken)
        taken.add(labels[key])
    return [labels[config_key(entry)] for entry in entries]


def _value(value: object) -> str:
    """A setting's value in a label: of paths the end tells more."""
    return shorten("+".join(map(str, value)) if isinstance(value, list | tuple) else value, 24, keep_end=True)
