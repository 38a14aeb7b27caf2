# SPDX-License-Identifier: Apache-2.0
"""Train and test many detectors on many data sets, and compare them on their raw scores.

The configuration file is anomalib's, with an optional ``benchmark.trainer`` and an optional ``name`` in each entry::

    accelerator: cpu
    benchmark:
      seed: 42
      trainer: {max_epochs: 5}
      model:
        grid:
          - {class_path: PixelFlow, name: cycle, init_args: {mask: cycle}}
          - {class_path: anomalib.models.Dfm}
      data:
        class_path: CrossDataset
        init_args: {in_distribution: fashion_mnist, out_of_distribution: [mnist]}

Detectors post-process their scores each in its own way (anomalib's clamps them to [0, 1], which makes ties), so every
detector's scores are taken before that happens, and all metrics are computed from them alike. Where the data name
several out-of-distribution sets, each of them has its own (``AUROC/mnist``), and ``AUROC/mean`` is their average.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import json
import logging
import re
import time
from argparse import ArgumentError
from collections.abc import Generator, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
import yaml
from anomalib import LearningType
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.pipelines.benchmark import Benchmark as AnomalibBenchmark
from anomalib.pipelines.benchmark.job import BenchmarkJob as AnomalibBenchmarkJob
from anomalib.pipelines.components import Job, JobGenerator, Runner
from anomalib.pipelines.components.runners import SerialRunner
from anomalib.pipelines.components.runners.serial import SerialExecutionError
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict
from jsonargparse import ArgumentParser, Namespace
from lightning import seed_everything
from lightning.fabric.utilities.seed import max_seed_value, min_seed_value
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from anomalib_flowood.engine import new_folder
from anomalib_flowood.metrics import DETECTION_METRICS, per_set, rate_text
from anomalib_flowood.names import subclasses, unknown_name
from anomalib_flowood.report import (
    JobProgress,
    benchmark_markdown,
    benchmark_table,
    score_histograms,
    set_markdown,
    set_table,
)
from anomalib_flowood.report.run import RECORD, RESULTS, SCORE_COLUMNS, SCORES, write_record

logger = logging.getLogger(__name__)

_BASES: dict[str, type] = {"model": AnomalibModule, "data": AnomalibDataModule}
_KINDS = {"model": "detector", "data": "data module"}
_ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")
# The job sets these itself: a second value would be lost or clash.
_RESERVED_TRAINER_ARGUMENTS = ("accelerator", "callbacks", "default_root_dir")


class BenchmarkError(SerialExecutionError):
    """Some jobs of a benchmark failed; the others' results are written all the same."""


# ---------------------------------------------------------------------------------------------------------------------
# From names and arguments to objects
# ---------------------------------------------------------------------------------------------------------------------


def readable(error: BaseException) -> str:
    """Strip jsonargparse's account of how it tried every type, and keep what was wrong.

    Args:
        error: Any error.

    Returns:
        Its message, or its type's name where it has none.
    """
    outer = ('Parser key "model"', 'Parser key "data"')
    noise = (*outer, "Does not validate", "Subtypes:", "Errors:", "Given value", "- Expected a <class 'NoneType'>")
    message = str(error).strip()
    if "Does not validate" in message:
        lines = [line.strip() for line in message.splitlines()]
        message = "\n".join(line.removeprefix("- ") for line in lines if line and not line.startswith(noise))
    return message or type(error).__name__


def find_class(kind: str, name: str) -> type:
    """Find a detector or a data module, this package's or anomalib's or anybody's that was imported.

    Args:
        kind: ``"model"`` or ``"data"``.
        name: A class name (``PixelFlow``), the same in snake case (``pixel_flow``) or a dotted path
            (``anomalib_flowood.PixelFlow``).

    Returns:
        The class.

    Raises:
        ValueError: If there is no such class; the message offers the nearest names.
    """
    base = _BASES[kind]
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError):
            found = None
        if isinstance(found, type) and issubclass(found, base):
            return found
    else:
        for cls in subclasses(base):
            if cls.__name__.lower() == name.replace("_", "").lower() and not inspect.isabstract(cls):
                return cls
    known = {cls.__name__.lower() for cls in subclasses(base) if not inspect.isabstract(cls)}
    error = unknown_name(_KINDS[kind], name.rpartition(".")[2], known)
    raise ValueError(str(error).replace(repr(name.rpartition(".")[2]), repr(name), 1))


