# SPDX-License-Identifier: Apache-2.0
"""What a detector says of each set of images, in numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomalib_flowood.data.path_dataset import takes_bytes
from anomalib_flowood.metrics import auroc
from anomalib_flowood.models.components import FlowModule
from anomalib_flowood.models.components.capabilities import couples

from .coadaptation import Coadaptation, CouplingRecord, coadaptation, record_couplings
from .images import ImageSet, LargeImages

CHUNK = 64
"""Images that pass through a detector at once."""


@dataclass
class Scored:
    """What the detector says of one set.

    Attributes:
        images: The set.
        log_prob: Nats, ``(N,)``.
        bits: Bits per dimension, ``(N,)``.
        score: The detector's raw score, ``(N,)``; higher is more anomalous.
        coadaptation: Of each coupling layer; ``None`` but for couplings of pixels.
        records: What each coupling layer does to the first images; empty but for couplings of pixels.
    """

    images: ImageSet
    log_prob: Tensor
    bits: Tensor
    score: Tensor
    coadaptation: Coadaptation | None
    records: list[CouplingRecord]

    def auroc(self, inside: Scored) -> float:
        """AUROC against the inside set."""
        labels = torch.tensor([0] * len(inside.score) + [1] * len(self.score))
        return auroc(torch.cat([inside.score, self.score]), labels)


@torch.no_grad()
def score(detector: FlowModule, images: ImageSet, advance: Callable[[], None]) -> Scored:
    """Score a set, and record its way through the couplings of a flow on pixels.

    Args:
        detector: In evaluation mode.
        images: The set.
        advance: Called after each of its :func:`chunks`.
    """
    model: Any = detector.model
    log_probs, bits, scores = [], [], []
    for chunk in chunks(images):
        chunk = chunk.to(detector.device)
        if takes_bytes(detector):  # such large images are judged in parts, which are not kept
            found, losses = detector.judged(SimpleNamespace(image=chunk))
            log_prob = -losses * model.dims
        else:
            prepared = model.inputs(chunk)
            log_prob, found = model.log_prob_of(prepared), model.predict(prepared)
        assert found.pred_score is not None  # every detector scores images
        log_probs.append(log_prob.cpu())
        bits.append(model.bits_per_dim(chunk, log_prob=log_prob).cpu().double())
        scores.append(found.pred_score.cpu())
        advance()
    adapted, records = None, []
    if couples(model):
        inputs = images.inputs.to(detector.device)
        adapted = coadaptation(model, inputs)
        with record_couplings(model.flow) as records:
            model.log_prob(inputs[:1])
    return Scored(images, torch.cat(log_probs), torch.cat(bits), torch.cat(scores), adapted, records)


def chunks(images: ImageSet) -> tuple[Tensor, ...] | LargeImages:
    """Return the inputs of a set, those that are scored at once together."""
    return images.inputs.split(CHUNK) if images.large is None else images.large


def all_numbers(detector: Any, scored: list[Scored]) -> dict[str, Any]:
    """Return everything that ``explain.json`` holds."""
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
                "median": float(np.median(log_prob.numpy())),  # of an even number the mean of the two in the middle
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


def table(numbers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the numbers that the page shows: names of columns, and rows."""
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
            mean = entry["coadaptation"]["mean_from_layer_2"]
            row.append("–" if math.isnan(mean) else f"{mean:.2f}")
        rows.append(row)
    return [*header, *(["co-adaptation (mean from layer 2)"] if adapted else [])], rows
