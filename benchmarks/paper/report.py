# SPDX-License-Identifier: Apache-2.0
"""Tables, what became of the paper's claims, and plots, from the stored rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from scipy.stats import spearmanr

from anomalib_flowood.explain.pictures import draw_images
from anomalib_flowood.flows import NOISE_DRAWS
from benchmarks.results import Column, mean_sd, publish, rows_to_report, short_number

from .study import (
    CHANNEL,
    CHECKERBOARD,
    CYCLE,
    CYCLE_BOTTLENECK,
    EMBEDDING,
    GLOW,
    HORIZONTAL,
    LOGIT_FLOWS,
    MULTI_SCALE,
    PAIR,
    PARTS,
    TEMPERATURES,
    sample_path,
    with_bottleneck,
    with_flatter_logit,
)

HERE = Path(__file__).parent

FLOWS = (CHECKERBOARD, CHANNEL, GLOW, HORIZONTAL, CYCLE, CYCLE_BOTTLENECK)
# Okabe and Ito's colours; told apart by every common colour vision.
_COLOURS = dict(
    zip((*FLOWS, EMBEDDING), ("#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#0072B2", "#009E73", "#333333"), strict=True)
)
_MARKERS = dict(zip(FLOWS, "sDPv^o", strict=True))

_TITLES = {
    "mask_time": "Masks at equal training time",
    "mask_epochs": "Masks at equal epochs",
    "logit": "A flatter logit",
    "bottleneck": "The bottleneck",
    "multi_scale": "Bottlenecks in RealNVP and Glow",
    "samples": "Samples",
    "embedding": "Pixels against pretrained features",
    "one_class": "One class of clothes against the other nine",
}


# ---------------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """One claim and what was measured.

    Attributes:
        text: What the paper, or this project's bar, says.
        measured: The numbers.
        held: Whether they agree.
    """

    text: str
    measured: str
    held: bool


def _of(rows: pd.DataFrame, part: str, detector: str, column: str = "auroc") -> pd.Series:
    """A detector's values in a part, one for each seed: means over the tasks."""
    some = rows[(rows["part"] == part) & (rows["detector"] == detector)]
    return some.groupby("seed")[column].mean().dropna()


def _apart(lower: pd.Series, higher: pd.Series) -> bool:
    """Whether one mean exceeds the other by more than the two standard deviations together."""
    spread = sum(float(values.std()) for values in (lower, higher) if len(values) > 1)
    return float(higher.mean() - lower.mean()) > spread


def _order(rows: pd.DataFrame) -> Claim | None:
    names = (CHECKERBOARD, HORIZONTAL, CYCLE_BOTTLENECK)
    values = [_of(rows, "mask_time", name) for name in names]
    if any(some.empty for some in values):
        return None
    held = all(_apart(lower, higher) for lower, higher in pairwise(values))
    text = f"AUROC: {' < '.join(names)}, at equal time, gaps larger than the spreads"
    return Claim(text, " < ".join(map(mean_sd, values)) if held else ", ".join(map(mean_sd, values)), held)


def _plain(rows: pd.DataFrame) -> Claim | None:
    values = {name: _of(rows, "mask_time", name).mean() for name in (CHECKERBOARD, CHANNEL, GLOW)}
    if any(np.isnan(value) for value in values.values()):
        return None
    measured = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    return Claim(
        "Plain flows rate digits as more likely than clothes: AUROC below 0.5",
        measured,
        all(value < 0.5 for value in values.values()),
    )


def _by_k(rows: pd.DataFrame) -> pd.DataFrame:
    """The bottleneck study with a column ``k``."""
    some = rows[rows["part"] == "bottleneck"]
    return some.assign(k=some["detector"].str.removeprefix("K = ").astype(int))


