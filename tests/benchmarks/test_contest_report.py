# SPDX-License-Identifier: Apache-2.0

import pandas as pd
import pytest

from benchmarks.contest import report
from benchmarks.contest.contest import COLUMNS
from benchmarks.contest.detectors import product_variant
from benchmarks.results import append_rows, finished, read_rows


def rows_of(part, task, detector, seed, **values):
    blank = dict.fromkeys(COLUMNS, "")
    return {**blank, "part": part, "task": task, "detector": detector, "seed": seed, **values}


def test_tables_from_a_few_rows(tmp_path):
    cost = {"fit_s": 12.0, "images_per_s": 100.0, "peak_gib": 0.5, "train_images": 600, "test_images": 400}
    rows = [
        rows_of("industrial", "tiles", "FeatureMapFlow", 0, auroc=0.9, fpr95=0.2, aupro=0.8, **cost),
        rows_of("industrial", "tiles", "FeatureMapFlow", 1, auroc=0.94, fpr95=0.1, aupro=0.8, **cost),
        rows_of("industrial", "tiles", "Padim", 0, auroc=0.85, fpr95=0.3, aupro=0.9, **cost),
        rows_of("industrial", "tiles", "Fastflow", 0, auroc=0.8, epochs=12, stopped_by="time", **cost),
        rows_of("industrial", "tiles", "Dfm", 0, error="ValueError: broken"),
        rows_of("ablation", "tiles", "layout_dims=0", 0, auroc=0.7, aupro=0.6, **cost),
        rows_of("ablation", "tiles", product_variant("channel", "K = 32", "blocks.6").name, 0, auroc=0.71, aupro=0.61),
        rows_of("ablation", "tiles", product_variant("channel", "mlp", "blocks.6").name, 0, auroc=0.72, aupro=0.62),
    ]
    for number in range(4):
        value = 0.5 + 0.1 * number
        for name in ("EmbeddingFlow", "KNN"):
            better = 0.05 * (name == "EmbeddingFlow")
            task = f"mnist class {number}"
            rows.append(rows_of("one_class", task, name, 0, auroc=value + better, **cost))
            rows.append(rows_of("cross", f"{task} -> fashion_mnist", name, 0, auroc=value, **cost))
        rows.append(rows_of("left_out", f"mnist without class {number}", "PPCA", 0, auroc=value, **cost))
    append_rows(tmp_path, rows, COLUMNS)
    text = report.tables(read_rows(tmp_path))
    assert "mnist, mean over 4 tasks:" in text
    assert "| PPCA | 0.650 |" in text
    assert "| FeatureMapFlow | **0.920 ± 0.028** | **0.150** |" in text
    assert "| Padim | 0.850 | 0.300 | – | 0.900 |" in text
    assert "Fastflow: 12.0 epochs, stopped by: 1 × time." in text
    assert "Failed: Dfm on tiles." in text
    assert "| EmbeddingFlow | **0.700** | **0.650** | **0.750** |" in text  # all, even, odd classes
    assert "| KNN | 0.650 | 0.600 | 0.700 |" in text
    assert "mnist, 1 class → fashion" in text
    assert "| layout_dims=0 | 0.700 |" in text
    assert "mask=channel" not in text
    assert "| channel | – | 0.710 / 0.610 | 0.720 / 0.620 |" in text
    assert max(map(len, text.splitlines())) <= 100
    report.write(tmp_path, tmp_path / "into")
    assert (tmp_path / "into/cost.png").stat().st_size > 5000


def test_a_picture_outlives_its_maps(tmp_path):
    cost = {"fit_s": 12.0, "train_images": 600, "test_images": 400}
    append_rows(tmp_path, [rows_of("industrial", "tiles", "Padim", 0, auroc=0.8, **cost)], COLUMNS)
    into = tmp_path / "into"
    into.mkdir()
    (into / "README.md").write_text("<!-- contest: begin -->\n<!-- contest: end -->\n", encoding="utf-8")
    report.write(tmp_path, into)
    assert "maps.png" not in (into / "README.md").read_text(encoding="utf-8")
    (into / "maps.png").write_bytes(b"drawn elsewhere")
    report.write(tmp_path, into)
    assert "![tiles: images, ground truth, maps](maps.png)" in (into / "README.md").read_text(encoding="utf-8")
    assert (into / "maps.png").read_bytes() == b"drawn elsewhere"


def test_no_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rows"):
        report.write(tmp_path)
    assert finished(tmp_path) == set()
    assert isinstance(read_rows(tmp_path), pd.DataFrame)
