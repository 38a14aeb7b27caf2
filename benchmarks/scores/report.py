# SPDX-License-Identifier: Apache-2.0
"""Tables, what became of the bars, and a picture, from the stored rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from anomalib_flowood.look import PALETTE
from benchmarks.results import publish, rows_to_report
from benchmarks.tables import markdown, mean_sd, short_number

from .study import BITS, NAMED_BEFORE, SCORES, SETS, outside_sets

HERE = Path(__file__).parent

_ORDER = (BITS, *SCORES)
_MARKERS = "osD^vP"


def write(output: Path, into: Path) -> list[Path]:
    """Write tables and picture.

    Args:
        output: Folder of the rows.
        into: Folder of the README and the picture.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If there are no rows.
    """
    rows = rows_to_report(output)
    into.mkdir(parents=True, exist_ok=True)
    _draw(rows[rows["error"].isna()], into / "scores.png")
    return publish(output, into, "scores", tables(rows), [("scores.png", "AUROC of every score on every pair")])


def tables(rows: pd.DataFrame) -> str:
    """Return everything in Markdown.

    Args:
        rows: As :func:`benchmarks.results.read_rows` gives them.
    """
    good = rows[rows["error"].isna()]
    sections = [_bars(good), *(_auroc_table(good, inside) for inside in SETS), _cost_table(good)]
    return "\n\n".join(filter(None, sections)) + "\n"


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """AUROC, mean over seeds: a row for each score, a column for each pair, as far as there are any."""
    means = rows.pivot_table(index="detector", columns="task", values="auroc", aggfunc="mean")
    scores = [name for name in _ORDER if name in means.index]
    pairs = [pair for inside in SETS for pair in outside_sets(inside) if pair in means.columns]
    return means.loc[scores, pairs]


def _auroc_table(rows: pd.DataFrame, inside: str) -> str:
    means = _means(rows)
    pairs = [pair for pair in outside_sets(inside) if pair in means.columns]
    if not pairs:
        return ""
    lines = []
    for name in means.index:
        some = rows[(rows["detector"] == name) & rows["task"].isin(pairs)]
        cells = []
        for pair in pairs:
            text = mean_sd(some[some["task"] == pair]["auroc"])
            best = round(means.loc[name, pair], 3) == means[pair].round(3).max()
            cells.append(f"**{text}**" if best else text)
        lines.append([name, *cells, f"{means.loc[name, pairs].mean():.3f}"])
    names = [pair.partition(" -> ")[2] + (" †" if pair in NAMED_BEFORE else "") for pair in pairs]
    some = rows[rows["task"].isin(pairs) & (rows["detector"] == "nll")]
    seconds, bits = short_number(some["training_s"]), mean_sd(some.groupby("seed")["bits_per_dim"].first())
    heading = (
        f"### {inside} inside\n\nAUROC; the flow trained for {seconds} s and has {bits} bits per dimension at the "
        "centres of the grey levels, where scores are taken.\n\n"
    )
    return heading + markdown(["score", *names, "mean"], lines)


def _cost_table(rows: pd.DataFrame) -> str:
    some = rows[rows["task"].str.startswith(f"{SETS[0]} ")]
    medians = some.groupby("detector")["ms_per_image"].median()
    lines = []
    for name in [name for name in _ORDER if name in medians.index]:
        mine = some[some["detector"] == name]
        ratio = mine["fit_s"].sum() / mine["pass_s"].sum() if mine["pass_s"].notna().any() else float("nan")
        relative = medians[name] / medians["nll"] if "nll" in medians.index else float("nan")
        fit = [short_number(mine["fit_s"]), f"{ratio:.2f}"] if ratio == ratio else ["–", "–"]
        lines.append([name, f"{medians[name]:.2f}", f"{relative:,.1f}", *fit])
    header = ["score", "ms per image", "relative to nll", "fit s", "fit / one scoring pass"]
    return "### What a score costs\n\n" + markdown(header, lines)


def _bars(rows: pd.DataFrame) -> str:
    """What this project has set itself, and what was measured."""
    means = _means(rows)
    models = means.drop(index=BITS, errors="ignore")
    pairs = [pair for pair in outside_sets(SETS[0])[:3] if pair in means.columns]
    lines = []
    if len(pairs) == 3:
        digits, turned, mirrored = pairs
        best = str(models[digits].idxmax())
        for pair, bar in ((digits, 0.998), (turned, 0.975), (mirrored, 0.975)):
            value = float(models[pair].to_dict()[best])
            lines.append([f"{pair}, {best}: at least {bar}", f"{value:.4f}", _met(value >= bar)])
    if {"density_of_states", "nll"} <= set(means.index) and means.loc[["density_of_states", "nll"]].notna().all(
        axis=None
    ):
        states = means.loc["density_of_states"]
        worst = float((states - means.loc["nll"]).to_numpy().min())
        lines.append(
            ["density_of_states worse than nll by at most 0.01 on every pair", f"{worst:+.3f}", _met(worst >= -0.01)]
        )
        averages = dict(zip(map(str, models.index), models.mean(axis=1).tolist(), strict=True))
        best = max(averages, key=lambda name: averages[name])
        gap = averages["density_of_states"] - averages[best]
        text = f"density_of_states within 0.01 of the best score ({best}), mean over all pairs"
        lines.append([text, f"{gap:+.3f}", _met(gap >= -0.01)])
    return "### Bars\n\n" + markdown(["bar", "measured", ""], lines) if lines else ""


def _met(held: bool) -> str:
    return "met" if held else "**not met**"


def _draw(rows: pd.DataFrame, path: Path) -> None:
    """A line for each score, a point for each pair."""
    means = _means(rows)
    figure = Figure(figsize=(9, 4.6), layout="constrained", dpi=130)
    axes = figure.subplots(1, len(SETS), sharey=True)
    for axis, inside in zip(axes, SETS, strict=True):
        pairs = [pair for pair in outside_sets(inside) if pair in means.columns]
        for place, (pair, colour, marker) in enumerate(zip(pairs, PALETTE, _MARKERS, strict=False)):
            heights = [position + 0.11 * (place - 2.5) for position in range(len(means))]
            axis.scatter(means[pair], heights, s=34, color=colour, marker=marker, label=pair.partition(" -> ")[2])
        axis.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=f"{inside} inside", xlabel="AUROC", xlim=(-0.02, 1.02))
        axis.set_yticks(range(len(means)), list(means.index))
        axis.grid(axis="y", linewidth=0.4)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, loc="lower left", title="outside", title_fontsize=8)
    axes[0].invert_yaxis()
    figure.savefig(path)
