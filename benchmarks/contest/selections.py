# SPDX-License-Identifier: Apache-2.0
"""Which of the rows are compared."""

from __future__ import annotations

import pandas as pd


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of those seeds of a detector that have every task, for means to be over the same tasks."""
    tasks = rows["task"].nunique()
    kept = [some for _, some in rows.groupby(["detector", "seed"], sort=False) if some["task"].nunique() == tasks]
    return pd.concat(kept) if kept else rows
