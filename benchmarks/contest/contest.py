# SPDX-License-Identifier: Apache-2.0
"""What is fitted to what, one row of ``results.csv`` for each; a finished row is never run again."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule, MVTecAD, Visa
from anomalib.data.datasets.image import mvtecad
from anomalib.engine import Engine
from anomalib.metrics.aupro import _AUPRO
from anomalib.metrics.pimo.functional import aupimo_scores
from anomalib.models import AnomalibModule
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from anomalib_flowood import CrossDataset, OneClass
from anomalib_flowood.benchmark import ScoreRecorder
from anomalib_flowood.data import Images
from anomalib_flowood.data.sources import Source
from anomalib_flowood.features import LOCAL_DIR, save_local
from anomalib_flowood.metrics import auroc, fpr_at_tpr
from benchmarks.results import (
    KEY,
    append_rows,
    check_columns,
    clock_time,
    finished,
    quiet,
    read_rows,
    trained_epochs,
)

from .detectors import DETECTORS, Detector, ablation
from .memo import Memo, mapped

PARTS = ("industrial", "one_class", "left_out", "cross", "ablation")
SETS = ("fashion_mnist", "mnist")

MAP_SIZE = 224
"""Height and width of the images of industrial tasks, and of the maps that are measured."""
SMALL_SIZE = 96
"""Height and width to which the backbone gets the 28 × 28 images."""
TRAINING_SECONDS = {"industrial": 1200.0, "one_class": 300.0, "cross": 300.0}
"""Cap on the training of a detector that trains until its held-out loss levels off, without another in the options."""
LEVEL, PATIENCE = 0.005, 3
"""Levelled off: no improvement of more than this share in so many epochs."""
LONG_CLASS = 0
"""The class of each set on which detectors run that train for long; on all of them a contest would take hours."""
TRAIN_LONG = ("Fastflow", "Patchflow", "Cflow")
ON_EMBEDDINGS = ("EmbeddingFlow", "KNN", "Mahalanobis", "PPCA", "GaussianMixture")
"""Detectors of the part left_out, which is there to confirm what was chosen for embeddings."""
AUPIMO_THRESHOLDS = 30_000
"""A tenth of anomalib's default, for the time it takes."""
SPEED_BATCH = 32

