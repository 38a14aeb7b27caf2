# SPDX-License-Identifier: Apache-2.0
"""Which of the rows belong together."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .plan import PAIR
from .profiles import CYCLE_BOTTLENECK


def values_of(rows: pd.DataFrame, part: str, detector: str, column: str = "auroc") -> pd.Series:
    """A detector's values in a part, one for each seed: means over the tasks."""
    some = rows[(rows["part"] == part) & (rows["detector"] == detector)]
    return some.groupby("seed")[column].mean().dropna()


def by_k(rows: pd.DataFrame) -> pd.DataFrame:
    """The bottleneck study with a column ``k``."""
    some = rows[rows["part"] == "bottleneck"]
    return some.assign(k=some["detector"].str.removeprefix("K = ").astype(int))


def beside(rows: pd.DataFrame, part: str, flows: Sequence[str]) -> pd.DataFrame:
    """The rows of a part, and those of the mask study with the same seeds that they are compared with."""
    some = rows[rows["part"] == part]
    compared = (rows["part"] == "mask_time") & rows["detector"].isin(flows) & rows["seed"].isin(some["seed"].unique())
    return pd.concat([rows[compared], some])


def pixel_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """All finished flows on pixels on the pair, with a column ``flow``: the name in the mask study.

    Without those of the part ``samples``: bits per dimension of smaller images are others.
    """
    some = rows[(rows["task"] == PAIR) & rows["bits_per_dim"].notna() & (rows["part"] != "samples")]
    flow = some["detector"].str.split(", ").str[0]
    return some.assign(flow=flow.where(some["part"] != "bottleneck", CYCLE_BOTTLENECK))
