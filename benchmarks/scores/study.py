# SPDX-License-Identifier: Apache-2.0
"""One flow on pixels for each data set and seed, all scores on it, many outside sets; a row for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from rich.console import Console
from torch import Tensor

from anomalib_flowood import CrossDataset, PixelFlow, flows
from anomalib_flowood.metrics import auroc, fpr_at_tpr
from anomalib_flowood.scores import SCORES, compressed_bits
from anomalib_flowood.scores.complexity import pixels_of
from benchmarks.fits import TimeLimit, clock_time, quiet, quiet_engine, trained_epochs
from benchmarks.results import KEY, append_rows, check_columns, failed, finished, read_rows

SETS = ("fashion_mnist", "mnist")

FLOW: dict[str, Any] = {"image_size": (28, 28), "channels": 1, "subnet": "mlp", "logit_alpha": 0.05}
"""The flow under all scores: of cycle masks with ``mlp`` or ``bottleneck`` networks of several depths and widths, the
one whose ``complexity`` was best on FashionMNIST's first three pairs. The flatter logit that suits −log p costs scores
that take a compressor's bits away."""

BATCH = 256


def halves_of_two(images: Tensor) -> Tensor:
    """Put the upper half of each image onto the lower half of the next one, ``(N, C, H, W)``."""
    half = images.shape[2] // 2
    return torch.cat([images[:, :, :half], images.roll(-1, 0)[:, :, half:]], dim=2)


def without_a_quadrant(images: Tensor) -> Tensor:
    """Paint the lower right quadrant black, ``(N, C, H, W)``."""
    images = images.clone()
    images[:, :, images.shape[2] // 2 :, images.shape[3] // 2 :] = 0
    return images


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "rotated by 90°": lambda images: images.rot90(1, (2, 3)),
    "mirrored top to bottom": lambda images: images.flip(2),
    "mirrored left to right": lambda images: images.flip(3),
    "halves of two images": halves_of_two,
    "a quadrant black": without_a_quadrant,
}
"""What is done to a data set's own test images to make outside images of them: ``(N, C, H, W)`` to the same."""

NAMED_BEFORE = (
    "mnist -> mirrored left to right",
    *(f"{inside} -> {change}" for change in ("halves of two images", "a quadrant black") for inside in SETS),
)
"""Pairs that nobody looked at before they were named. ``orientation`` was made when the first one's figures were known,
``density_of_states`` got its statistics when all of them were."""

BITS = "compressed bits alone"
"""The score that needs no model."""

SLOW = {"lid": 50}
"""Scores that take seconds for an image, and the images of each set that they are measured on."""

SEED_0 = ("lid", "likelihood_ratio", "ensemble")
"""Scores with one seed, for the time they take."""

