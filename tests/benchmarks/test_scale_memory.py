# SPDX-License-Identifier: Apache-2.0
import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from benchmarks.scale import memory
from benchmarks.scale.memory import Row


@pytest.mark.parametrize(("kind", "name"), memory.FITS)
def test_a_fit_says_what_it_took(kind, name, tmp_path):
    if kind == memory.FILES:
        memory.write_images(tmp_path / "good", 60)
    row = memory.fit(kind, name, 60, tmp_path)
    assert row[:3] == (kind, name, 60)
    assert row.seconds > 0
    assert 0 <= row.gib < 1


def test_slope_table_and_plot(tmp_path):
    rows = [Row("files", "A", n, 5 + 2e-3 * n, n * 1e-5) for n in (1_000, 100_000, 1_000_000)]
    rows.append(Row("embeddings", "B", 1_000, 1.0, 3.5))
    assert memory.slope(rows[:3]) == pytest.approx(1, abs=0.02)
    assert math.isnan(memory.slope(rows[3:]))
    text = memory.table(rows, "how")
    assert "| A, files | 1,000,000 | 2005.0 | 2.00 | 10.00 | **no** |" in text
    assert "| B, embeddings | 1,000 | 1.0 | 1.00 | 3.50 | **no** |" in text
    path = Path(tmp_path) / "memory.png"
    memory.plot(rows, path)
    assert imread(path).std() > 0