def _beside(rows: pd.DataFrame, part: str, flows: Sequence[str]) -> pd.DataFrame:
    """The rows of a part, and those of the mask study with the same seeds that they are compared with."""
    some = rows[rows["part"] == part]
    compared = (rows["part"] == "mask_time") & rows["detector"].isin(flows) & rows["seed"].isin(some["seed"].unique())
    return pd.concat([rows[compared], some])


def _best_bottleneck(rows: pd.DataFrame) -> Claim | None:
    means = _by_k(rows).groupby("k")["auroc"].mean()
    if means.empty:
        return None
    best = int(means.index[int(means.argmax())])
    text = f"AUROC of {CYCLE_BOTTLENECK}, best K, −log p alone: at least 0.90"
    return Claim(text, f"K = {best}: {mean_sd(_of(rows, 'bottleneck', f'K = {best}'))}", bool(means[best] >= 0.9))


def _coadaptation(rows: pd.DataFrame) -> Claim | None:
    horizontal, cycle = (_of(rows, "mask_time", name, "coadaptation") for name in (HORIZONTAL, CYCLE))
    if horizontal.empty or cycle.empty:
        return None
    return Claim(
        "Co-adaptation: horizontal at least twice that of cycle, same subnet",
        f"{mean_sd(horizontal)} and {mean_sd(cycle)}: {horizontal.mean() / cycle.mean():.2f} times",
        bool(horizontal.mean() >= 2 * cycle.mean()),
    )


def _small_detects(rows: pd.DataFrame) -> Claim | None:
    ks = sorted(_by_k(rows)["k"].unique())
    if len(ks) < 2:
        return None
    small, large = (_of(rows, "bottleneck", f"K = {k}") for k in (ks[0], ks[-1]))
    return Claim(
        "A smaller K detects better",
        f"K = {ks[0]}: {mean_sd(small)}, K = {ks[-1]}: {mean_sd(large)}",
        _apart(large, small),
    )


def _small_costs(rows: pd.DataFrame) -> Claim | None:
    ks = sorted(_by_k(rows)["k"].unique())
    if len(ks) < 2:
        return None
    small, large = (_of(rows, "bottleneck", f"K = {k}", "bits_per_dim") for k in (ks[0], ks[-1]))
    return Claim(
        "A smaller K has the worse likelihood: more bits per dimension",
        f"K = {ks[0]}: {mean_sd(small)}, K = {ks[-1]}: {mean_sd(large)}",
        _apart(large, small),
    )


def pixel_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """All finished flows on pixels on the pair, with a column ``flow``: the name in the mask study.

    Without those of the part ``samples``: bits per dimension of smaller images are others.
    """
    some = rows[(rows["task"] == PAIR) & rows["bits_per_dim"].notna() & (rows["part"] != "samples")]
    flow = some["detector"].str.partition(", ")[0]
    return some.assign(flow=flow.where(some["part"] != "bottleneck", CYCLE_BOTTLENECK))


def _multi_scale(rows: pd.DataFrame) -> Claim | None:
    some = _beside(rows, "multi_scale", MULTI_SCALE)
    means = some.groupby("detector")["auroc"].mean()
    pairs = [(name, means.get(name, np.nan), means.get(with_bottleneck(name), np.nan)) for name in MULTI_SCALE]
    if np.isnan([values for _, *values in pairs]).any():
        return None
    return Claim(
        "Bottlenecks help multi-scale flows, too: a higher AUROC than with their usual networks, at equal time",
        ", ".join(f"{name} {usual:.3f} to {squeezed:.3f}" for name, usual, squeezed in pairs),
        all(usual < squeezed for _, usual, squeezed in pairs),
    )


def _likelihood(rows: pd.DataFrame) -> Claim | None:
    runs = pixel_runs(rows)
    if len(runs) < 3:
        return None
    found = spearmanr(runs["bits_per_dim"], runs["auroc"], alternative="greater")
    return Claim(
        "Better likelihood, worse detection: bits per dimension and AUROC rise together (Spearman, p below 0.05)",
        f"rank correlation {found.statistic:+.2f} over {len(runs)} runs, p = {found.pvalue:.2g}",
        bool(found.pvalue < 0.05),
    )


