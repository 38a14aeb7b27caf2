# SPDX-License-Identifier: Apache-2.0
"""What is trained on what and how long, one row of ``results.csv`` for each; a finished row is never run again."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import platform
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from lightning import seed_everything
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from anomalib_flowood import CrossDataset, EmbeddingFlow, OneClass, PixelFlow, flows
from anomalib_flowood.benchmark import ScoreRecorder
from anomalib_flowood.explain import coadaptation
from anomalib_flowood.metrics import auroc, fpr_at_tpr
from benchmarks.results import (
    KEY,
    TimeLimit,
    append_rows,
    check_columns,
    clock_time,
    finished,
    quiet,
    read_rows,
    trained_epochs,
)

PARTS = ("mask_time", "mask_epochs", "logit", "bottleneck", "multi_scale", "samples", "embedding", "one_class")
INSIDE, OUTSIDE = "fashion_mnist", "mnist"
PAIR = f"{INSIDE} -> {OUTSIDE}"
BOTTLENECK_DIMS = (2, 5, 10, 20, 50, 100)

PAPERS_ALPHA = 0.05
"""Alpha of the logit in Dinh et al. (2017), and so in the paper."""
FLATTER_ALPHA = flows.LOGIT_ALPHA
"""The package's own."""

CHECKERBOARD, CHANNEL, GLOW = "checkerboard", "channel (RealNVP)", "Glow"
HORIZONTAL, CYCLE, CYCLE_BOTTLENECK = "horizontal", "cycle", "cycle + bottleneck"
EMBEDDING = "EmbeddingFlow"
LOGIT_FLOWS = (CHECKERBOARD, CYCLE, CYCLE_BOTTLENECK)
"""Flows that are trained with both logits."""
MULTI_SCALE = (CHANNEL, GLOW)
"""Flows that are trained with bottlenecks for networks, too, and whose samples are shown."""
MULTI_SCALE_K = 50
"""Numbers that pass these bottlenecks."""

COADAPTATION_IMAGES = 256
_CHUNK = 200
"""Images that bits per dimension are measured on at a time."""
SAMPLES = 16
TEMPERATURES = (1.0, 0.8, 0.6)
"""Standard deviations of the latents of samples."""

