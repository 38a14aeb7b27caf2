# SPDX-License-Identifier: Apache-2.0
"""Every fit of the plan, and one row of ``results.csv`` for each; a finished row is never run again."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning import seed_everything
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_flowood.features import LOCAL_DIR, save_local
from anomalib_flowood.metrics import auroc, fpr_at_tpr
from benchmarks.fits import clock_time, quiet, quiet_engine, trained_epochs
from benchmarks.peak import Peak, anonymous
from benchmarks.results import KEY, append_rows, check_columns, failed, finished, read_rows

from .callbacks import SPEED_BATCH, Recorder, UntilLevel
from .memo import Memo
from .pixels import pixel_metrics, save_maps
from .plan import Job, plan
from .reading import Reader, reader, reading_once
from .tasks import Options

TRAINING_SECONDS = {"industrial": 1200.0, "unified": 1200.0, "one_class": 300.0, "cross": 300.0}
"""Cap on the training of a detector that trains until its held-out loss levels off, without another in the options."""

COLUMNS = (
    *KEY,
    *("backbone", "image_size"),
    *("auroc", "fpr95", "pixel_auroc", "aupro", "aupimo"),
    *("fit_s", "wall_s", "hits", "backbone_s", "read_s", "epochs", "stopped_by"),
    *("images_per_s", "peak_gib", "train_images", "held_out_images", "test_images", "finished", "error"),
)


def run_job(job: Job, backbone: str, memo: Memo, options: Options) -> list[dict[str, Any]]:
    """Fit, test and measure.

    Args:
        job: The fit.
        backbone: ``local-dir:FOLDER``.
        memo: Outputs of the backbone.
        options: What the command line asks for.

    Returns:
        The rows, one for each of the job's keys.
    """
    task, detector = job.task, job.detector
    seed_everything(job.seed, verbose=False)
    model = detector.build(backbone, task.image_size, task.kind)
    memo.attach(model)
    datamodule = task.data(draw=job.seed) if task.drawn else task.data()
    datamodule.prepare_data()
    datamodule.setup()
    cap = TRAINING_SECONDS[task.kind] if options.cap is None else options.cap
    rule = UntilLevel(detector.held_out_loss, cap) if detector.held_out_loss else None
    rows = []
    with TemporaryDirectory(prefix="flowood-contest-") as name:
        folder = Path(name)
        recorder = Recorder(task.image_size, folder if task.has_maps else None)
        # The rule sees the held-out images instead, once and not twice.
        unseen: dict[str, Any] = {"limit_val_batches": 0} if rule else {}
        engine = quiet_engine(folder, [recorder, *([rule] if rule else [])], **unseen)
        tests = [test for test in task.tests if test.part in options.parts]
        common: dict[str, Any] = {}
        scores: list[pd.DataFrame] = []
        for test in tests:
            if test.loader is None:
                result = _image_metrics(pd.concat(scores))
            else:
                if common:
                    engine.test(model, dataloaders=test.loader(datamodule), verbose=False)
                else:
                    common = _fit_and_test(
                        engine, model, datamodule, test.loader, recorder, memo, extras=options.extras
                    )
                    common["stopped_by"] = (rule.stopped_by if rule else "") or "default epochs"
                result = _metrics(recorder, aupimo=options.extras)
                scores.append(recorder.scores)
            if options.extras and test.part == "industrial" and job.seed == 0:
                save_maps(options.output / "maps" / test.name / f"{detector.name}.npz", recorder)
            key = (test.part, test.name, detector.name, job.seed)
            stand = {"backbone": backbone_name(options.backbone), "image_size": task.image_size}
            now = time.strftime("%Y-%m-%dT%H:%M:%S")
            rows.append({**dict(zip(KEY, key, strict=True)), **stand, **common, **result, "finished": now})
    return rows


def backbone_name(backbone: str) -> str:
    """A backbone's name in rows: timm's, or that of its folder."""
    return backbone.removeprefix(LOCAL_DIR).rstrip("/").rpartition("/")[2]


def _fit_and_test(
    engine: Engine,
    model: AnomalibModule,
    datamodule: AnomalibDataModule,
    loader: Callable[[AnomalibDataModule], DataLoader],
    recorder: Recorder,
    memo: Memo,
    *,
    extras: bool,
) -> dict[str, Any]:
    """Fit and test once; what it took."""
    speed = None
    # Without extras nobody looks: what is freed then stays at hand, and not with the system.
    with Peak(anonymous) if extras else nullcontext() as peak:
        account, images = memo.account(), reader() or Reader()
        read_before = images.saved
        start = time.perf_counter()
        engine.fit(model, datamodule=datamodule)
        wall = time.perf_counter() - start
        hits, saved = account.hits, account.saved + images.saved - read_before
        backbone = sum(account.seconds_per_image.values())
        engine.test(model, dataloaders=loader(datamodule), verbose=False)
        if extras:  # with the memo off, so that every detector's peak has a backbone at work in it
            speed = images_per_s(model, torch.cat(recorder.images)[:SPEED_BATCH], memo)
    return {
        "fit_s": round(wall + saved, 3),
        "wall_s": round(wall, 3),
        "hits": hits,
        "backbone_s": round(backbone, 6) or "",
        "read_s": round(images.seconds_per_image, 6) or "",
        "epochs": trained_epochs(engine.trainer),
        "peak_gib": "" if peak is None or peak.above_rest is None else round(peak.above_rest / 2**30, 3),
        "train_images": len(datamodule.train_data),
        "held_out_images": len(datamodule.val_data),
        "images_per_s": "" if speed is None else round(speed, 2),
    }


def _metrics(recorder: Recorder, *, aupimo: bool) -> dict[str, Any]:
    """Metrics of a test's scores, and of its maps where they were kept."""
    maps, masks = recorder.maps, recorder.masks
    pixels = {} if maps is None or masks is None else pixel_metrics(maps, masks, aupimo=aupimo)
    return _image_metrics(recorder.scores) | pixels


