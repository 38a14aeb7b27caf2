# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown and where they are shown, from the stored rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from anomalib_flowood.flows import NOISE_DRAWS
from benchmarks.results import publish, rows_to_report
from benchmarks.tables import Column, markdown, mean_sd, short_number

from .claims import TITLES, claims
from .plan import with_bottleneck, with_flatter_logit
from .plots import draw_bottleneck, draw_likelihood, draw_masks, draw_one_class, draw_samples
from .profiles import CHECKERBOARD, CYCLE_BOTTLENECK, EMBEDDING, FLOWS, LOGIT_FLOWS, MULTI_SCALE, PARTS
from .selections import beside, by_k, pixel_runs

HERE = Path(__file__).parent

_AUROC, _FPR95 = Column("AUROC ↑", "auroc"), Column("FPR95 ↓", "fpr95")
_TRAINING = [
    Column("images seen", "images_seen", short_number),
    Column("epochs", "epochs", short_number),
    Column("training s", "fit_s", short_number),
]
_PIXELS = [
    Column("bits/dim, clothes", "bits_per_dim"),
    Column("median", "bits_per_dim_median"),
    Column("bits/dim, digits", "bits_per_dim_outside"),
    Column("median", "bits_per_dim_outside_median"),
    Column("co-adaptation", "coadaptation"),
    Column("prediction", "prediction"),
]


_VARIANTS = {"logit": (LOGIT_FLOWS, with_flatter_logit), "multi_scale": (MULTI_SCALE, with_bottleneck)}
"""Parts that change one thing about flows of the mask study: which flows, and their names with the change."""


def _table(rows: pd.DataFrame, columns: Sequence[Column], names: Sequence[str], head: str) -> str:
    """A Markdown table with a line for each of the names that has rows."""
    by_name = {name: rows[rows["detector"] == name] for name in names}
    lines = [
        [name, *(column.show(column.values(some)) for column in columns)]
        for name, some in by_name.items()
        if not some.empty
    ]
    return markdown([head, *(column.title for column in columns)], lines)


def _images(rows: pd.DataFrame) -> str:
    """How many images and seeds a part has."""
    train, test = int(rows["train_images"].max()), int(rows["test_images"].max())
    seeds = ", ".join(map(str, sorted(rows["seed"].unique())))
    return f"{train:,} images to train on, {test:,} to test on; seeds {seeds}."


def _section(part: str, rows: pd.DataFrame) -> str:
    some = rows[rows["part"] == part]
    if part in {"mask_time", "mask_epochs", "samples"}:
        table = _table(some, [_AUROC, _FPR95, *_PIXELS, *_TRAINING], FLOWS, "flow")
    elif part in _VARIANTS:
        flows, changed = _VARIANTS[part]
        some = beside(rows, part, flows)
        names = [name for flow in flows for name in (flow, changed(flow))]
        table = _table(some, [_AUROC, _FPR95, *_PIXELS, *_TRAINING], names, "flow")
    elif part == "bottleneck":
        names = [f"K = {k}" for k in sorted(by_k(rows)["k"].unique())]
        table = _table(some, [_AUROC, _FPR95, *_PIXELS, *_TRAINING], names, CYCLE_BOTTLENECK)
    elif part == "embedding":
        both = rows[rows["part"].isin(("embedding", "mask_time"))]
        table = _table(both, [_AUROC, _FPR95, *_TRAINING], (*FLOWS, EMBEDDING), "detector")
    else:
        table = _one_class_table(some)
    return f"### {TITLES[part]}\n\n{_images(some)}\n\n{table}"


def _gap(runs: pd.DataFrame, column: str) -> str:
    """By how much bits per dimension at bin centres are below their average, from the least to the most."""
    gaps = (runs[column] - runs[f"{column}_centres"]).replace([np.inf, -np.inf], np.nan).dropna()
    return f"{gaps.min():.2f} to {gaps.max():.2f}" if len(gaps) else "–"


def _one_class_table(rows: pd.DataFrame) -> str:
    """A line for each class, and below them mean and spread over the classes."""
    names = [name for name in (CHECKERBOARD, CYCLE_BOTTLENECK, EMBEDDING) if name in set(rows["detector"])]
    values = rows.pivot_table(index="task", columns="detector", values="auroc")[names]
    lines = [
        [str(task), *("–" if np.isnan(value) else f"{value:.3f}" for value in row)] for task, row in values.iterrows()
    ]
    lines.append(["**mean ± spread**", *(f"**{mean_sd(values[name])}**" for name in names)])
    return markdown(["AUROC", *names], lines)


def tables(rows: pd.DataFrame) -> str:
    """Return everything in Markdown.

    Args:
        rows: As :func:`benchmarks.results.read_rows` gives them.
    """
    good = rows[rows["error"].isna()]
    texts = []
    if not good.empty:
        dates = sorted(good["finished"].str[:10])
        days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        hours = good["wall_s"].sum() / 3600
        texts.append(
            f"{', '.join(sorted(good['machine'].unique()))}; {days}; {len(good)} fits, {hours:.1f} hours of a worker. "
            "Mean ± standard deviation over the seeds."
        )
        runs = pixel_runs(good)
        if not runs.empty:
            texts.append(
                f"Bits per dimension: −log2 p averaged over {NOISE_DRAWS} draws of the dequantisation's noise; mean "
                "and median over the images. At the centres of the pixels' bins, where the score is taken, the "
                f"mean is lower by {_gap(runs, 'bits_per_dim')} on clothes and by "
                f"{_gap(runs, 'bits_per_dim_outside')} on digits."
            )
    found = claims(good)
    if found:
        texts += [
            "### Claims",
            markdown(
                ["claim", "measured", "held"],
                [[claim.text, claim.measured, "yes" if claim.held else "**no**"] for claim in found],
                numbers=False,
            ),
        ]
    texts += [_section(part, good) for part in PARTS if part in set(good["part"])]
    failed = rows[rows["error"].notna()]
    if len(failed):
        names = sorted({f"{row.part}, {row.detector} on {row.task}" for row in failed.itertuples()})
        texts.append(f"Failed: {'; '.join(names)}.")
    return "\n\n".join(texts) + "\n"


def write(output: Path, into: Path = HERE) -> list[Path]:
    """Rebuild tables and plots.

    Args:
        output: Folder of the rows and samples.
        into: Folder of the plots and a copy of the rows; the tables go between the markers of its README.md, where it
            has one.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If there are no rows.
    """
    rows = rows_to_report(output)
    into.mkdir(parents=True, exist_ok=True)
    good = rows[rows["error"].isna()]
    # Rows travel, samples do not: where they are missing, the picture drawn elsewhere is kept.
    sampled = draw_samples(good, output, into / "samples.png") or (into / "samples.png").is_file()
    drawn = {
        ("masks.png", "AUROC and co-adaptation by mask"): draw_masks(good, into / "masks.png"),
        ("bottleneck.png", "AUROC and bits per dimension over K"): draw_bottleneck(good, into / "bottleneck.png"),
        ("likelihood.png", "bits per dimension against AUROC, every run"): draw_likelihood(
            good, output, into / "likelihood.png"
        ),
        ("samples.png", "samples of RealNVP and Glow below real clothes"): sampled,
        ("one_class.png", "AUROC of one-class tasks"): draw_one_class(good, into / "one_class.png"),
    }
    return publish(output, into, "paper", tables(rows), [names for names, was in drawn.items() if was])
