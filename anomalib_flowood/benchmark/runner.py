# SPDX-License-Identifier: Apache-2.0
"""A configuration file's benchmark, run: all jobs checked, then one after the other, each recorded at once."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from anomalib.pipelines.benchmark import Benchmark as AnomalibBenchmark
from anomalib.pipelines.components.runners import SerialRunner
from anomalib.pipelines.components.runners.serial import SerialExecutionError
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt
from rich.console import Console

from anomalib_flowood.configuration import read_configuration
from anomalib_flowood.engine import new_folder
from anomalib_flowood.files import NAMES, held, write_text
from anomalib_flowood.metrics import rate_text
from anomalib_flowood.names import check_known
from anomalib_flowood.parsing import FlowoodParser
from anomalib_flowood.report.progress import JobProgress
from anomalib_flowood.report.run import write_record
from anomalib_flowood.started import was_started

from .building import config_key, readable
from .checking import Counts, Problems, count_images
from .jobs import BenchmarkJob, BenchmarkJobGenerator
from .results import CONFIGURATION, Results

logger = logging.getLogger(__name__)

_ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")


class BenchmarkError(SerialExecutionError):
    """Some jobs of a benchmark failed; the others' results are written all the same."""


class Benchmark(AnomalibBenchmark):
    """Compare detectors on data sets: fit, test, metrics of the raw scores, one table."""

    def run(self, args: Namespace | None = None) -> None:
        """Run the benchmark that a configuration file describes.

        Args:
            args: ``config`` is the file's path, or ``resume`` the folder of an earlier run that is to go on; without
                arguments the command line is parsed.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the configuration is wrong; nothing has been trained then.
            BenchmarkError: If jobs failed; the results of all others have been written.
        """
        args = self.get_parser().parse_args() if args is None else args
        config = self._get_args(args)
        for runner in self._setup_runners(config):
            runner.resumed, runner.images = args.get("resume"), args.get("images", 0)
            runner.run(config["benchmark"])

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """Describe the arguments, of which one has to be given."""
        parser = FlowoodParser() if parser is None else parser
        parser.add_argument("--config", type=Path | None, default=None, help="Configuration file.")
        parser.add_argument(
            "--resume",
            type=Path | None,
            default=None,
            help="Folder of an interrupted benchmark, which goes on there: jobs that are finished are not run again.",
        )
        parser.add_argument(
            "--images",
            type=NonNegativeInt,
            default=0,
            help="List so many test images of either side for each job: those on which it is most wrong.",
        )
        return parser

    def _get_args(self, args: Namespace | None) -> dict:
        args = Namespace() if args is None else args
        resumed = args.get("resume")
        if (args.get("config") is None) == (resumed is None):
            msg = "Give either --config FILE, for a new benchmark, or --resume FOLDER, for one that is to go on."
            raise ValueError(msg)
        path = Path(str(args.config)) if resumed is None else Path(resumed) / CONFIGURATION
        if not path.is_file():
            msg = f"There is no configuration file {path}."
            if resumed is not None:
                msg += " --resume takes the folder, runs/benchmark/…, that `flowood benchmark` has made."
            raise FileNotFoundError(msg)
        config = read_configuration(path)
        check_known(f"key in {path}", config if isinstance(config, dict) else {}, ("accelerator", "benchmark"))
        if not isinstance(config, dict) or not isinstance(config.get("benchmark"), dict):
            msg = f"{path} has no benchmark section."
            raise ValueError(msg)
        return config

    @staticmethod
    def _setup_runners(args: dict) -> list[BenchmarkRunner]:  # type: ignore[override]  # list is invariant
        """One runner for all accelerators, so that everything is checked before anything is trained."""
        given = args.get("accelerator", "auto")
        accelerators = [str(name) for name in (given if isinstance(given, list) else [given])]
        present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        present["gpu"] = present["cuda"] or present["mps"]
        check_known("accelerator", accelerators, _ACCELERATORS)
        for name in accelerators:
            if not present.get(name, True):
                msg = f"This machine has no {name} accelerator that torch can use; accelerator: cpu always works."
                raise ValueError(msg)
        return [BenchmarkRunner(BenchmarkJobGenerator(accelerators))]