def _parse(kind: str, entry: dict) -> tuple[ArgumentParser, Namespace]:
    """Check an entry's name and arguments without building anything."""
    cls = find_class(kind, entry["class_path"])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(_BASES[kind], kind, fail_untyped=False, required=True)
    config = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": entry.get("init_args") or {}}
    try:
        return parser, parser.parse_object({kind: copy.deepcopy(config)})
    except ArgumentError as error:
        message = readable(error)
        option = re.search(r"Option '(\w+)' is not accepted", message)
        if option and option[1] in config["init_args"]:
            inits = [vars(parent)["__init__"] for parent in cls.__mro__ if "__init__" in vars(parent)]
            names = {name for init in inits for name in inspect.signature(init).parameters} - {"self", "args", "kwargs"}
            better = unknown_name(f"argument of {cls.__name__}", option[1], names)
            raise better from None
        msg = f"{cls.__name__}: {message}"
        raise ValueError(msg) from None


def build(kind: str, entry: dict) -> Any:
    """Build a detector or a data module from an entry of a benchmark's configuration.

    Args:
        kind: ``"model"`` or ``"data"``.
        entry: ``class_path`` and ``init_args``, nested objects included.

    Returns:
        The object.

    Raises:
        ValueError: If the class or an argument is unknown or an argument's value is refused.
    """
    parser, config = _parse(kind, entry)
    try:
        return parser.instantiate_classes(config)[kind]
    except ValueError as error:
        msg = readable(error)
        raise ValueError(msg) from error


def _labels(kind: str, entries: list[dict]) -> list[str]:
    """A short unique label for each distinct entry: its name, or its class and what sets it apart from the others."""
    distinct = {_key(entry): entry for entry in entries}
    bases = {
        key: str(entry.get("name") or find_class(kind, entry["class_path"]).__name__) for key, entry in distinct.items()
    }
    labels: dict[str, str] = {}
    for key, entry in distinct.items():
        alike = [
            flatten_dict(distinct[other].get("init_args") or {}) for other in distinct if bases[other] == bases[key]
        ]
        mine = flatten_dict(entry.get("init_args") or {})
        differing = [
            f"{name.rpartition('.')[2]}={_short(value)}"
            for name, value in mine.items()
            if any(name not in other or other[name] != value for other in alike)
        ]
        label = f"{bases[key]} ({', '.join(differing)})" if differing else bases[key]
        taken = sum(existing.partition(" #")[0] == label for existing in labels.values())
        labels[key] = f"{label} #{taken + 1}" if taken else label
    return [labels[_key(entry)] for entry in entries]


def _key(config: object) -> str:
    """Tell equal pieces of configuration from different ones."""
    return json.dumps(config, sort_keys=True, default=str)


def _short(value: object) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 24 else f"…{text[-23:]}"


# ---------------------------------------------------------------------------------------------------------------------
# One job
# ---------------------------------------------------------------------------------------------------------------------