def _embedding(rows: pd.DataFrame) -> Claim | None:
    ours, runs = _of(rows, "embedding", EMBEDDING), pixel_runs(rows)
    if ours.empty or runs.empty:
        return None
    means = runs.groupby(["part", "detector"])["auroc"].mean()
    part, best = means.index[int(means.argmax())]
    pixels = _of(rows, part, best)
    return Claim(
        "A flow on pretrained features detects better than any on pixels",
        f"{mean_sd(ours)} against {mean_sd(pixels)} ({best}; {_TITLES[part].lower()})",
        _apart(pixels, ours),
    )


def _one_class(rows: pd.DataFrame) -> Claim | None:
    names = (CHECKERBOARD, CYCLE_BOTTLENECK, EMBEDDING)
    values = [_of(rows, "one_class", name).mean() for name in names]
    if any(np.isnan(value) for value in values):
        return None
    return Claim(
        f"One class, mean AUROC over the tasks: {' < '.join(names)}",
        ", ".join(f"{value:.3f}" for value in values),
        values[0] < values[1] < values[2],
    )


_CLAIMS: Sequence[Callable[[pd.DataFrame], Claim | None]] = (
    *(_order, _best_bottleneck, _coadaptation, _plain),
    *(_small_detects, _small_costs, _multi_scale, _likelihood, _embedding, _one_class),
)