class BenchmarkRunner(SerialRunner):
    """Runs the jobs one after the other, and says all along which one and how far.

    Of several processes, which Lightning starts (``strategy: ddp``), each runs them; that of rank 0 writes and speaks.
    """

    resumed: Path | None = None
    """Folder of an earlier run that is to go on."""
    images = 0
    """How many inside and outside images to list of each job."""

    def run(self, args: dict, prev_stage_results: Any = None) -> pd.DataFrame:
        """Check all jobs, then run them.

        Args:
            args: The ``benchmark`` section of the configuration.
            prev_stage_results: Unused; there is one stage.

        Returns:
            One row per job.

        Raises:
            ValueError: If any entry is wrong; nothing has been trained then.
            BlockingIOError: If another process writes to the folder that is to go on.
            BenchmarkError: If jobs failed; the results of all others have been written.
        """
        console = Console(quiet=was_started(), emoji=False)  # a data set may be called a:b:c
        console.width = min(console.width, 100) if console.is_terminal else 100
        with JobProgress(console) as progress:
            with _logs_to(None):
                jobs = [job for job in self.generator(args, prev_stage_results) if isinstance(job, BenchmarkJob)]
                _check_jobs(jobs, progress)
            with self._record(args, jobs) as record:
                try:
                    failed = _run_jobs(jobs, record, progress)
                finally:  # an interrupted benchmark still shows what it has
                    progress.stage("writing")
                    progress.__exit__()
                    record.finish(console, self.images)
        if failed and record.writes:  # by whose status Lightning would kill the one that still writes
            listed = "\n".join(f"  {line}" for line in failed)
            msg = f"{len(failed)} of {len(jobs)} jobs failed:\n{listed}\nFull tracebacks: {record.log}"
            raise BenchmarkError(msg)
        return record.table

    @contextlib.contextmanager
    def _record(self, args: dict, jobs: list[BenchmarkJob]) -> Iterator[Results]:
        """Take in what has finished in the folder of an earlier run, or make a new folder; nobody else writes to it."""
        writes = not was_started()
        if self.resumed is None and not writes:
            yield Results(Path(), writes=False)
            return
        folder = self.resumed or new_folder(Path("runs") / BenchmarkJob.name)
        with held(folder) if writes else contextlib.nullcontext():
            record = Results(folder, writes=writes)
            if self.resumed is None:
                _describe(folder, args, jobs)
            else:
                record.restore()
            yield record


def _describe(folder: Path, args: dict, jobs: list[BenchmarkJob]) -> None:
    """Write down what is to run, and on what."""
    accelerators = list(dict.fromkeys(job.accelerator for job in jobs))
    write_record(
        folder,
        BenchmarkJob.name,
        detectors={job.detector: job.config["model"] for job in jobs},
        data={job.data: job.config["data"] for job in jobs},
        settings={
            "seeds": list(dict.fromkeys(job.seed for job in jobs)),
            "accelerators": accelerators,
            "trainer": args.get("trainer") or {},
        },
    )
    # By way of JSON, as in run.json: a path is a text.
    config = json.loads(json.dumps({"accelerator": accelerators, "benchmark": args}, default=str))
    write_text(folder / CONFIGURATION, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _check_jobs(jobs: list[BenchmarkJob], progress: JobProgress) -> None:
    """Build every distinct detector and data module once: what is wrong with the last shows before the first training.

    Raises:
        ValueError: If anything is wrong, with all that is.
    """
    problems = Problems()
    counted: dict[str, Counts | None] = {}
    checked = set()
    for number, job in enumerate(jobs, start=1):
        data = config_key(job.config["data"])
        key = config_key([job.config["model"], data])
        if key in checked:
            continue
        checked.add(key)
        progress.stage(f"checking {job.detector} on {job.data}")
        where = f"Job {number} of {len(jobs)} ({job.title})"
        if data not in counted:
            counted[data] = problems.catch(where, partial(count_images, job.config["data"]))
        # Where the data are missing, the detector is checked for what can be wrong without them.
        counts = counted[data] or Counts(sys.maxsize, None)
        problems.catch(where, partial(job.check, counts))
    gc.collect()
    problems.refuse()


def _run_jobs(jobs: list[BenchmarkJob], record: Results, progress: JobProgress) -> list[str]:
    """Run the jobs that have not finished; return what failed."""
    failed = []
    with _logs_to(record.log if record.writes else None):
        for number, job in enumerate(jobs, start=1):
            if record.has(job.row()):
                continue
            progress.start_job(number, len(jobs), job.title)
            job.progress = progress
            error = _run_job(job, record, progress)
            if error:
                failed.append(f"{job.title}: {error}")
    return failed


def _run_job(job: BenchmarkJob, record: Results, progress: JobProgress) -> str:
    """Run one job and record it; return the first line of its error, or nothing."""
    message = ""
    try:
        result = job.run()
    except Exception as error:  # one broken job must not cost the others
        logger.exception("%s failed", job.title)
        message = f"{type(error).__name__}: {readable(error).splitlines()[0]}"
        result = {**job.row(), "error": message, **job.flat_cfg}
        job.scores, job.maps = pd.DataFrame(), {}  # of a diverged training they are NaN
        progress.say(f"  failed: {message}")
    else:
        progress.say(
            f"  AUROC {rate_text(result['AUROC'])}, FPR95 {rate_text(result['FPR95'])}, "
            f"fit {result['fit_duration']:.1f} s, {result['images_per_s']:,.1f} images/s",
        )
    record.add(result, job.scores, job.maps)
    job.scores, job.maps = pd.DataFrame(), {}
    gc.collect()  # trainer and model refer to each other; without this two detectors are in memory
    return message


@contextlib.contextmanager
def _logs_to(path: Path | None) -> Iterator[None]:
    """Send all log lines and warnings to a file, or nowhere, for a while; then restore logging as it was."""
    handler: logging.Handler = logging.NullHandler()
    if path is not None:
        handler = logging.FileHandler(path, encoding="utf-8", errors=NAMES)
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