class ScoreRecorder(Callback):
    """Keeps every test image's raw score and times the test loop, data loading included.

    Lightning calls the callbacks given to the engine before the model's own, of which the post-processor is one: the
    scores are seen here before they are normalised and clamped.
    """

    def __init__(self) -> None:
        self._parts: list[pd.DataFrame] = []
        self._start = 0.0
        self.seconds = 0.0
        self.sourced = False
        """Whether the data say which set each image belongs to; else its folder is taken for its source."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._parts = []
        self._start = time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's scores.

        Raises:
            ValueError: If the detector gives neither a score nor a map, or the images have no labels.
        """
        del trainer, batch_idx, dataloader_idx
        score: Any = getattr(outputs, "pred_score", None)
        anomaly_map: Any = getattr(outputs, "anomaly_map", None)
        if score is None and anomaly_map is None:
            msg = f"{type(pl_module).__name__} gave neither a score nor an anomaly map for the test images."
            raise ValueError(msg)
        if batch.gt_label is None:
            msg = "The test images have no labels, so there is nothing to compare scores with."
            raise ValueError(msg)
        score = anomaly_map.flatten(1).amax(dim=1) if score is None else score
        raw = score.detach().flatten().cpu().double()
        paths = [str(path) for path in batch.image_path or [""] * len(raw)]
        sources = getattr(batch, "source", None)
        self.sourced = sources is not None
        sources = [Path(path).parent.name or "test" for path in paths] if sources is None else sources
        labels = batch.gt_label.detach().flatten().cpu().int()
        columns = {"image_path": paths, "source": list(sources), "label": labels.numpy(), "score": raw.numpy()}
        self._parts.append(pd.DataFrame(columns))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock before any metric is computed; bits per dimension, which no score needs, do not count."""
        del trainer
        self.seconds = time.perf_counter() - self._start - getattr(pl_module, "bits_seconds", 0.0)

    @property
    def scores(self) -> pd.DataFrame:
        """One row per test image: ``image_path``, ``source``, ``label``, ``score``."""
        if not self._parts:
            return pd.DataFrame(columns=["image_path", "source", "label", "score"])
        return pd.concat(self._parts, ignore_index=True)


def measure(recorder: ScoreRecorder) -> dict[str, Any]:
    """Compute all metrics of a test's raw scores, and its speed.

    Args:
        recorder: What it recorded.

    Returns:
        The metrics by name (of every out-of-distribution set too, where the data name several), ``images`` and
        ``images_per_s``.

    Raises:
        ValueError: If a score is NaN.
    """
    scores = recorder.scores
    score, label = torch.tensor(scores["score"].to_numpy()), torch.tensor(scores["label"].to_numpy())
    result: dict[str, Any] = {
        **{name: metric(score, label) for name, metric in DETECTION_METRICS.items()},
        "images": len(score),
        "images_per_s": len(score) / recorder.seconds,
    }
    if recorder.sourced:
        sources = scores["source"].tolist()
        for name, metric in DETECTION_METRICS.items():
            result |= {f"{name}/{key}": value for key, value in per_set(metric, score, label, sources).items()}
    return result


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

    @property
    def title(self) -> str:
        """What the job is, for a person."""
        return f"{self.detector} on {self.data}, seed {self.seed}"

    def check(self) -> None:
        """Build the detector and the data module once, and throw them away.

        Raises:
            ValueError: If the configuration names something unknown, or the training would not end in reasonable time.
        """
        build("data", self.config["data"])
        model = build("model", self.config["model"])
        if model.learning_type in {LearningType.ZERO_SHOT, LearningType.FEW_SHOT}:
            return  # never trained
        limits = {"max_epochs", "max_steps", "max_time"}
        bounded = limits & {*model.trainer_arguments, *self.trainer} or hasattr(model, "max_epochs")
        if not bounded:
            msg = (
                f"{type(model).__name__} does not say how long to train, and Lightning would run 1,000 epochs. "
                "Set benchmark.trainer.max_epochs (or max_steps, max_time)."
            )
            raise ValueError(msg)

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

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> pd.DataFrame:
        """Gather results whose keys need not agree (anomalib's job raises ``KeyError`` there).

        Args:
            results: One dictionary per job.

        Returns:
            One row per job; what a job does not have is empty.
        """
        return pd.DataFrame(results)


# ---------------------------------------------------------------------------------------------------------------------
# All jobs
# ---------------------------------------------------------------------------------------------------------------------


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
            ValueError: If the section has unknown or missing keys.
        """
        del prev_stage_result
        args = copy.deepcopy(args or {})
        _check_known("key in the benchmark section", args, ("seed", "model", "data", "trainer"))
        missing = [key for key in ("model", "data") if not args.get(key)]
        if missing:
            msg = f"The benchmark section of the configuration lacks {' and '.join(missing)}."
            raise ValueError(msg)
        trainer = args.pop("trainer", None) or {}
        _check_trainer(trainer)
        configs = [copy.deepcopy(config) for config in get_iterator_from_grid_dict({"seed": 42} | args)]
        for config in configs:
            check_seed("benchmark.seed", config["seed"])
        for kind in _BASES:
            for entry in {_key(config[kind]): config[kind] for config in configs}.values():
                _check_entry(kind, entry)
        detectors, data = ([*_labels(kind, [config[kind] for config in configs])] for kind in ("model", "data"))
        for accelerator in self.accelerators:
            suffix = f" [{accelerator}]" if len(self.accelerators) > 1 else ""
            for config, detector, name in zip(configs, detectors, data, strict=True):
                yield BenchmarkJob(accelerator, detector + suffix, name, config, trainer)


def check_seed(name: str, seed: object) -> None:
    """Refuse what NumPy's generator cannot be seeded with.

    Args:
        name: The argument's name.
        seed: Its value.

    Raises:
        ValueError: If it is no integer of 32 bits.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not min_seed_value <= seed <= max_seed_value:
        msg = f"{name} has to be an integer from {min_seed_value} to {max_seed_value} (32 bits), got {seed!r}."
        raise ValueError(msg)


def _check_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = set(known)
    for name in names:
        if name not in known:
            error = unknown_name(kind, name, known)
            raise error


def _check_entry(kind: str, entry: object) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
        msg = f"A benchmark's {kind} entry needs a class_path, got {entry!r}."
        raise ValueError(msg)
    _check_known(f"key in the {kind} entry {entry['class_path']}", entry, ("class_path", "init_args", "name"))
    _parse(kind, entry)


def _check_trainer(trainer: dict) -> None:
    allowed = set(inspect.signature(Trainer.__init__).parameters) - {"self", *_RESERVED_TRAINER_ARGUMENTS}
    for key, value in trainer.items():
        if key in _RESERVED_TRAINER_ARGUMENTS:
            msg = f"benchmark.trainer.{key} is set by the benchmark itself: remove it."
            raise ValueError(msg)
        if isinstance(value, dict) and "grid" in value:
            msg = f"benchmark.trainer.{key}: a grid is possible in seed, model and data only."
            raise ValueError(msg)
    _check_known("trainer argument", trainer, allowed)


class Results:
    """The results of a benchmark or a test in a folder, complete after every job.

    Args:
        folder: Where to write; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = self.folder / "benchmark.log"
        self._results: list[dict[str, Any]] = []
        self._scores: list[pd.DataFrame] = []

    @property
    def table(self) -> pd.DataFrame:
        """One row per job."""
        return BenchmarkJob.collect(self._results)

    def add(self, result: dict[str, Any], scores: pd.DataFrame) -> None:
        """Take in a finished job and write everything, so that a lost session loses one job at most.

        Args:
            result: The job's row.
            scores: One row per test image: ``detector``, ``data``, ``seed``, ``image_path``, ``source``, ``label``,
                ``score``; empty if the job failed.
        """
        self._results.append(result)
        self.table.to_csv(self.folder / RESULTS, index=False)
        if not scores.empty:
            first = not self._scores
            path = self.folder / SCORES
            scores[SCORE_COLUMNS].to_csv(path, mode="w" if first else "a", header=first, index=False)
            self._scores.append(scores)

    def finish(self, console: Console) -> None:
        """Draw, and print the table and where everything is."""
        if not self._results:
            return
        text = benchmark_markdown(self.table) + set_markdown(self.table)
        (self.folder / "table.md").write_text(text, encoding="utf-8")
        names = [RECORD, RESULTS, "table.md"]
        if self._scores:
            score_histograms(pd.concat(self._scores), self.folder / "scores.png")
            names += [SCORES, "scores.png"]
        console.print(benchmark_table(self.table))
        sets = set_table(self.table)
        if sets is not None:
            console.print(sets)
        for line in (f"In {self.folder}: {', '.join(names)}", f"As a page: flowood report {self.folder}"):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


class BenchmarkRunner(SerialRunner):
    """Runs the jobs one after the other, and says all along which one and how far."""

    def run(self, args: dict, prev_stage_results: Any = None) -> pd.DataFrame:
        """Check all jobs, then run them.

        Args:
            args: The ``benchmark`` section of the configuration.
            prev_stage_results: Unused; there is one stage.

        Returns:
            One row per job.

        Raises:
            ValueError: If any entry is wrong; nothing has been trained then.
            BenchmarkError: If jobs failed; the results of all others have been written.
        """
        console = Console()
        console.width = min(console.width, 100) if console.is_terminal else 100
        with JobProgress(console) as progress:
            with _logs_to(None):
                jobs = [job for job in self.generator(args, prev_stage_results) if isinstance(job, BenchmarkJob)]
                _check_jobs(jobs, progress)
            record = Results(new_folder(Path("runs") / BenchmarkJob.name))
            write_record(
                record.folder,
                BenchmarkJob.name,
                detectors={job.detector: job.config["model"] for job in jobs},
                data={job.data: job.config["data"] for job in jobs},
                settings={
                    "seeds": list(dict.fromkeys(job.seed for job in jobs)),
                    "accelerators": list(dict.fromkeys(job.accelerator for job in jobs)),
                    "trainer": args.get("trainer") or {},
                },
            )
            failed: list[str] = []
            try:
                with _logs_to(record.log):
                    for number, job in enumerate(jobs, start=1):
                        progress.start_job(number, len(jobs), job.title)
                        job.progress = progress
                        error = _run_job(job, record, progress)
                        if error:
                            failed.append(f"{job.title}: {error}")
            finally:  # an interrupted benchmark still shows what it has
                progress.stage("writing")
                progress.__exit__()
                record.finish(console)
        if failed:
            listed = "\n".join(f"  {line}" for line in failed)
            msg = f"{len(failed)} of {len(jobs)} jobs failed:\n{listed}\nFull tracebacks: {record.log}"
            raise BenchmarkError(msg)
        return record.table


def _check_jobs(jobs: list[BenchmarkJob], progress: JobProgress) -> None:
    """Build every distinct detector and data module once: a typo in the last entry shows before the first training."""
    checked = set()
    for number, job in enumerate(jobs, start=1):
        key = _key([job.config["model"], job.config["data"]])
        if key in checked:
            continue
        checked.add(key)
        progress.stage(f"checking {job.detector} on {job.data}")
        try:
            job.check()
        except Exception as error:
            msg = f"Job {number} of {len(jobs)} ({job.title}) cannot run: {readable(error)}"
            raise ValueError(msg) from error
    gc.collect()


def _run_job(job: BenchmarkJob, record: Results, progress: JobProgress) -> str:
    """Run one job and record it; returns its error's first line, or nothing."""
    message = ""
    try:
        result = job.run()
    except Exception as error:  # one broken job must not cost the others
        logger.exception("%s failed", job.title)
        message = f"{type(error).__name__}: {readable(error).splitlines()[0]}"
        result = {**job.row(), "error": message, **job.flat_cfg}
        job.scores = pd.DataFrame()  # of a diverged training they are NaN
        progress.say(f"  failed: {message}")
    else:
        progress.say(
            f"  AUROC {rate_text(result['AUROC'])}, FPR95 {rate_text(result['FPR95'])}, "
            f"fit {result['fit_duration']:.1f} s, {result['images_per_s']:,.1f} images/s",
        )
    record.add(result, job.scores)
    job.scores = pd.DataFrame()
    gc.collect()  # trainer and model refer to each other; without this two detectors are in memory
    return message


@contextlib.contextmanager
def _logs_to(path: Path | None) -> Iterator[None]:
    """Send all log lines and warnings to a file (or nowhere) for a while, and leave the logging as it was."""
    handler: logging.Handler = logging.NullHandler() if path is None else logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))
    root = logging.getLogger()
    # Loggers that only swallow are left alone: with nothing to write to, they would write to stderr.
    others = [
        log
        for log in root.manager.loggerDict.values()
        if isinstance(log, logging.Logger) and any(not isinstance(own, logging.NullHandler) for own in log.handlers)
    ]
    saved = [(log, log.handlers, log.level) for log in (root, *others)]
    for log, _, _ in saved:
        log.handlers = [handler] if log is root or not log.propagate else []
    root.setLevel(logging.INFO)
    logging.captureWarnings(capture=True)
    try:
        yield
    finally:
        logging.captureWarnings(capture=False)
        for log, handlers, level in saved:
            log.handlers = handlers
            log.setLevel(level)
        handler.close()