def claims(rows: pd.DataFrame) -> list[Claim]:
    """Compare the claims for which there are rows with what was measured.

    Args:
        rows: Rows without failures.
    """
    return [claim for check in _CLAIMS if (claim := check(rows)) is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

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
    lines = [
        f"| {head} | {' | '.join(column.title for column in columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for name in names:
        some = rows[rows["detector"] == name]
        if not some.empty:
            lines.append(f"| {name} | {' | '.join(column.show(column.values(some)) for column in columns)} |")
    return "\n".join(lines)


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
        some = _beside(rows, part, flows)
        names = [name for flow in flows for name in (flow, changed(flow))]
        table = _table(some, [_AUROC, _FPR95, *_PIXELS, *_TRAINING], names, "flow")
    elif part == "bottleneck":
        names = [f"K = {k}" for k in sorted(_by_k(rows)["k"].unique())]
        table = _table(some, [_AUROC, _FPR95, *_PIXELS, *_TRAINING], names, CYCLE_BOTTLENECK)
    elif part == "embedding":
        both = rows[rows["part"].isin(("embedding", "mask_time"))]
        table = _table(both, [_AUROC, _FPR95, *_TRAINING], (*FLOWS, EMBEDDING), "detector")
    else:
        table = _one_class_table(some)
    return f"### {_TITLES[part]}\n\n{_images(some)}\n\n{table}"


def _gap(runs: pd.DataFrame, column: str) -> str:
    """By how much bits per dimension at bin centres are below their average, from the least to the most."""
    gaps = (runs[column] - runs[f"{column}_centres"]).replace([np.inf, -np.inf], np.nan).dropna()
    return f"{gaps.min():.2f} to {gaps.max():.2f}" if len(gaps) else "–"


def _one_class_table(rows: pd.DataFrame) -> str:
    """A line for each class, and below them mean and spread over the classes."""
    names = [name for name in (CHECKERBOARD, CYCLE_BOTTLENECK, EMBEDDING) if name in set(rows["detector"])]
    values = rows.pivot_table(index="task", columns="detector", values="auroc")[names]
    lines = [f"| AUROC | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for task, row in values.iterrows():
        lines.append(f"| {task} | {' | '.join('–' if np.isnan(value) else f'{value:.3f}' for value in row)} |")
    lines.append(f"| **mean ± spread** | {' | '.join(f'**{mean_sd(values[name])}**' for name in names)} |")
    return "\n".join(lines)


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
            "\n".join(
                [
                    "| claim | measured | held |",
                    "| --- | --- | --- |",
                    *(f"| {claim.text} | {claim.measured} | {'yes' if claim.held else '**no**'} |" for claim in found),
                ]
            ),
        ]
    texts += [_section(part, good) for part in PARTS if part in set(good["part"])]
    failed = rows[rows["error"].notna()]
    if len(failed):
        names = sorted({f"{row.part}, {row.detector} on {row.task}" for row in failed.itertuples()})
        texts.append(f"Failed: {'; '.join(names)}.")
    return "\n\n".join(texts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def _spread(axis: Axes, position: float, values: pd.Series, colour: str, marker: str = "o") -> None:
    """A point for each value, and a line at their mean."""
    axis.plot([position] * len(values), values, marker, color=colour, alpha=0.6, markersize=6, linestyle="none")
    axis.plot([position - 0.25, position + 0.25], [values.mean()] * 2, color=colour, linewidth=2)


def draw_masks(rows: pd.DataFrame, path: Path) -> bool:
    """Draw AUROC at equal time and at equal epochs, and co-adaptation, by flow; returns whether there was anything."""
    wanted = [
        ("mask_time", "auroc", "AUROC, equal time"),
        ("mask_epochs", "auroc", "AUROC, equal epochs"),
        ("mask_time", "coadaptation", "co-adaptation, equal time"),
    ]
    panels = [panel for panel in wanted if panel[0] in set(rows["part"])]
    if not panels:
        return False
    figure = Figure(figsize=(3.9 * len(panels), 3.8), layout="constrained")
    for axis, (part, column, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for position, name in enumerate(FLOWS):
            values = _of(rows, part, name, column)
            if not values.empty:
                _spread(axis, position, values, _COLOURS[name])
        axis.set_xticks(range(len(FLOWS)), FLOWS, rotation=35, ha="right", rotation_mode="anchor", fontsize=9)
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        if column == "auroc":
            axis.axhline(0.5, color="0.5", linewidth=0.8, linestyle="--")
    figure.savefig(path, dpi=110)
    return True


def draw_bottleneck(rows: pd.DataFrame, path: Path) -> bool:
    """Draw AUROC and bits per dimension over K (figure 7 of the paper); returns whether there was anything."""
    some = _by_k(rows)
    if some.empty:
        return False
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = (("auroc", "AUROC", CYCLE_BOTTLENECK), ("bits_per_dim", "bits per dimension, clothes", CYCLE))
    for axis, (column, title, colour) in zip(figure.subplots(1, 2), panels, strict=True):
        groups = some.groupby("k")[column]
        axis.errorbar(
            groups.mean().index, groups.mean(), groups.std().fillna(0), marker="o", capsize=3, color=_COLOURS[colour]
        )
        axis.set_xscale("log")
        axis.set_xticks(sorted(some["k"].unique()))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set(xlabel="K, the numbers that pass the bottleneck", ylabel=title)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return True


def draw_likelihood(rows: pd.DataFrame, output: Path, path: Path) -> bool:
    """Draw every run as a point, bits per dimension against AUROC, beside it samples of the extremes.

    The extremes are the run with the fewest bits per dimension and the one with the highest AUROC.

    Returns:
        Whether there was anything to draw.
    """
    runs = pixel_runs(rows)
    runs = runs[np.isfinite(runs["bits_per_dim"])]
    if runs.empty:
        return False
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
    axis = figure.add_subplot(grid[:, 0])
    for name in FLOWS:
        some = runs[runs["flow"] == name]
        axis.plot(
            some["bits_per_dim"], some["auroc"], _MARKERS[name], color=_COLOURS[name], alpha=0.75,
            label=name if len(some) else None,
        )  # fmt: skip
    axis.set(xlabel="bits per dimension of clothes (fewer: better likelihood)", ylabel="AUROC, clothes against digits")
    axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    extremes = {"fewest bits per dimension": runs["bits_per_dim"].idxmin(), "highest AUROC": runs["auroc"].idxmax()}
    for line, (title, index) in enumerate(extremes.items()):
        row = runs.loc[index]
        panel = figure.add_subplot(grid[line, 1])
        panel.set_axis_off()
        what = row["flow"] if row["flow"] == row["detector"] else f"{row['flow']}, {row['detector']}"
        panel.set_title(
            f"samples, {title}:\n{what}\n{row['bits_per_dim']:.2f} bits/dim, AUROC {row['auroc']:.3f}", fontsize=9
        )
        file = sample_path(output, (row["part"], row["task"], row["detector"], int(row["seed"])))
        if file.is_file():
            panel.imshow(_mosaic(np.load(file)["1"]), cmap="gray", vmin=0, vmax=255)
        axis.annotate(
            "", (row["bits_per_dim"], row["auroc"]), (-18, 14 if row["auroc"] < 0.5 else -14),
            textcoords="offset points", arrowprops={"arrowstyle": "->", "lw": 1.0},
        )  # fmt: skip
    figure.savefig(path, dpi=110)
    return True


def _mosaic(images: np.ndarray, columns: int = 8) -> np.ndarray:
    """Images ``(N, H, W)`` in lines of ``columns``, a white line between them."""
    framed = np.pad(images, ((0, -len(images) % columns), (0, 1), (0, 1)), constant_values=255)
    lines = framed.reshape(-1, columns, *framed.shape[1:])
    return np.concatenate([np.concatenate(list(line), axis=1) for line in lines])


def draw_samples(rows: pd.DataFrame, output: Path, path: Path) -> bool:
    """Draw samples of RealNVP and Glow at each temperature below real images; returns whether there was anything.

    They are those of the part ``samples``, or of mask_epochs where the profile has no such part; of the first seed.
    """
    shown: dict[str, np.ndarray] = {}
    for name in (CHANNEL, GLOW):
        for part in ("samples", "mask_epochs"):
            seeds = rows.loc[(rows["part"] == part) & (rows["detector"] == name), "seed"]
            if len(seeds) and (file := sample_path(output, (part, PAIR, name, int(min(seeds))))).is_file():
                images = np.load(file)
                short = "RealNVP" if name == CHANNEL else name
                shown.setdefault("real", images["real"])
                shown |= {f"{short}, T = {value:g}": images[f"{value:g}"] for value in TEMPERATURES}
                break
    if not shown:
        return False
    count = min(map(len, shown.values()))  # a trial has few real ones
    lines = {name: torch.from_numpy(images[:count])[:, None] / 255 for name, images in shown.items()}
    draw_images(lines, [""] * count, path)
    return True


def draw_one_class(rows: pd.DataFrame, path: Path) -> bool:
    """Draw AUROC by class and detector; returns whether there was anything."""
    some = rows[rows["part"] == "one_class"]
    if some.empty:
        return False
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axis = figure.subplots()
    tasks = sorted(some["task"].unique())
    for name, marker in ((CHECKERBOARD, "s"), (CYCLE_BOTTLENECK, "o"), (EMBEDDING, "^")):
        values = some[some["detector"] == name].groupby("task")["auroc"].mean().reindex(tasks)
        axis.plot(range(len(tasks)), values, marker, color=_COLOURS[name], label=name, markersize=7, alpha=0.8)
        axis.axhline(values.mean(), color=_COLOURS[name], linewidth=1, alpha=0.6)
    axis.set_xticks(range(len(tasks)), [task.rpartition(" ")[2] for task in tasks])
    axis.set(xlabel="normal class of FashionMNIST (lines: means)", ylabel="AUROC", ylim=(None, 1.02))
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


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
