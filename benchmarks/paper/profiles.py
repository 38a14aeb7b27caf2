# SPDX-License-Identifier: Apache-2.0
"""Which flows the study trains, and how long and on how much: a profile for two cores, and the published settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from anomalib_flowood import flows

PARTS = ("mask_time", "mask_epochs", "logit", "bottleneck", "multi_scale", "samples", "embedding", "one_class")
BOTTLENECK_DIMS = (2, 5, 10, 20, 50, 100)

PAPERS_ALPHA = 0.05
"""Alpha of the logit in Dinh et al. (2017), and so in the paper."""
FLATTER_ALPHA = flows.LOGIT_ALPHA
"""The package's own."""

CHECKERBOARD, CHANNEL, GLOW = "checkerboard", "channel (RealNVP)", "Glow"
HORIZONTAL, CYCLE, CYCLE_BOTTLENECK = "horizontal", "cycle", "cycle + bottleneck"
FLOWS = (CHECKERBOARD, CHANNEL, GLOW, HORIZONTAL, CYCLE, CYCLE_BOTTLENECK)
"""The flows on pixels of the mask study."""
EMBEDDING = "EmbeddingFlow"
LOGIT_FLOWS = (CHECKERBOARD, CYCLE, CYCLE_BOTTLENECK)
"""Flows that are trained with both logits."""
MULTI_SCALE = (CHANNEL, GLOW)
"""Flows that are trained with bottlenecks for networks, too, and whose samples are shown."""
MULTI_SCALE_K = 50
"""Numbers that pass these bottlenecks."""


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