def _image_metrics(scores: pd.DataFrame) -> dict[str, Any]:
    values, labels = torch.tensor(scores["score"].to_numpy()), torch.tensor(scores["label"].to_numpy())
    return {"auroc": auroc(values, labels), "fpr95": fpr_at_tpr(values, labels), "test_images": len(scores)}


def images_per_s(model: AnomalibModule, images: Tensor, memo: Memo, rounds: int = 3) -> float:
    """Images per second through pre-processor, backbone and detector; the median of some rounds after a first."""
    model.eval()
    seconds = []
    with memo.off(), torch.inference_mode():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            model(images)
            seconds.append(time.perf_counter() - start)
    return len(images) / median(seconds[1:])


@dataclass
class _Clock:
    """What is left, from what the fits so far took: for each detector its own, for a new one the mean of all."""

    start: float = field(default_factory=time.perf_counter)
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def took(self, job: Job, seconds: float) -> None:
        self.seconds.setdefault((job.task.kind, job.detector.name), []).append(seconds)

    def remaining(self, jobs: Sequence[Job]) -> float:
        everything = [value for values in self.seconds.values() for value in values]
        mean = sum(everything) / max(1, len(everything))
        known = {key: sum(values) / len(values) for key, values in self.seconds.items()}
        return sum(known.get((job.task.kind, job.detector.name), mean) for job in jobs)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start


def run(options: Options, console: Console | None = None) -> pd.DataFrame:
    """Run what is not finished.

    Args:
        options: What the command line asks for.
        console: Where to say how far it is.

    Returns:
        All rows, of earlier runs too.

    Raises:
        ValueError: If the options name something unknown, or there are rows of a version that measured other things.
    """
    console = console or Console(soft_wrap=True)
    check_columns(options.output, COLUMNS)
    done = set() if options.again else finished(options.output)
    every = plan(options)
    jobs = [job for job in every if set(job.keys(options.parts)) - done]
    console.print(f"{len(jobs)} fits to run, {len(every) - len(jobs)} finished before; rows in {options.output}")
    clock = _Clock()
    with Memo(kept=options.features) as memo, reading_once(), quiet():
        backbone = options.backbone
        if jobs and not backbone.startswith(LOCAL_DIR):
            backbone = f"{LOCAL_DIR}{save_local(backbone, options.output.resolve() / 'backbone')}"
        for number, job in enumerate(jobs, start=1):
            wanted = [key for key in job.keys(options.parts) if key not in done]
            start = time.perf_counter()
            try:
                rows = run_job(job, backbone, memo, options)
                rows = [row for row in rows if tuple(row[name] for name in KEY) in wanted]
                said = ", ".join(f"AUROC {row['auroc']:.3f}" for row in rows)
                said += f", fit {rows[0]['fit_s']:,.1f} s"
            except Exception as error:  # one broken fit must not cost the others
                rows = failed(options.output, wanted, error)
                said = f"[red]failed[/red] {rows[0]['error']}"
            append_rows(options.output, rows, COLUMNS)
            clock.took(job, time.perf_counter() - start)
            console.print(
                f"[bold]{number}/{len(jobs)}[/bold] {job.task.part} {job.task.name}, {job.detector.name}, "
                f"seed {job.seed}: {said} [dim]({clock_time(clock.elapsed)} elapsed, about "
                f"{clock_time(clock.remaining(jobs[number:]))} left)[/dim]",
                highlight=False,
            )
            gc.collect()
    return read_rows(options.output)
