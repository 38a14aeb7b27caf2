# SPDX-License-Identifier: Apache-2.0

import pytest
from paper_helpers import as_study_would, rows_of

from benchmarks.paper import report
from benchmarks.paper.fits import COLUMNS
from benchmarks.paper.profiles import EMBEDDING, GLOW
from benchmarks.results import append_rows, read_rows


def test_report_writes_tables_and_plots(tmp_path):
    output, into = tmp_path / "out", tmp_path / "into"
    into.mkdir()
    (into / "README.md").write_text("before\n<!-- paper: begin -->\nold\n<!-- paper: end -->\nafter\n")
    for row in as_study_would().to_dict("records"):
        append_rows(output, [row], COLUMNS)
    (failed,) = rows_of("mask_epochs", GLOW, [None], error="X: y")
    append_rows(output, [failed], COLUMNS)
    report.write(output, into)
    text = (into / "README.md").read_text()
    assert text.startswith("before\n<!-- paper: begin -->")
    assert text.endswith("<!-- paper: end -->\nafter\n")
    assert "old" not in text
    assert "| Co-adaptation: horizontal at least twice that of cycle, same subnet | 0.500 ± 0.000 and 0.200" in text
    assert "| horizontal | 0.210 ± 0.014 |" in text
    assert "| fashion_mnist class 1 | 0.600 | 0.800 | 1.000 |" in text
    assert "| **mean ± spread** | **0.500 ± 0.141** | **0.700 ± 0.141** | **0.900 ± 0.141** |" in text
    assert "90 images to train on, 40 to test on; seeds 0, 1." in text
    assert "abacus; 2026-11-01; 28 fits" in text
    assert "lower by 0.25 to 2.25 on clothes and by 0.50 to 0.50 on digits" in text
    assert (
        "| K = 2 | 0.920 ± 0.014 | 0.100 ± 0.000 | 4.500 ± 0.000 | 3.875 ± 0.000 | 3.000 ± 0.000 | 2.875 ± 0.000 |"
        in text
    )
    assert "channel (RealNVP) 0.030 to 0.700, Glow 0.100 to 0.700" in text  # both of the first seed
    assert "| Glow, K = 50 | 0.700 |" in text
    assert "| cycle + bottleneck | 0.800 |" in text  # the first seed's of the mask study
    assert "| cycle + bottleneck, α = 0.25 | 0.850 |" in text
    assert "Failed: mask_epochs, Glow on fashion_mnist -> mnist." in text
    assert "samples.png" not in text  # none on this machine, and none drawn elsewhere
    for name in ("masks", "bottleneck", "likelihood", "one_class"):
        assert (into / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text
    assert read_rows(into).equals(read_rows(output))
    (into / "samples.png").write_bytes(b"drawn elsewhere")
    report.write(output, into)
    assert (into / "samples.png").read_bytes() == b"drawn elsewhere"
    assert "(samples.png)" in (into / "README.md").read_text()


def test_parts_that_have_no_flow_on_the_pair_are_shown_alone(tmp_path):
    rows = [*rows_of("samples", GLOW, [0.1]), *rows_of("embedding", EMBEDDING, [0.9], bits_per_dim=None)]
    append_rows(tmp_path, rows, COLUMNS)
    report.write(tmp_path, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "### Samples" in text
    assert "| EmbeddingFlow | 0.900 |" in text


def test_no_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rows"):
        report.write(tmp_path)
