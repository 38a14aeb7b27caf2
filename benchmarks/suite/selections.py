# SPDX-License-Identifier: Apache-2.0
"""Figures of the stored rows: means over folders, distances to the best rival, what a part of a detector brings."""

from __future__ import annotations

import pandas as pd

from benchmarks.contest.detectors import OURS

USUAL_IMAGES = 300
"""Training images of a folder for which a fit's seconds are told."""


def split_tasks(rows: pd.DataFrame) -> pd.DataFrame:
    """Name a folder in ``task``, and in ``together`` the folders whose images were one normal class, if any were.

    The test images of all of these, as one, are a part of their own, ``pooled``.
    """
    names = rows["task"].astype(str).str.extract(r"^(?:(?P<together>.*): )?(?P<folder>.*)$")
    pooled = (rows["part"] == "unified") & names["together"].isna()
    together = names["together"].where(~pooled, names["folder"]).fillna("")
    return rows.assign(part=rows["part"].where(~pooled, "pooled"), task=names["folder"], together=together)


def together_last(rows: pd.DataFrame) -> pd.DataFrame:
    """Of models for several folders those for the most."""
    sizes = rows["together"].str.count(r"\+")
    return rows[rows["together"] == rows["together"].iloc[int(sizes.argmax())]] if len(rows) else rows


def of_part(rows: pd.DataFrame, part: str) -> pd.DataFrame:
    """Rows of one part, without failures; of models for several folders those for the most."""
    some = rows[(rows["part"] == part) & rows["error"].isna()]
    return together_last(some) if part in {"unified", "pooled"} else some


def whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of those seeds of a detector that have every folder, for means to be over the same folders."""
    found = rows.groupby(["detector", "seed"])["task"].transform("nunique")
    return rows[found == rows["task"].nunique()]


def by_folder(rows: pd.DataFrame, metric: str = "auroc") -> pd.DataFrame:
    """Means over seeds, a line for each detector that has every folder and a column for each folder."""
    done = whole(rows)
    return done.groupby(["detector", "task"])[metric].mean().unstack("task")


def is_rival(name: str) -> bool:
    """Whether a detector is neither one of ours nor a variant of one, such as other defaults had, too."""
    return name.partition(" (")[0] not in OURS


def behind_best_rival(table: pd.DataFrame) -> pd.DataFrame:
    """How far each detector is below the best rival on each folder; negative where it is above.

    Args:
        table: As :func:`by_folder` returns it.
    """
    rivals = table[[is_rival(name) for name in table.index]]
    return rivals.max() - table


def gains(rows: pd.DataFrame, detector: str, without: str, metric: str) -> pd.DataFrame:
    """What a part of a detector brings, seed by seed: a line for each folder, a column for each seed.

    Args:
        rows: Those of one part of the suite.
        detector: One that has it.
        without: The same without it.
        metric: A column of the rows.

    Returns:
        Differences, of the seeds that both have, or to the one seed of a detector that has only one.
    """
    pair = [
        rows[rows["detector"] == name].pivot_table(index="task", columns="seed", values=metric)
        for name in (detector, without)
    ]
    if any(table.empty for table in pair):
        return pd.DataFrame()
    ours, others = pair
    if len(others.columns) == 1:
        return ours.sub(others.iloc[:, 0], axis=0).dropna(how="all")
    return (ours - others).dropna(how="all").dropna(axis=1, how="all")


def usual_fit(rows: pd.DataFrame) -> pd.DataFrame:
    """What a fit to about 300 images takes.

    Args:
        rows: Those of the part ``industrial``.

    Returns:
        By detector: seconds (``fit_s``), and how often in that time all images of the fit might have been read and
        shown to the backbone (``passes``). Both are means over the folders whose number of images is nearest to 300.
    """
    images = rows["train_images"].astype(float) + rows["held_out_images"].astype(float)
    away = (images - USUAL_IMAGES).abs()
    some = rows[away == away.min()]
    passes = some["fit_s"] / (images[some.index] * some[["backbone_s", "read_s"]].astype(float).sum(axis=1))
    return some.assign(passes=passes).groupby("detector")[["fit_s", "passes"]].mean()