COLUMNS = (
    *KEY,
    *("auroc", "fpr95", "bits_per_dim", "bits_per_dim_median", "bits_per_dim_centres"),
    *("bits_per_dim_outside", "bits_per_dim_outside_median", "bits_per_dim_outside_centres"),
    *("coadaptation", "prediction"),
    *("fit_s", "wall_s", "epochs", "images_seen", "train_images", "test_images", "parameters"),
    *("machine", "finished", "error"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Profiles
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How long and on how much the fits of a part are trained.

    Attributes:
        seeds: The seeds of weights, noise and order; images are the same for all.
        seconds: Training time of a flow on pixels; ``None`` for a number of epochs.
        epochs: Epochs of a flow on pixels, where there is no training time; ``None`` for the flow's own.
        train_limit: Training images at most, a tenth of which is held out; ``None`` for all.
        test_limit: Test images at most: of each data set, or of each class in one-class tasks.
        batch_size: Training images in a batch of a flow on pixels.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float | None = None
    epochs: int | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    batch_size: int = 32


@dataclass(frozen=True)
class Profile:
    """The size of the whole study.

    Attributes:
        name: Its name on the command line.
        accelerator: Lightning's.
        workers: Processes that fit at the same time; on the CPU each has one thread, so that a second of training is
            a second of one core.
        flows: Arguments of ``PixelFlow`` by the names of the mask study.
        bottleneck: Arguments of ``PixelFlow`` in the bottleneck study, without K.
        sampled: Arguments of the flows that are trained for the picture of samples, by their names in the mask study.
        embedding: Arguments of ``EmbeddingFlow``.
        budgets: A budget for each part.
        bottleneck_dims: K of the bottleneck study.
        classes: The normal classes of the one-class tasks.
    """

    name: str
    accelerator: str
    workers: int
    flows: Mapping[str, dict[str, Any]]
    bottleneck: dict[str, Any]
    sampled: Mapping[str, dict[str, Any]]
    embedding: dict[str, Any]
    budgets: Mapping[str, Budget]
    bottleneck_dims: tuple[int, ...] = BOTTLENECK_DIMS
    classes: tuple[int, ...] = tuple(range(10))


def _flows(common: dict[str, Any], single: dict[str, Any], **own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of the six flows: what all share, what those of one scale with a resnet share, what each has."""
    common = {"image_size": (28, 28), "channels": 1, "logit_alpha": PAPERS_ALPHA, **common}
    resnet = {**common, "subnet": "resnet", "coupling_layers": 8, **single}
    return {
        CHECKERBOARD: {**resnet, "mask": "checkerboard"},
        CHANNEL: {**common, "architecture": "realnvp", **own["realnvp"]},
        GLOW: {**common, "architecture": "glow", **own["glow"]},
        HORIZONTAL: {**resnet, "mask": "horizontal"},
        CYCLE: {**resnet, "mask": "cycle", **own["cycle"]},
        CYCLE_BOTTLENECK: {**common, "mask": "cycle", "subnet": "bottleneck", **own["bottleneck"]},
    }


_LAPTOP_FLOWS = _flows(
    {"learning_rate": 2e-3},
    {"hidden_channels": 8, "num_blocks": 2},
    realnvp={"hidden_channels": 8, "num_blocks": 2},
    glow={"coupling_layers": 4, "hidden_channels": 32, "num_blocks": 2},
    cycle={},
    bottleneck={"bottleneck_dim": 5, "coupling_layers": 16},
)
# Down to a coarsest scale of 2 x 2, networks that see a few pixels learn outlines within minutes; from 28 x 28, which
# halves to 7 x 7 at most, they do not.
_SMALL = {"image_size": (16, 16), "logit_alpha": FLATTER_ALPHA}
LAPTOP = Profile(
    name="laptop",
    accelerator="cpu",
    workers=2,
    flows=_LAPTOP_FLOWS,
    # Steps on large batches cost a fully connected network little more than on small ones.
    bottleneck={
        **_LAPTOP_FLOWS[CYCLE_BOTTLENECK],
        "coupling_layers": 24,
        "hidden_channels": 128,
        "learning_rate": 4e-3,
        "logit_alpha": FLATTER_ALPHA,
    },
    sampled={
        CHANNEL: {**_LAPTOP_FLOWS[CHANNEL], **_SMALL, "scales": 4},
        GLOW: {**_LAPTOP_FLOWS[GLOW], **_SMALL, "scales": 3},
    },
    embedding={"image_size": (128, 128)},
    budgets={
        "mask_time": Budget(seconds=75, test_limit=1000),
        "mask_epochs": Budget((0,), epochs=2, train_limit=4000, test_limit=1000),
        "logit": Budget((0,), seconds=75, test_limit=1000),
        "bottleneck": Budget((0,), seconds=300, test_limit=1000, batch_size=256),
        "multi_scale": Budget((0,), seconds=75, test_limit=1000),
        "samples": Budget((0,), seconds=150, test_limit=1000),
        "embedding": Budget(train_limit=4000, test_limit=1000),
        "one_class": Budget((0,), seconds=15, train_limit=2000, test_limit=100),
    },
)

# Kirichenko et al. (2020), appendix: batches of 32, learning rate 5e-5, 81 epochs for RealNVP, 151 for Glow.
_FULL_FLOWS = _flows(
    {"learning_rate": 5e-5, "max_epochs": 81},
    {"hidden_channels": 64, "num_blocks": 6, "batch_norm": True},
    realnvp={"hidden_channels": 64, "num_blocks": 6, "batch_norm": True},
    glow={"scales": 2, "coupling_layers": 16, "hidden_channels": 200, "num_blocks": 3, "max_epochs": 151},
    cycle={"native": False},
    bottleneck={"bottleneck_dim": 5},
)
FULL = Profile(
    name="full",
    accelerator="gpu",
    workers=1,
    flows=_FULL_FLOWS,
    bottleneck=_FULL_FLOWS[CYCLE_BOTTLENECK],
    sampled={},  # those of mask_epochs are trained long enough
    embedding={"image_size": (128, 128)},
    budgets={
        "mask_time": Budget(seconds=3600),
        "mask_epochs": Budget(),
        "logit": Budget((0,), seconds=3600),
        "bottleneck": Budget(),
        "multi_scale": Budget((0,), seconds=3600),
        "embedding": Budget(),
        "one_class": Budget((0,)),
    },
)

PROFILES = {profile.name: profile for profile in (LAPTOP, FULL)}


def trial(profile: Profile, limit: int) -> Profile:
    """Return a profile that does everything once, on few images and for a moment, to see that it runs."""
    budgets = {
        part: replace(
            budget,
            seeds=budget.seeds[:1],
            seconds=None if budget.seconds is None else 1.0,
            epochs=None if budget.seconds else 1,
            train_limit=limit,
            test_limit=max(1, limit // 20),
        )
        for part, budget in profile.budgets.items()
    }
    embedding = {**profile.embedding, "subspace_dim": min(128, limit // 3)}
    return replace(profile, embedding=embedding, budgets=budgets, classes=profile.classes[:2])


# ---------------------------------------------------------------------------------------------------------------------
# Fits
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """One training and test, plain data so that it can be sent to another process.

    Attributes:
        part: One of :data:`PARTS`.
        task: :data:`PAIR` or a class of its inside data set.
        detector: Its name in rows.
        seed: The seed.
        arguments: Those of ``EmbeddingFlow`` if that is its name, else of ``PixelFlow``.
        budget: Its part's.
        accelerator: Lightning's.
        normal_class: The class of a one-class task.
    """

    part: str
    task: str
    detector: str
    seed: int
    arguments: dict[str, Any] = field(hash=False)
    budget: Budget
    accelerator: str
    normal_class: int | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells its row from others."""
        return self.part, self.task, self.detector, self.seed

    def build(self) -> PixelFlow | EmbeddingFlow:
        """Build the detector, with nothing around it that alters raw scores."""
        around: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
        kind = EmbeddingFlow if self.detector == EMBEDDING else PixelFlow
        return kind(**self.arguments, **around)

    def data(self, root: str) -> AnomalibDataModule:
        """Make the data module, its images the same for every seed."""
        common: dict[str, Any] = {
            "root": root,
            "train_limit": self.budget.train_limit,
            "test_limit": self.budget.test_limit,
            # The embeddings' flow is not part of the comparison of masks: it keeps its own batches.
            **({} if self.detector == EMBEDDING else {"train_batch_size": self.budget.batch_size}),
        }
        if self.normal_class is None:
            return CrossDataset(INSIDE, [OUTSIDE], **common)
        return OneClass(INSIDE, self.normal_class, **common)


def with_bottleneck(flow: str) -> str:
    """Return a flow's name in the part ``multi_scale``."""
    return f"{flow}, K = {MULTI_SCALE_K}"


def with_flatter_logit(flow: str) -> str:
    """Return a flow's name in the part ``logit``."""
    return f"{flow}, α = {FLATTER_ALPHA}"


def plan(profile: Profile, parts: Sequence[str] = PARTS) -> list[Fit]:
    """Return all fits, the first seed of everything first.

    Args:
        profile: How much of everything.
        parts: Which parts.
    """
    cycle = profile.flows[CYCLE_BOTTLENECK]
    by_part: dict[str, Mapping[str, dict[str, Any]]] = {
        "mask_time": profile.flows,
        "mask_epochs": profile.flows,
        "logit": {
            with_flatter_logit(name): {**arguments, "logit_alpha": FLATTER_ALPHA}
            for name, arguments in profile.flows.items()
            if name in LOGIT_FLOWS
        },
        "bottleneck": {f"K = {k}": {**profile.bottleneck, "bottleneck_dim": k} for k in profile.bottleneck_dims},
        "multi_scale": {
            with_bottleneck(name): _with_bottlenecks(arguments)
            for name, arguments in profile.flows.items()
            if name in MULTI_SCALE
        },
        "samples": profile.sampled,
        "embedding": {EMBEDDING: profile.embedding},
        "one_class": {
            CHECKERBOARD: profile.flows[CHECKERBOARD],
            CYCLE_BOTTLENECK: cycle,
            EMBEDDING: profile.embedding,
        },
    }
    tasks: dict[str, int | None] = {PAIR: None}
    classes: dict[str, int | None] = {f"{INSIDE} class {number}": number for number in profile.classes}
    fits = [
        Fit(part, task, name, seed, arguments, budget, profile.accelerator, normal_class)
        for part, budget in profile.budgets.items()
        if part in parts
        for task, normal_class in (classes if part == "one_class" else tasks).items()
        for name, arguments in by_part[part].items()
        for seed in budget.seeds
    ]
    return sorted(fits, key=lambda fit: fit.budget.seeds.index(fit.seed))


def _with_bottlenecks(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with convolutional bottlenecks in the place of the networks, of the same width."""
    rest = {name: value for name, value in arguments.items() if name not in {"num_blocks", "batch_norm"}}
    return {**rest, "subnet": "conv_bottleneck", "bottleneck_dim": MULTI_SCALE_K}


def run_fit(fit: Fit, root: str, output: Path) -> dict[str, Any]:
    """Train, test and measure.

    Args:
        fit: What to do.
        root: Folder of the data sets that are given by name.
        output: Folder of the results; samples go to its folder ``samples``.

    Returns:
        The row.
    """
    start = time.perf_counter()
    with quiet(), TemporaryDirectory(prefix="flowood-paper-") as folder:
        seed_everything(fit.seed, verbose=False)
        detector, datamodule = fit.build(), fit.data(root)
        datamodule.prepare_data()
        datamodule.setup()
        pixels = isinstance(detector, PixelFlow)
        limit, recorder = TimeLimit(fit.budget.seconds if pixels else None), ScoreRecorder()
        # -1: none. Without any limit here a detector takes its own number of epochs.
        epochs = {"max_epochs": -1 if fit.budget.seconds else fit.budget.epochs} if pixels else {}
        engine = Engine(
            accelerator=fit.accelerator,
            devices=1,
            default_root_dir=folder,
            callbacks=[limit, recorder],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,  # no threshold and no choice of an epoch hang on it
            **epochs,
        )
        engine.fit(detector, datamodule=datamodule)
        engine.test(detector, datamodule=datamodule, verbose=False)
        epochs_trained = trained_epochs(engine.trainer)
        row = {
            **dict(zip(KEY, fit.key, strict=True)),
            **_metrics(detector, recorder.scores),
            "fit_s": round(limit.time_elapsed("train"), 2),
            "epochs": epochs_trained,
            "images_seen": round(epochs_trained * len(datamodule.train_data)),
            "train_images": len(datamodule.train_data),
            "test_images": len(recorder.scores),
            "parameters": sum(parameter.numel() for parameter in detector.model.flow.parameters()),
            "machine": machine(fit.accelerator),
        }
        if isinstance(detector, PixelFlow):
            if fit.normal_class is None:
                row |= _bits(detector.to(engine.trainer.strategy.root_device).eval(), datamodule)
            row |= _coadaptation(detector.cpu().eval(), datamodule)
            if fit.normal_class is None:
                _save_samples(detector, datamodule, sample_path(output, fit.key))
    row["wall_s"] = round(time.perf_counter() - start, 2)
    row["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S")
    return row


def _metrics(detector: PixelFlow | EmbeddingFlow, scores: pd.DataFrame) -> dict[str, float]:
    """AUROC and FPR95 of raw scores; of a flow on pixels also the mean bits per dimension at bin centres."""
    values, labels = torch.tensor(scores["score"].to_numpy()), torch.tensor(scores["label"].to_numpy())
    metrics = {"auroc": auroc(values, labels), "fpr95": fpr_at_tpr(values, labels)}
    if isinstance(detector, PixelFlow):
        model = detector.model
        bits = flows.bits_per_dim(-values * model.dims, model.dims, model.levels)
        for name, label in (("bits_per_dim_centres", 0), ("bits_per_dim_outside_centres", 1)):
            metrics[name] = float(bits[labels == label].mean())
    return metrics


@torch.no_grad()
def _bits(detector: PixelFlow, datamodule: Any) -> dict[str, float]:
    """Mean and median bits per dimension of all test images, inside and outside."""
    found: dict[str, float] = {}
    for name, label in (("bits_per_dim", 0), ("bits_per_dim_outside", 1)):
        images = _test_images(detector, datamodule, label)
        bits = [detector.model.bits_per_dim(chunk.to(detector.device)).double().cpu() for chunk in images.split(_CHUNK)]
        found |= {name: float(torch.cat(bits).mean()), f"{name}_median": float(np.median(torch.cat(bits)))}
    return found


def _test_images(detector: PixelFlow, datamodule: Any, label: int, count: int | None = None) -> torch.Tensor:
    """Test images with a label as the flow sees them, all or the first ones, ``(N, C, H, W)``, on the CPU."""
    data: Any = datamodule.test_data
    pre_processor: Any = detector.pre_processor
    rows = np.flatnonzero(data.samples["label_index"] == label)[:count]
    chunks = [rows[start : start + _CHUNK].tolist() for start in range(0, len(rows), _CHUNK)]
    return torch.cat([pre_processor.transform(data.__getitems__(chunk).image) for chunk in chunks])


def _coadaptation(detector: PixelFlow, datamodule: Any) -> dict[str, float]:
    """Co-adaptation and prediction on inside test images, the mean over the layers from the second to the last."""
    inside = detector.model.pixels(_test_images(detector, datamodule, 0, COADAPTATION_IMAGES))
    numbers = coadaptation(detector.model, inside)
    return {name: float(np.mean(layers[1:])) for name, layers in numbers._asdict().items()}


def sample_path(output: Path, key: tuple[str, str, str, int]) -> Path:
    """File of the samples of a fit: 8-bit images ``(N, H, W)``, by temperature, and ``real`` ones."""
    part, _, detector, seed = key
    return output / "samples" / f"{part}-{re.sub(r'[^a-z0-9]+', '-', detector.lower()).strip('-')}-{seed}.npz"


def _save_samples(detector: PixelFlow, datamodule: Any, path: Path) -> None:
    """Draw images, the same latents at every temperature."""
    images = {"real": detector.model.pixels(_test_images(detector, datamodule, 0, SAMPLES))}
    for temperature in TEMPERATURES:
        images[f"{temperature:g}"] = detector.model.sample(SAMPLES, temperature, torch.Generator().manual_seed(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    grey: dict[str, Any] = {
        name: (some.nan_to_num(0.0)[:, 0] * 255).round().byte().numpy() for name, some in images.items()
    }
    np.savez_compressed(path, **grey)


def machine(accelerator: str) -> str:
    """Name of the processor that does the work."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


# ---------------------------------------------------------------------------------------------------------------------
# All fits
# ---------------------------------------------------------------------------------------------------------------------


def processes(profile: Profile) -> Executor:
    """Return the pool that fits are sent to."""
    # Not forked: a fork of a process whose PyTorch has threads may hang.
    threads = 1 if profile.accelerator == "cpu" else max(1, torch.get_num_threads())
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(profile.workers, context, initializer=_start_worker, initargs=(threads,))


def _start_worker(threads: int) -> None:
    """Set up a process of the pool, which ends when the one that sends it fits is killed."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _expected(fits: Iterable[Fit], rows: pd.DataFrame) -> float:
    """Seconds of one worker that fits will take, from those like them; a guess where there are none yet."""
    known = rows.groupby(["part", "detector"])["wall_s"].mean().to_dict() if len(rows) else {}
    mean = sum(known.values()) / len(known) if known else 60.0
    return sum(known.get((fit.part, fit.detector), mean + (fit.budget.seconds or 0) * (not known)) for fit in fits)


def run(
    profile: Profile,
    output: Path,
    root: str = "./datasets",
    parts: Sequence[str] = PARTS,
    console: Console | None = None,
    pool: Callable[[Profile], Executor] = processes,
) -> pd.DataFrame:
    """Run what is not finished.

    Args:
        profile: How much of everything.
        output: Folder of the rows and samples.
        root: Folder of the data sets that are given by name.
        parts: Which parts.
        console: Where to say how far it is.
        pool: Makes the pool that fits are sent to.

    Returns:
        All rows, of earlier runs too.

    Raises:
        ValueError: If the folder has rows of a version that measured other things.
    """
    console = console or Console(soft_wrap=True)
    check_columns(output, COLUMNS)
    every, done = plan(profile, parts), finished(output)
    left = {fit.key: fit for fit in every if fit.key not in done}
    console.print(f"{len(left)} fits to run, {len(every) - len(left)} finished before; rows in {output}")
    if not left:
        return read_rows(output)
    start, total = time.perf_counter(), len(left)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    executor = pool(profile)
    try:
        with bar:
            task = bar.add_task("fits", total=total)
            futures = {executor.submit(run_fit, fit, root, output): fit for fit in left.values()}
            for number, future in enumerate(as_completed(futures), start=1):
                fit = futures[future]
                try:
                    row = future.result()
                    said = f"AUROC {row['auroc']:.3f}, trained {row['fit_s']:,.0f} s, {row['images_seen']:,} images"
                except Exception as error:  # one broken fit must not cost the others
                    text = str(error).strip().splitlines()
                    message = f"{type(error).__name__}: {text[0] if text else ''}"
                    row = {**dict(zip(KEY, fit.key, strict=True)), "error": message}
                    output.mkdir(parents=True, exist_ok=True)
                    with (output / "errors.log").open("a", encoding="utf-8") as file:
                        file.write(f"{fit.key}\n{''.join(traceback.format_exception(error))}\n")
                    said = f"[red]failed[/red] {message}"
                append_rows(output, [row], COLUMNS)
                del left[fit.key]
                good = read_rows(output)
                seconds = _expected(left.values(), good[good["error"].isna()]) / profile.workers
                bar.update(task, advance=1, description=f"about {clock_time(seconds)} left")
                bar.console.print(
                    f"[bold]{number}/{total}[/bold] {fit.part} {fit.task}, {fit.detector}, seed {fit.seed}: {said} "
                    f"[dim]({clock_time(time.perf_counter() - start)} elapsed, about {clock_time(seconds)} left)[/dim]",
                    highlight=False,
                )
    finally:
        executor.shutdown(cancel_futures=True)
    return read_rows(output)