class Benchmark(AnomalibBenchmark):
    """Compare detectors on data sets: fit, test, metrics of the raw scores, one table."""

    def run(self, args: Namespace | None = None) -> None:
        """Run the benchmark that a configuration file describes.

        Args:
            args: ``config`` is the file's path; without arguments the command line is parsed.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the configuration is wrong; nothing has been trained then.
            BenchmarkError: If jobs failed; the results of all others have been written.
        """
        config = self._get_args(args)
        for runner in self._setup_runners(config):
            runner.run(config["benchmark"])

    def _get_args(self, args: Namespace | None) -> dict:
        if args is None:
            args = self.get_parser().parse_args()
        path = Path(str(args.config))
        if not path.is_file():
            msg = f"There is no configuration file {path}."
            raise FileNotFoundError(msg)
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            msg = f"{path} is not valid YAML: {error}"
            raise ValueError(msg) from error
        if not isinstance(config, dict) or not isinstance(config.get("benchmark"), dict):
            msg = f"{path} has no benchmark section."
            raise ValueError(msg)
        _check_known(f"key in {path}", config, ("accelerator", "benchmark"))
        return config

    @staticmethod
    def _setup_runners(args: dict) -> list[Runner]:
        """One runner for all accelerators, so that everything is checked before anything is trained."""
        given = args.get("accelerator", "auto")
        accelerators = [str(name) for name in (given if isinstance(given, list) else [given])]
        present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        present["gpu"] = present["cuda"] or present["mps"]
        _check_known("accelerator", accelerators, _ACCELERATORS)
        for name in accelerators:
            if not present.get(name, True):
                msg = f"This machine has no {name} accelerator that torch can use; accelerator: cpu always works."
                raise ValueError(msg)
        return [BenchmarkRunner(BenchmarkJobGenerator(accelerators))]