COLUMNS = (
    *KEY,
    *("auroc", "fpr95", "bits_per_dim", "training_s", "epochs"),
    *("fit_s", "pass_s", "ms_per_image", "images", "finished", "error"),
)


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see ``__main__.py``."""

    output: Path = Path("runs/scores")
    sets: Sequence[str] = SETS
    scores: Sequence[str] = (BITS, *SCORES)
    seeds: Sequence[int] = (0, 1, 2)
    seconds: float = 150.0
    images: int = 2000
    root: str = "./datasets"


def outside_sets(inside: str) -> list[str]:
    """Names of the pairs with a data set inside."""
    other = SETS[1] if inside == SETS[0] else SETS[0]
    return [f"{inside} -> {name}" for name in (other, *CHANGES)]


def run(options: Options, console: Console) -> None:
    """Run what is not finished: for each set and seed a training, and each score on it.

    Raises:
        ValueError: If the folder has rows of a version that measured other things.
    """
    check_columns(options.output, COLUMNS)
    start = time.perf_counter()
    for seed in options.seeds:
        for inside in options.sets:
            wanted = [name for name in options.scores if seed == options.seeds[0] or name not in SEED_0]
            done = finished(options.output)
            missing = {
                name: pairs
                for name in wanted
                if (pairs := [pair for pair in outside_sets(inside) if ("scores", pair, name, seed) not in done])
            }
            if not missing:
                continue
            data = CrossDataset(
                inside,
                outside_sets(inside)[0].partition(" -> ")[2],
                root=options.root,
                test_limit=options.images,
                train_batch_size=BATCH,
            )
            data.prepare_data()
            data.setup()
            for name, pairs in missing.items():
                elapsed = clock_time(time.perf_counter() - start)
                console.print(f"{elapsed}  {inside}, seed {seed}: {name}", highlight=False)
                try:
                    with quiet():
                        rows = _measure(options, data, pairs, name, seed)
                except Exception as error:  # one broken score must not cost the others
                    rows = failed(options.output, [("scores", pair, name, seed) for pair in pairs], error)
                    console.print(f"  failed: {rows[0]['error']}", markup=False)
                append_rows(options.output, rows, COLUMNS)


def _row(pair: str, name: str, seed: int, values: dict[str, Any]) -> dict[str, Any]:
    key = dict(zip(KEY, ("scores", pair, name, seed), strict=True))
    return {**key, **values, "finished": time.strftime("%Y-%m-%dT%H:%M:%S")}


def _trained_for(name: str) -> str:
    """The score that a flow trains for so that it can be scored with this one."""
    return name if name in ("likelihood_ratio", "ensemble") else "nll"


def _train(options: Options, data: CrossDataset, inside: str, score: str, seed: int) -> tuple[Path, dict[str, Any]]:
    """Train a flow, with those that its score trains beside, unless that was done before.

    Returns:
        Its checkpoint, and what is known of its training.
    """
    folder = options.output / "checkpoints"
    path = folder / f"{inside}-{score}-{seed}.ckpt"
    known = ["training_s", "epochs"]
    rows = read_rows(options.output)
    if path.is_file() and not rows.empty:
        same = rows["task"].isin(outside_sets(inside)) & (rows["seed"] == seed)
        rows = rows[same & (rows["detector"].map(_trained_for) == score)].dropna(subset=known)
        if len(rows):
            return path, {name: float(rows[name].iloc[0]) for name in known}
    seed_everything(seed, verbose=False)
    detector = PixelFlow(**FLOW, score=score, evaluator=False)
    limit = TimeLimit(options.seconds)
    engine = quiet_engine(folder / "logs", [limit], max_epochs=-1, limit_val_batches=0)
    engine.fit(detector, datamodule=data)
    engine.trainer.save_checkpoint(path, weights_only=True)
    return path, {"training_s": round(limit.time_elapsed(), 1), "epochs": trained_epochs(engine.trainer)}


def _measure(options: Options, data: CrossDataset, pairs: Sequence[str], name: str, seed: int) -> list[dict[str, Any]]:
    """Measure one score on some pairs with the same set inside; rows."""
    inside = pairs[0].partition(" -> ")[0]
    checkpoint, common = _train(options, data, inside, _trained_for(name), seed)
    score = "nll" if name == BITS else name
    detector: Any = PixelFlow.load_from_checkpoint(checkpoint, map_location="cpu", score=score)
    detector.eval()
    common = {**common, **_cost(detector, data)}

    def scores_of(images: Tensor) -> Tensor:
        parts = []
        for chunk in images.split(256):
            inputs = detector.model.inputs(chunk)
            if name == BITS:
                parts.append(-compressed_bits(pixels_of(inputs)))
            else:
                parts.append(detector.model.predict(inputs).pred_score)
        return torch.cat(parts)

    count = SLOW.get(name, options.images)
    sets = {label: images[:count] for label, images in _test_images(data).items()}
    with torch.no_grad():
        start = time.perf_counter()
        inner = scores_of(sets[inside])
        common["ms_per_image"] = round(1000 * (time.perf_counter() - start) / len(inner), 4)
        # At bin centres, where all scores are taken.
        bits = flows.bits_per_dim(detector.model.log_prob(sets[inside]), detector.model.dims).mean()
    rows = []
    for pair in pairs:
        outside = pair.partition(" -> ")[2]
        with torch.no_grad():
            outer = scores_of(sets[outside] if outside in sets else CHANGES[outside](sets[inside]))
        values = torch.cat([inner, outer])
        labels = torch.cat([torch.zeros(len(inner)), torch.ones(len(outer))]).int()
        result = {"auroc": auroc(values, labels), "fpr95": fpr_at_tpr(values, labels), "images": len(values)}
        rows.append(_row(pair, name, seed, {**common, **result, "bits_per_dim": round(float(bits), 4)}))
    return rows


def _cost(detector: PixelFlow, data: CrossDataset) -> dict[str, Any]:
    """Seconds that it takes to fit a score, and to score the images that it was fitted on."""
    scorer = detector.model.scorer
    if not scorer.fit_images:
        return {}
    seconds = []
    for once in (detector.fit_score, lambda loader: _score_once(detector, loader, scorer.fit_images)):
        start = time.perf_counter()
        once(data.train_dataloader())
        seconds.append(round(time.perf_counter() - start, 3))
    return dict(zip(("fit_s", "pass_s"), seconds, strict=True))


@torch.no_grad()
def _score_once(detector: PixelFlow, loader: Any, images: int) -> None:
    """Score so many images of a loader, as :meth:`fit_score` takes them."""
    for inputs in detector._score_inputs(loader, images):
        detector.model.predict(inputs)


def _test_images(data: CrossDataset) -> dict[str, Tensor]:
    """Test images by the name of their set, ``(N, C, H, W)``."""
    images, sources = [], []
    for batch in data.test_dataloader():
        images.append(batch.image)
        sources += batch.source
    together = torch.cat(images)
    return {
        name: together[[position for position, source in enumerate(sources) if source == name]]
        for name in sorted(set(sources))
    }
