# SPDX-License-Identifier: Apache-2.0
"""Explain a trained detector: score images from inside and outside, draw, and write the page."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from anomalib_flowood.metrics import auroc
from anomalib_flowood.models import EmbeddingFlow, FeatureMapFlow, PixelFlow
from anomalib_flowood.models.pixel_flow import PixelFlowModel

from .coadaptation import Coadaptation, CouplingRecord, coadaptation, record_couplings
from .images import ImageSet, image_sets, spread
from .page import Picture, write_page
from .pictures import (
    SHOWN_SETS,
    draw_coadaptation,
    draw_histograms,
    draw_images,
    draw_latents,
    draw_layers,
)

DRAWS = 40
"""Dequantisation draws over which latents are averaged (Kirichenko et al. 2020, figure 2)."""
TEMPERATURES = (1.0, 0.8, 0.6)

_CHUNK = 64
_LATENTS_PER_SET = 4
_SAMPLES = 8
_WORST = 6
_NEAREST = 3
_SEED = 0


@dataclass
class _Scored:
    """What the detector says of one set.

    Attributes:
        images: The set.
        log_prob: Nats, ``(N,)``.
        bits: Bits per dimension, ``(N,)``.
        score: The detector's raw score, ``(N,)``; higher is more anomalous.
        coadaptation: Of each coupling layer; ``None`` but for a flow on pixels.
        records: What each coupling layer does to the first images; empty but for a flow on pixels.
    """

    images: ImageSet
    log_prob: Tensor
    bits: Tensor
    score: Tensor
    coadaptation: Coadaptation | None
    records: list[CouplingRecord]

    def auroc(self, inside: _Scored) -> float:
        """AUROC against the inside set."""
        labels = torch.tensor([0] * len(inside.score) + [1] * len(self.score))
        return auroc(torch.cat([inside.score, self.score]), labels)


def explain(
    detector: PixelFlow | EmbeddingFlow | FeatureMapFlow,
    data: AnomalibDataModule | Mapping[str, Tensor],
    output: str | Path,
    *,
    max_images: int = 64,
) -> Path:
    """Write pictures of what a trained flow does to images from inside and outside, and a page that shows them.

    For :class:`~anomalib_flowood.PixelFlow`: log-likelihood histograms, latents, s and t of every coupling layer,
    samples and co-adaptation (after Kirichenko et al. 2020, figures 1 to 3). For
    :class:`~anomalib_flowood.EmbeddingFlow`: histograms, and the inside images nearest to the outside images that
    the detector finds the least anomalous. For :class:`~anomalib_flowood.FeatureMapFlow`: histograms.

    ``explain.json`` holds the numbers: for each set the log-likelihoods (nats), bits per dimension, AUROC against the
    inside set, and for each coupling layer its co-adaptation and what it predicts, see
    :func:`~anomalib_flowood.explain.coadaptation`.

    Args:
        detector: A trained detector, on the device that is to do the work. It is left as it is: mode, weights and
            running statistics.
        data: A data module, whose test images with label 0 are inside and those with label 1 outside, told apart by
            their ``source`` where they have one. Or images in [0, 1] by name, each of shape ``(N, 3, H, W)`` or
            ``(N, 1, H, W)``, the inside ones first.
        output: Folder to write to; made if missing.
        max_images: The most images of each set.

    Returns:
        The page, ``index.html`` in the folder.

    Raises:
        ValueError: If the detector is of another kind, ``max_images`` is below 2, or there are no images from inside
            or none from outside.
        NotFittedError: If the detector was never trained.
    """
    check_explainable(type(detector))
    if not bool(detector.model.fitted):
        msg = f"This {type(detector).__name__} was never fitted, so there is nothing to explain: train it first."
        raise NotFittedError(msg)
    if max_images < 2:
        msg = f"max_images must be at least 2, got {max_images}."
        raise ValueError(msg)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    modes = {module: module.training for module in detector.modules()}
    detector.eval()
    try:
        # Progress goes to the error stream, so that the output of a command stays what it prints.
        with Progress(console=Console(stderr=True), transient=True) as progress:
            return _explain(detector, data, folder, max_images, progress)
    finally:
        for module, training in modes.items():
            module.training = training


def check_explainable(detector: type) -> None:
    """Refuse a class of detectors that cannot be explained.

    Args:
        detector: The class.

    Raises:
        ValueError: If it is none of ours.
    """
    if not issubclass(detector, PixelFlow | EmbeddingFlow | FeatureMapFlow):
        msg = (
            f"{detector.__name__} cannot be explained: it is no flow. What can: PixelFlow (everything), EmbeddingFlow "
            "(histograms and nearest images), FeatureMapFlow (histograms)."
        )
        raise ValueError(msg)


@torch.no_grad()
def _explain(
    detector: PixelFlow | EmbeddingFlow | FeatureMapFlow,
    data: AnomalibDataModule | Mapping[str, Tensor],
    folder: Path,
    max_images: int,
    progress: Progress,
) -> Path:
    task = progress.add_task("reading images", total=None)
    sets = image_sets(detector, data, max_images)
    batches = sum(math.ceil(len(part.inputs) / _CHUNK) for part in sets)
    drawings: list[tuple[str, Callable[..., Picture]]] = [("drawing histograms", _histograms)]
    if isinstance(detector, PixelFlow):
        drawings += [
            ("drawing latents", _latent_pictures),
            ("drawing s", _scale_picture),
            ("drawing t", _shift_picture),
            ("drawing co-adaptation", _coadaptation_picture),
            ("drawing samples", _sample_picture),
        ]
    elif isinstance(detector, EmbeddingFlow):
        drawings.append(("looking for the nearest images", _nearest_picture))
    progress.update(task, total=batches + len(drawings))

    scored = []
    for part in sets:
        progress.update(task, description=f"scoring images of {escape(part.name)}")
        scored.append(_score(detector, part, lambda: progress.advance(task)))
    numbers = _numbers(detector, scored)
    pictures = []
    for description, draw in drawings:
        progress.update(task, description=description)
        pictures.append(draw(detector, scored, folder))
        progress.advance(task)

    text = json.dumps(_finite(numbers), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "explain.json").write_text(text + "\n", encoding="utf-8")
    names = [part.images.name for part in scored]
    introduction = (
        f"What a trained {numbers['detector']} makes of images from inside ({names[0]}, which it was trained to know) "
        f"and from outside ({', '.join(names[1:])})."
    )
    if len(names) > SHOWN_SETS:
        introduction += f" Pictures show the first {SHOWN_SETS - 1} of the {len(names) - 1} outside sets."
    header, rows = _table(numbers)
    return write_page(
        folder / "index.html", f"{numbers['detector']} on {names[0]}", introduction, header, rows, pictures
    )


def _score(detector: Any, images: ImageSet, advance: Callable[[], None]) -> _Scored:
    """Score a set, and record its way through the couplings of a flow on pixels."""
    model = detector.model
    log_probs, bits, scores = [], [], []
    for chunk in images.inputs.split(_CHUNK):
        chunk = chunk.to(detector.device)
        prepared = model.inputs(chunk)
        log_prob = model.log_prob_of(prepared)
        log_probs.append(log_prob.cpu())
        bits.append(model.bits_per_dim(chunk, log_prob=log_prob).double().cpu())
        scores.append(model.predict(prepared).pred_score.cpu())
        advance()
    adapted, records = None, []
    if isinstance(detector, PixelFlow):
        inputs = images.inputs.to(detector.device)
        adapted = coadaptation(model, inputs)
        with record_couplings(model.flow) as records:
            model.log_prob(inputs[:1])
    return _Scored(images, torch.cat(log_probs), torch.cat(bits), torch.cat(scores), adapted, records)


# -- numbers ------------------------------------------------------------------------------------------------------


def _numbers(detector: Any, scored: list[_Scored]) -> dict[str, Any]:
    """Everything that ``explain.json`` holds."""
    sets: dict[str, dict[str, Any]] = {}
    for part in scored:
        log_prob = part.log_prob.double()
        entry: dict[str, Any] = {
            "outside": part.images.outside,
            "images": len(log_prob),
            "log_likelihood": {
                "mean": float(log_prob.mean()),
                "std": float(log_prob.std()) if len(log_prob) > 1 else float("nan"),
                "min": float(log_prob.min()),
                "median": float(log_prob.median()),
                "max": float(log_prob.max()),
            },
            "bits_per_dim": float(part.bits.mean()),
            "bits_per_dim_median": float(np.median(part.bits.numpy())),
        }
        if part.images.outside:
            entry["auroc"] = part.auroc(scored[0])
        if part.coadaptation:
            entry |= {
                name: {
                    "layers": layers,
                    "mean_from_layer_2": sum(layers[1:]) / len(layers[1:]) if layers[1:] else float("nan"),
                }
                for name, layers in part.coadaptation._asdict().items()
            }
        sets[part.images.name] = entry
    return {"detector": type(detector).__name__, "inside": scored[0].images.name, "sets": sets}


def _finite(value: Any) -> Any:
    """Replace what JSON has no word for, NaN and infinities, by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(numbers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The numbers that the page shows."""
    adapted = any("coadaptation" in entry for entry in numbers["sets"].values())
    header = ["", "images", "mean log-likelihood (nats)", "bits per dimension: mean", "median", "AUROC"]
    rows = []
    for name, entry in numbers["sets"].items():
        row = [
            name,
            str(entry["images"]),
            f"{entry['log_likelihood']['mean']:,.0f}",
            f"{entry['bits_per_dim']:.2f}",
            f"{entry['bits_per_dim_median']:.2f}",
            f"{entry['auroc']:.3f}" if "auroc" in entry else "inside",
        ]
        if adapted:
            row.append(f"{entry['coadaptation']['mean_from_layer_2']:.2f}")
        rows.append(row)
    return [*header, *(["co-adaptation (mean from layer 2)"] if adapted else [])], rows


# -- pictures -----------------------------------------------------------------------------------------------------


def _histograms(detector: Any, scored: list[_Scored], folder: Path) -> Picture:
    shown = scored[:SHOWN_SETS]
    aurocs = {part.images.name: part.auroc(shown[0]) for part in shown[1:]}
    draw_histograms({part.images.name: part.log_prob for part in shown}, aurocs, folder / "histograms.png")
    caption = (
        f"Log-likelihoods of {shown[0].images.name} (inside, blue) against those of each outside set. A flow that "
        "knew what its training images show would put the outside sets to the left. AUROC 0.5: the score cannot tell "
        "them apart; below 0.5: outside images count as less anomalous than inside ones. Outliers are counted in the "
        "outermost bins."
    )
    if isinstance(detector, FeatureMapFlow):
        caption += " AUROC is that of the detector's image score, for which it takes a part of the likelihood only."
    return Picture("histograms.png", "Log-likelihood", caption)


def _latent_pictures(detector: PixelFlow, scored: list[_Scored], folder: Path) -> Picture:
    model = detector.model
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.flow.modules())
    blocks = {}
    for part in scored[:SHOWN_SETS]:
        inputs = part.images.inputs[:_CHUNK].to(detector.device)
        places = spread(len(inputs), _LATENTS_PER_SET)
        few = inputs[places]
        with torch.random.fork_rng([detector.device] if detector.device.type == "cuda" else []):
            torch.manual_seed(_SEED)
            repeated = few.repeat_interleave(DRAWS, dim=0).split(_CHUNK)
            draws = torch.cat([_latents(model, chunk, noisy=True) for chunk in repeated])
        latents = {"latent": _latents(model, few), f"mean of\n{DRAWS} draws": draws.unflatten(0, (-1, DRAWS)).mean(1)}
        if normalised:
            # A copy: training mode moves running statistics.
            latents["training\nmode"] = _latents(copy.deepcopy(model).train(), inputs)[places]
        blocks[part.images.name] = (part.images.images[places], latents)
    draw_latents(blocks, folder / "latents.png")
    caption = (
        f"Images, their latents, and the latents averaged over {DRAWS} draws of the dequantisation noise, which "
        "takes the noise out and leaves what the image puts into the latent. Edges of the image that show in its "
        "latent say that the flow transforms local structure, whatever it depicts, which makes outside images likely "
        "too. One colour scale for all latents" + (", mean over the colours" if model.shape[0] > 1 else "") + "."
    )
    if normalised:
        caption += " In training mode, batch norm uses the statistics of the set shown and not those of training."
    return Picture("latents.png", "Latents", caption)


def _latents(model: PixelFlowModel, images: Tensor, *, noisy: bool = False) -> Tensor:
    """Latents, mean over the colours: ``(N, H, W)``."""
    found: list[Tensor] = []
    handle = model.flow.register_forward_hook(lambda _module, _args, output: found.append(output[0]))
    try:
        model.log_prob(images, noisy=noisy)
    finally:
        handle.remove()
    return found[0].mean(1).cpu()


def _scale_picture(detector: PixelFlow, scored: list[_Scored], folder: Path) -> Picture:
    del detector
    _draw_layers(scored, "s", folder / "scales.png")
    caption = (
        "The log-scales s of every coupling layer, y = (x + t)·exp(s), for one image from inside and one from outside, "
        "on one colour scale; grey where the layer changes nothing. Their sum enters the log-likelihood: red "
        "raises it. Layers that draw the outlines of both images respond to edges and not to what is shown."
    )
    return Picture("scales.png", "Scales s, layer by layer", caption)


def _shift_picture(detector: PixelFlow, scored: list[_Scored], folder: Path) -> Picture:
    del detector
    _draw_layers(scored, "t", folder / "shifts.png")
    caption = (
        "The shifts t of every coupling layer for the same images, likewise. A layer that reproduces the image itself, "
        "with its sign turned, knows the values that it should predict: the layer before has stored them in what it "
        "sees."
    )
    return Picture("shifts.png", "Shifts t, layer by layer", caption)


def _draw_layers(scored: list[_Scored], symbol: str, path: Path) -> None:
    pair = scored[:2]
    maps = {}
    for part in pair:
        maps[part.images.name] = [_over_channels(getattr(record, symbol)[0], record.changed) for record in part.records]
    draw_layers({part.images.name: part.images.images[0] for part in pair}, maps, symbol, path)


def _over_channels(values: Tensor, changed: Tensor) -> Tensor:
    """Mean over the channels that are changed, NaN where none is: ``(C, h, w)`` to ``(h, w)``."""
    return ((values * changed).sum(0) / changed.sum(0)).cpu()


def _coadaptation_picture(detector: PixelFlow, scored: list[_Scored], folder: Path) -> Picture:
    del detector
    shown = {part.images.name: part.coadaptation for part in scored[:SHOWN_SETS] if part.coadaptation}
    draw_coadaptation(shown, folder / "coadaptation.png")
    caption = (
        "How well each layer's −t predicts the values that it transforms: squared correlation over the transformed "
        "positions and images, the mean image taken out; 1 is a perfect prediction. Left, the transformed pixels come "
        "from another image, so that what the image shows elsewhere says nothing about them: what is predicted all "
        "the same, layers before have passed on. Right, on the images as they are: what an image shows elsewhere "
        "counts as well."
    )
    return Picture("coadaptation.png", "Co-adaptation", caption)


def _sample_picture(detector: PixelFlow, scored: list[_Scored], folder: Path) -> Picture:
    inside = scored[0].images
    real = inside.images[spread(len(inside.images), _SAMPLES)]
    count = len(real)
    rows, beyond = {inside.name: real}, []
    for temperature in TEMPERATURES:
        drawn = detector.model.draw(count, temperature, torch.Generator(detector.device).manual_seed(_SEED)).cpu()
        rows[f"T = {temperature:g}"] = drawn.clamp(0, 1)
        beyond.append(f"{float(((drawn < 0) | (drawn > 1)).float().mean()):.0%} (T = {temperature:g})")
    draw_images(rows, [""] * count, folder / "samples.png")
    caption = (
        f"Real images of {inside.name}, and samples of the flow with latents of standard deviation T, the same "
        f"latents in every row. Of the pixels, {', '.join(beyond)} were drawn beyond black or white, where the logit "
        "lets the density reach, and are shown black or white. Good samples do not make a good detector, nor do bad "
        "samples make a bad one."
    )
    return Picture("samples.png", "Samples", caption)


def _nearest_picture(detector: EmbeddingFlow, scored: list[_Scored], folder: Path) -> Picture:
    def embed(images: Tensor) -> Tensor:
        return torch.cat([detector.model.embed(chunk.to(detector.device)).cpu() for chunk in images.split(_CHUNK)])

    inside, others = scored[0].images, scored[1:]
    score = torch.cat([part.score for part in others])
    place = torch.argsort(score, dim=0)[:_WORST]
    names = [part.images.name for part in others for _ in part.score]
    outside = torch.cat([part.images.images for part in others])[place]
    inputs = torch.cat([part.images.inputs for part in others])[place]
    # Of length 1, so that the product is the cosine.
    nearest = (embed(inputs) @ embed(inside.inputs).T).topk(min(_NEAREST, len(inside.inputs)), dim=1).indices
    rows = {"outside": outside}
    rows |= {f"inside, nearest {rank + 1}": inside.images[nearest[:, rank]] for rank in range(nearest.shape[1])}
    headings = [f"{names[i]}\nscore {score[i]:.2f}" for i in place.tolist()]
    draw_images(rows, headings, folder / "nearest.png")
    caption = (
        "The outside images that the detector rates worst: those with the lowest anomaly score (−log p per dimension, "
        f"nats) of all. Below each, the images of {inside.name} whose embeddings are nearest to its own by their "
        "cosine. What they have in common is what the backbone does not tell apart."
    )
    return Picture("nearest.png", "The worst mistakes and their nearest inside images", caption)
