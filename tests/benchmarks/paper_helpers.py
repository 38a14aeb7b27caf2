# SPDX-License-Identifier: Apache-2.0

import pandas as pd
from model_helpers import BACKBONE

from benchmarks.paper.fits import COLUMNS
from benchmarks.paper.plan import PAIR, with_bottleneck, with_flatter_logit
from benchmarks.paper.profiles import (
    CHANNEL,
    CHECKERBOARD,
    CYCLE,
    CYCLE_BOTTLENECK,
    EMBEDDING,
    GLOW,
    HORIZONTAL,
    Profile,
)


def small_profile(**budgets):
    tiny = {"image_size": (12, 12), "channels": 1, "coupling_layers": 4, "hidden_channels": 8, "learning_rate": 1e-3}
    flows = {
        CHECKERBOARD: {**tiny, "mask": "checkerboard", "subnet": "resnet", "num_blocks": 1},
        CYCLE_BOTTLENECK: {**tiny, "bottleneck_dim": 3, "max_epochs": 2},
    }
    embedding = {"backbone": BACKBONE, "pre_trained": False, "image_size": (32, 32), "subspace_dim": 8, "max_epochs": 1}
    bottleneck, sampled = flows[CYCLE_BOTTLENECK], {GLOW: {**tiny, "architecture": "glow", "num_blocks": 1}}
    return Profile(
        "small", "cpu", 1, flows, bottleneck, sampled, embedding, budgets, bottleneck_dims=(2,), classes=(0,)
    )


def rows_of(part, detector, values, task=PAIR, **more):
    """A row for each value of AUROC, the seeds counted from 0."""
    common = {"bits_per_dim": 4.0, "bits_per_dim_outside": 3.0, "coadaptation": 0.2, "prediction": 0.4}
    common |= {"bits_per_dim_median": 3.875, "bits_per_dim_outside_median": 2.875}
    common |= {"bits_per_dim_centres": 2.25, "bits_per_dim_outside_centres": 2.5}
    common |= {"fit_s": 10, "wall_s": 20, "epochs": 1, "images_seen": 100, "train_images": 90, "test_images": 40}
    common |= {"machine": "abacus", "finished": "2026-11-01T10:00:00"}
    start = {"part": part, "task": task, "detector": detector, "fpr95": 0.1}
    return [{**start, "seed": seed, "auroc": value, **common, **more} for seed, value in enumerate(values)]


def as_study_would(**changes):
    """Rows in which every claim holds, with some parts changed."""
    parts = {
        "checkerboard": rows_of("mask_time", CHECKERBOARD, [0.02, 0.04], bits_per_dim=2.5),
        "channel": rows_of("mask_time", CHANNEL, [0.03, 0.04], bits_per_dim=2.6),
        "glow": rows_of("mask_time", GLOW, [0.1, 0.12], bits_per_dim=2.7),
        "horizontal": rows_of("mask_time", HORIZONTAL, [0.2, 0.22], coadaptation=0.5, bits_per_dim=2.8),
        "cycle": rows_of("mask_time", CYCLE, [0.5, 0.52], coadaptation=0.2, bits_per_dim=3.0),
        "bottleneck": rows_of("mask_time", CYCLE_BOTTLENECK, [0.8, 0.84], bits_per_dim=4.0),
        "flat": rows_of("logit", with_flatter_logit(CYCLE_BOTTLENECK), [0.85], bits_per_dim=4.2),
        "squeezed channel": rows_of("multi_scale", with_bottleneck(CHANNEL), [0.7], bits_per_dim=3.2),
        "squeezed glow": rows_of("multi_scale", with_bottleneck(GLOW), [0.7], bits_per_dim=3.2),
        "small": rows_of("samples", GLOW, [0.1], bits_per_dim=9.0),
        "k2": rows_of("bottleneck", "K = 2", [0.91, 0.93], bits_per_dim=4.5),
        "k100": rows_of("bottleneck", "K = 100", [0.7, 0.72], bits_per_dim=3.5),
        "embedding": rows_of("embedding", EMBEDDING, [0.98, 0.99], bits_per_dim=None),
    }
    for name, value in ((CHECKERBOARD, 0.5), (CYCLE_BOTTLENECK, 0.7), (EMBEDDING, 0.9)):
        for number, offset in enumerate((-0.1, 0.1)):
            task = f"fashion_mnist class {number}"
            parts[f"{name} {number}"] = rows_of("one_class", name, [value + offset], task)
    parts |= changes
    return pd.DataFrame([row for rows in parts.values() for row in rows], columns=list(COLUMNS))
