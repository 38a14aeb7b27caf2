# SPDX-License-Identifier: Apache-2.0
"""What is trained on what, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anomalib.data import AnomalibDataModule

from anomalib_flowood import CrossDataset, EmbeddingFlow, OneClass, PixelFlow

from .profiles import (
    CHECKERBOARD,
    CYCLE_BOTTLENECK,
    EMBEDDING,
    FLATTER_ALPHA,
    LOGIT_FLOWS,
    MULTI_SCALE,
    MULTI_SCALE_K,
    PARTS,
    Budget,
    Profile,
)

INSIDE, OUTSIDE = "fashion_mnist", "mnist"
PAIR = f"{INSIDE} -> {OUTSIDE}"


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

    @property
    def of_pixels(self) -> bool:
        """Whether the detector is a flow on pixels: it has the part's budget, and more is measured of it."""
        return self.detector != EMBEDDING

    def build(self) -> PixelFlow | EmbeddingFlow:
        """Build the detector, with nothing around it that alters raw scores."""
        around: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
        kind = PixelFlow if self.of_pixels else EmbeddingFlow
        return kind(**self.arguments, **around)

    def data(self, root: str) -> AnomalibDataModule:
        """Make the data module, its images the same for every seed."""
        common: dict[str, Any] = {
            "root": root,
            "train_limit": self.budget.train_limit,
            "test_limit": self.budget.test_limit,
            # The embeddings' flow is not part of the comparison of masks: it keeps its own batches.
            **({"train_batch_size": self.budget.batch_size} if self.of_pixels else {}),
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
