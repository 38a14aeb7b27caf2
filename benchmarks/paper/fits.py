# SPDX-License-Identifier: Apache-2.0
"""One training and test, and what is measured of it: a row of ``results.csv``."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning import seed_everything

from anomalib_flowood import PixelFlow, flows
from anomalib_flowood.benchmark import ScoreRecorder
from anomalib_flowood.explain import coadaptation
from anomalib_flowood.metrics import auroc, fpr_at_tpr
from benchmarks.fits import TimeLimit, quiet, quiet_engine, trained_epochs
from benchmarks.results import KEY

from .plan import Fit

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
        detector: Any = fit.build()
        datamodule = fit.data(root)
        datamodule.prepare_data()
        datamodule.setup()
        limit, recorder = TimeLimit(fit.budget.seconds if fit.of_pixels else None), ScoreRecorder()
        # -1: none. Without any limit here a detector takes its own number of epochs.
        epochs = {"max_epochs": -1 if fit.budget.seconds else fit.budget.epochs} if fit.of_pixels else {}
        # No threshold and no choice of an epoch hang on a validation.
        engine = quiet_engine(folder, [limit, recorder], fit.accelerator, limit_val_batches=0, **epochs)
        engine.fit(detector, datamodule=datamodule)
        engine.test(detector, datamodule=datamodule, verbose=False)
        epochs_trained = trained_epochs(engine.trainer)
        row = {
            **dict(zip(KEY, fit.key, strict=True)),
            **_detection(recorder.scores),
            "fit_s": round(limit.time_elapsed("train"), 2),
            "epochs": epochs_trained,
            "images_seen": round(epochs_trained * len(datamodule.train_data)),
            "train_images": len(datamodule.train_data),
            "test_images": len(recorder.scores),
            "parameters": sum(parameter.numel() for parameter in detector.model.flow.parameters()),
            "machine": machine(fit.accelerator),
        }
        if fit.of_pixels:
            row |= _bits_at_centres(detector.model, recorder.scores)
            if fit.normal_class is None:
                row |= _bits(detector.to(engine.trainer.strategy.root_device).eval(), datamodule)
            row |= _coadaptation(detector.cpu().eval(), datamodule)
            if fit.normal_class is None:
                _save_samples(detector, datamodule, sample_path(output, fit.key))
    row["wall_s"] = round(time.perf_counter() - start, 2)
    row["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S")
    return row


def _detection(scores: pd.DataFrame) -> dict[str, float]:
    """AUROC and FPR95 of raw scores."""
    values, labels = torch.tensor(scores["score"].to_numpy()), torch.tensor(scores["label"].to_numpy())
    return {"auroc": auroc(values, labels), "fpr95": fpr_at_tpr(values, labels)}


def _bits_at_centres(model: Any, scores: pd.DataFrame) -> dict[str, float]:
    """Mean bits per dimension at bin centres, from the scores of a flow on pixels, inside and outside."""
    values, labels = torch.tensor(scores["score"].to_numpy()), scores["label"].to_numpy()
    bits = flows.bits_per_dim(-values * model.dims, model.dims, model.levels)
    names = {"bits_per_dim_centres": 0, "bits_per_dim_outside_centres": 1}
    return {name: float(bits[labels == label].mean()) for name, label in names.items()}


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