COLUMNS = (
    *KEY,
    *("auroc", "fpr95", "pixel_auroc", "aupro", "aupimo"),
    *("fit_s", "wall_s", "hits", "backbone_s", "epochs", "stopped_by"),
    *("images_per_s", "peak_gib", "train_images", "test_images", "finished", "error"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Something to fit to and be tested on.

    Attributes:
        part: One of :data:`PARTS`.
        name: Its name in rows.
        kind: ``industrial``, ``one_class`` or ``cross``: what sizes, caps and PatchCore's share hang on.
        data: Makes the data module.
        other: For one-class tasks, the data set whose images the fitted detector is shown besides.
    """

    part: str
    name: str
    kind: str
    data: Callable[[], AnomalibDataModule]
    other: str = ""

    @property
    def image_size(self) -> int:
        """Height and width of what the backbone gets."""
        return MAP_SIZE if self.kind == "industrial" else SMALL_SIZE


class LeftOut(OneClass):
    """All classes of a data set but one, to be told from that one.

    Args:
        dataset: Name of the data set.
        number: Label of the class that is left out.
        arguments: Those of :class:`OneClass`.
    """

    def __init__(self, dataset: str, number: int, **arguments: Any) -> None:
        super().__init__(dataset, "the others", **arguments)
        (source,) = self._sources
        self._sources = [_Relabelled(source, number)]


class _Relabelled:
    """A source with two classes, one of its own and all others."""

    def __init__(self, source: Source, number: int) -> None:
        self.name, self.key, self.prepare = source.name, source.key, source.prepare
        self.source, self.number = source, number

    def read(self, split: str) -> Images:
        images = self.source.read(split)
        names = images.class_names or tuple(np.unique(np.asarray(images.classes, dtype=str)))
        left_out = names[self.number]
        classes = np.where(images.classes == left_out, left_out, "the others").astype(object)
        return replace(images, classes=classes, class_names=())


class IndustrialFolder(MVTecAD):
    """A folder laid out as MVTec AD, whose images may be PNG, JPEG, BMP or TIFF files."""

    def __init__(self, *args: Any, limit: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit = limit

    def prepare_data(self) -> None:
        """Nothing is downloaded."""

    def _setup(self, _stage: str | None = None) -> None:
        endings = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
        with patch.object(mvtecad, "IMG_EXTENSIONS", (*endings, *map(str.upper, endings))):
            super()._setup(_stage)
        if self.limit:
            for data in (self.train_data, self.test_data):
                step = max(1, len(data) // self.limit)
                data.subsample(list(range(0, len(data), step)), inplace=True)


HELD_OUT: dict[str, Any] = {"val_split_mode": "from_train", "val_split_ratio": 0.1, "seed": 0, "num_workers": 0}


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see ``__main__.py``."""

    output: Path = Path("runs/contest")
    parts: Sequence[str] = PARTS
    industrial: Path | None = None
    mvtec: Path | None = None
    visa: Path | None = None
    categories: Sequence[str] = ()
    detectors: Sequence[str] = ()
    tasks: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    backbone: str = "tf_efficientnet_lite0"
    limit: int | None = None
    cap: float | None = None
    root: str = "./datasets"


def _industrial(options: Options, part: str) -> list[Task]:
    for given, inside in ((options.industrial, "train/good"), (options.mvtec, ""), (options.visa, "")):
        if given is not None and not (given / inside).is_dir():
            msg = f"There is no folder {given / inside}."
            raise FileNotFoundError(msg)
    found: list[tuple[str, Callable[[], AnomalibDataModule]]] = []
    mvtec = partial(IndustrialFolder, limit=options.limit, **HELD_OUT)
    if options.industrial is not None:
        folder = options.industrial.resolve()
        found.append((folder.name, partial(mvtec, folder.parent, folder.name)))
    if options.mvtec is not None:
        found += [(f"mvtec/{name}", partial(mvtec, options.mvtec, name)) for name in _folders(options.mvtec, "train")]
    if options.visa is not None:
        visa = partial(Visa, options.visa, **HELD_OUT)
        found += [(f"visa/{name}", partial(visa, name)) for name in _folders(options.visa, "Data")]
    chosen = [(name, data) for name, data in found if not options.categories or _category(name) in options.categories]
    return [Task(part, name, "industrial", data) for name, data in chosen]


def _folders(root: Path, inside: str) -> list[str]:
    return sorted(path.name for path in root.iterdir() if (path / inside).is_dir())


def _category(name: str) -> str:
    return name.rpartition("/")[2]


def _one_class(options: Options) -> list[Task]:
    train, test = (2000, 200) if options.limit is None else (options.limit, max(5, options.limit // 10))
    data = partial(OneClass, root=options.root, train_limit=train, test_limit=test)
    return [
        Task("one_class", f"{dataset} class {number}", "one_class", partial(data, dataset, number), other)
        for dataset, other in (SETS, SETS[::-1])
        for number in range(10)
    ]


def _left_out(options: Options) -> list[Task]:
    train, test = (2000, 500) if options.limit is None else (options.limit, max(5, options.limit // 2))
    data = partial(LeftOut, root=options.root, train_limit=train, test_limit=test)
    return [
        Task("left_out", f"{dataset} without class {number}", "one_class", partial(data, dataset, number))
        for dataset in SETS
        for number in range(10)
    ]


def _cross(options: Options) -> list[Task]:
    train, test = (4000, 1000) if options.limit is None else (options.limit, max(10, options.limit // 2))
    data = partial(CrossDataset, root=options.root, train_limit=train, test_limit=test)
    return [
        Task("cross", f"{inside} -> {outside}", "cross", partial(data, inside, [outside]))
        for inside, outside in (SETS, SETS[::-1])
    ]


@dataclass(frozen=True)
class Job:
    """One fit; one or two rows."""

    task: Task
    detector: Detector
    seed: int

    def keys(self, parts: Sequence[str]) -> list[tuple[str, str, str, int]]:
        """The rows that it gives, as far as they are among the wanted parts."""
        keys = [(self.task.part, self.task.name, self.detector.name, self.seed)]
        if self.task.other:
            keys.append(("cross", f"{self.task.name} -> {self.task.other}", self.detector.name, self.seed))
        return [key for key in keys if key[0] in parts]


def plan(options: Options) -> list[Job]:
    """Return all fits, the first seed of everything first.

    Raises:
        ValueError: If a detector or a part is unknown, or there is nothing to do.
        FileNotFoundError: If a folder is not there.
    """
    _check_names("detector", options.detectors, DETECTORS)
    _check_names("part", options.parts, PARTS)
    chosen = [DETECTORS[name] for name in DETECTORS if not options.detectors or name in options.detectors]
    pairs: list[tuple[Task, Detector]] = []
    if "industrial" in options.parts:
        pairs += product(_industrial(options, "industrial"), chosen)
    if {"one_class", "cross"} & set(options.parts):
        pairs += product(_one_class(options), chosen)
    if "left_out" in options.parts:
        pairs += product(_left_out(options), [detector for detector in chosen if detector.name in ON_EMBEDDINGS])
    if "cross" in options.parts:
        pairs += product(_cross(options), chosen)
    if "ablation" in options.parts and DETECTORS["FeatureMapFlow"] in chosen:
        pairs += product(_industrial(options, "ablation"), ablation().values())
    if options.tasks:
        # Whole words, so that "mnist class 0" is not also a class of "fashion_mnist".
        wanted = re.compile("|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in options.tasks))
        pairs = [pair for pair in pairs if wanted.search(pair[0].name)]
    jobs = [Job(*pair, seed) for seed in options.seeds for pair in pairs if seed in _seeds(*pair, options.seeds)]
    if not jobs:
        msg = "Nothing to run: name a folder with --industrial, --mvtec or --visa, or other --parts or --tasks."
        raise ValueError(msg)
    return jobs


def _seeds(task: Task, detector: Detector, seeds: Sequence[int]) -> Sequence[int]:
    """The seeds with which a detector is fitted to a task."""
    if task.part == "industrial":
        return seeds if detector.random else seeds[:1]
    small = task.part in {"one_class", "left_out", "cross"}
    if small and detector.name in TRAIN_LONG and not task.name.endswith(f"class {LONG_CLASS}"):
        return ()
    return seeds if small and detector.name == "EmbeddingFlow" else seeds[:1]


def _check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            msg = f"There is no {what} {name!r}. Known: {', '.join(known)}."
            raise ValueError(msg)


# ---------------------------------------------------------------------------------------------------------------------
# One fit
# ---------------------------------------------------------------------------------------------------------------------


class Recorder(ScoreRecorder):
    """Keeps raw scores, as in ``flowood benchmark``; also raw maps and masks, and some images to measure the speed on.

    Args:
        folder: Where to keep maps, in files and not in memory; without it they are not kept.
        count: Number of test images.
    """

    def __init__(self, folder: Path | None = None, count: int = 0) -> None:
        super().__init__()
        self.folder, self.count = folder, count
        self.images: list[Tensor] = []
        self.maps: Tensor | None = None
        self.masks: Tensor | None = None
        self._filled = 0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        super().on_test_start(trainer, pl_module)
        self._filled = 0

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep images before they are pre-processed."""
        del trainer, pl_module, batch_idx, dataloader_idx
        if sum(map(len, self.images)) < SPEED_BATCH:
            self.images.append(batch.image.clone())

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's scores and maps."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        maps = getattr(outputs, "anomaly_map", None)
        if self.folder is None or maps is None or batch.gt_mask is None:
            return
        if self.maps is None or self.masks is None:
            shape = (self.count, MAP_SIZE, MAP_SIZE)
            self.maps = mapped(self.folder / "maps.bin", shape)
            self.masks = mapped(self.folder / "masks.bin", shape, torch.uint8)
        maps = maps.detach().float().reshape(len(maps), 1, *maps.shape[-2:])
        if maps.shape[-2:] != (MAP_SIZE, MAP_SIZE):
            maps = functional.interpolate(maps, (MAP_SIZE, MAP_SIZE), mode="bilinear", align_corners=False)
        masks = batch.gt_mask.reshape(len(maps), 1, *batch.gt_mask.shape[-2:])
        masks = functional.interpolate(masks.float(), (MAP_SIZE, MAP_SIZE), mode="nearest")
        end = self._filled + len(maps)
        self.maps[self._filled : end] = maps[:, 0]
        self.masks[self._filled : end] = (masks[:, 0] > 0.5).byte()
        self._filled = end


class UntilLevel(Callback):
    """Ends a training when the loss on held-out normal images has levelled off, or the time is up.

    Args:
        loss: The loss of a batch of pre-processed images.
        seconds: The time, measured on the wall from the first batch on.
    """

    def __init__(self, loss: Callable[[AnomalibModule, Tensor], Tensor], seconds: float) -> None:
        self.loss, self.seconds = loss, seconds
        self.losses: list[float] = []
        self.stopped_by = ""
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        del pl_module, args, kwargs
        if time.perf_counter() - self._start > self.seconds:
            self.stopped_by = "time"
            trainer.should_stop = True

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the loss."""
        if self.stopped_by:
            return
        total, count = 0.0, 0
        module: Any = pl_module
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            images = module.pre_processor.transform(batch.image)
            total += float(self.loss(module, images)) * len(images)
            count += len(images)
        self.losses.append(total / count)
        if levelled_off(self.losses):
            self.stopped_by = "levelled off"
            trainer.should_stop = True


def levelled_off(losses: Sequence[float], share: float = LEVEL, patience: int = PATIENCE) -> bool:
    """Whether none of the last ``patience`` losses is lower than the best before it by more than ``share`` of it."""
    best, stale = math.inf, 0
    for loss in losses:
        if best == math.inf or loss < best - share * abs(best):
            best, stale = loss, 0
        else:
            stale += 1
    return stale >= patience


class PeakMemory:
    """The most memory that the process took beyond what it had at the start, sampled in a thread.

    Counts anonymous pages alone (``RssAnon`` of ``/proc/self/status``): what is mapped to a file, such as the memo, is
    the system's to drop. ``gib`` is ``None`` where there is no such file.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.interval = interval
        self.gib: float | None = None
        self._stop = threading.Event()

    @staticmethod
    def now() -> int | None:
        """Anonymous resident memory in KiB."""
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: else freed memory would count as present
        if trim is not None:
            trim(0)
        self._first = self._most = self.now()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while self._most is not None and not self._stop.wait(self.interval):
            self._most = max(self._most, self.now() or 0)

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._first is not None and self._most is not None:
            self.gib = (max(self._most, self.now() or 0) - self._first) / 2**20


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
    datamodule = task.data()
    datamodule.prepare_data()
    datamodule.setup()
    cap = TRAINING_SECONDS[task.kind] if options.cap is None else options.cap
    rule = UntilLevel(detector.held_out_loss, cap) if detector.held_out_loss else None
    rows = []
    with TemporaryDirectory(prefix="flowood-contest-") as name:
        folder = Path(name)
        recorder = Recorder(folder if task.kind == "industrial" else None, len(datamodule.test_data))
        engine = Engine(
            accelerator="cpu",
            devices=1,
            default_root_dir=folder,
            callbacks=[recorder, *([rule] if rule else [])],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # The held-out images are seen by the rule instead, once and not twice.
            **({"limit_val_batches": 0} if rule else {}),
        )
        with PeakMemory() as memory:
            account = memo.account()
            start = time.perf_counter()
            engine.fit(model, datamodule=datamodule)
            wall = time.perf_counter() - start
            hits, saved = account.hits, account.saved
            engine.test(model, datamodule=datamodule, verbose=False)
            # With the memo off, so that every detector's peak has a backbone at work in it.
            speed = images_per_s(model, torch.cat(recorder.images)[:SPEED_BATCH], memo)
        trainer = engine.trainer
        common = {
            "fit_s": round(wall + saved, 3),
            "wall_s": round(wall, 3),
            "hits": hits,
            "backbone_s": round(saved / hits, 6) if hits else "",
            "epochs": trained_epochs(trainer),
            "stopped_by": (rule.stopped_by if rule else "") or "default epochs",
            "peak_gib": "" if memory.gib is None else round(memory.gib, 3),
            "train_images": len(datamodule.train_data),
            "images_per_s": round(speed, 2),
        }
        scores = recorder.scores
        keys = job.keys(options.parts)
        if keys and keys[0][0] == task.part:
            row = {**dict(zip(KEY, keys.pop(0), strict=True)), **common, **_image_metrics(scores)}
            if recorder.maps is not None and recorder.masks is not None:
                row |= pixel_metrics(recorder.maps, recorder.masks)
                if task.part == "industrial" and job.seed == 0:
                    save_maps(options.output / "maps" / task.name / f"{detector.name}.npz", recorder, scores)
            rows.append(row)
        if keys:
            engine.test(model, dataloaders=_with_others(datamodule, task.other), verbose=False)
            rows.append({**dict(zip(KEY, keys[0], strict=True)), **common, **_image_metrics(recorder.scores)})
    for row in rows:
        row["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S")
    return rows


def _image_metrics(scores: pd.DataFrame) -> dict[str, Any]:
    values, labels = torch.tensor(scores["score"].to_numpy()), torch.tensor(scores["label"].to_numpy())
    return {"auroc": auroc(values, labels), "fpr95": fpr_at_tpr(values, labels), "test_images": len(scores)}


def _with_others(datamodule: Any, other: str) -> DataLoader:
    """The normal test images among as many as 1,000 of another data set, mixed: some scores depend on their batch."""
    outside = CrossDataset(
        other, ["fashion_mnist" if other == "mnist" else "mnist"], root=datamodule.root, test_limit=1000
    )
    outside.prepare_data()
    outside.setup()
    data = outside.test_data
    data = data.subsample(np.flatnonzero(data.samples["label_index"] == 0).tolist())
    data.samples = data.samples.assign(label_index=1, label="abnormal")
    normal = np.flatnonzero(datamodule.test_data.samples["label_index"] == 0).tolist()
    both = datamodule.test_data.subsample(normal) + data
    both.subsample(np.random.default_rng(0).permutation(len(both)).tolist(), inplace=True)
    return DataLoader(both, batch_size=datamodule.eval_batch_size, collate_fn=both.collate_fn)


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


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


def pixel_metrics(maps: Tensor, masks: Tensor) -> dict[str, Any]:
    """Pixel AUROC, AUPRO up to a false positive rate of 0.3, and AUPIMO of raw maps.

    Args:
        maps: Raw anomaly maps, ``(N, H, W)``.
        masks: 1 where an image is anomalous, ``(N, H, W)``.

    Returns:
        The three; ``""`` for what is not defined.
    """
    if not bool(masks.any()) or bool(masks.all()):
        return {}
    aupro = _AUPRO()
    aupro.update(maps, masks)
    result: dict[str, Any] = {"pixel_auroc": pixel_auroc(maps, masks), "aupro": float(aupro.compute())}
    del aupro
    try:
        values = aupimo_scores(maps, masks.bool(), AUPIMO_THRESHOLDS, fpr_bounds=(1e-5, 1e-4))[4]
    except (RuntimeError, ValueError):  # no normal image, or a map too coarse for such rates
        return result
    return {**result, "aupimo": float(values[~values.isnan()].mean())}


def pixel_auroc(maps: Tensor, masks: Tensor) -> float:
    """Area under the ROC curve over all pixels, ties counting one half; one sort, since pixels are many."""
    values, truth = maps.flatten().numpy(), masks.flatten().numpy().astype(bool)
    normal = np.sort(values[~truth])
    anomalous = values[truth]
    below = np.searchsorted(normal, anomalous, side="left").astype(np.float64).mean()
    up_to = np.searchsorted(normal, anomalous, side="right").astype(np.float64).mean()
    return float((below + up_to) / 2 / len(normal))


def save_maps(path: Path, recorder: Recorder, scores: pd.DataFrame) -> None:
    """Save the maps for pictures: half as large, brought to [0, 1], in half precision."""
    if recorder.maps is None or recorder.masks is None:
        return
    maps = functional.avg_pool2d(recorder.maps[:, None], 2)[:, 0]
    low, high = float(maps.min()), float(maps.max())
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        maps=((maps - low) / max(high - low, 1e-12)).half().numpy(),
        masks=functional.max_pool2d(recorder.masks[:, None].float(), 2)[:, 0].bool().numpy(),
        paths=scores["image_path"].to_numpy(dtype=str),
        labels=scores["label"].to_numpy(),
        scores=scores["score"].to_numpy(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# All fits
# ---------------------------------------------------------------------------------------------------------------------


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
    done = finished(options.output)
    every = plan(options)
    jobs = [job for job in every if set(job.keys(options.parts)) - done]
    console.print(f"{len(jobs)} fits to run, {len(every) - len(jobs)} finished before; rows in {options.output}")
    clock = _Clock()
    with Memo() as memo, quiet():
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
                said += f", fit {rows[0]['fit_s']:,.1f} s, {rows[0]['images_per_s']:,.0f} images/s"
            except Exception as error:  # one broken fit must not cost the others
                said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                rows = [{**dict(zip(KEY, key, strict=True)), "error": said} for key in wanted]
                options.output.mkdir(parents=True, exist_ok=True)
                with (options.output / "errors.log").open("a", encoding="utf-8") as file:
                    file.write(f"{wanted[0]}\n{traceback.format_exc()}\n")
                said = f"[red]failed[/red] {said}"
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
