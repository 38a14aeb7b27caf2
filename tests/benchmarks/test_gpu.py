# SPDX-License-Identifier: Apache-2.0
import sys

import torch

from benchmarks import gpu
from benchmarks.memory import write_photographs


def test_says_clearly_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "There is no GPU here" in said
    assert "nothing was measured" in said


def test_a_row_of_a_detector_and_one_of_couplings(tmp_path):
    write_photographs(tmp_path / "good", 12, (40, 50))
    row = gpu._detector_row("EmbeddingFlow", "bf16-mixed", "cpu", tmp_path, 1)
    assert row[:2] == ["EmbeddingFlow", "bf16-mixed"]
    assert row[-2:] == ["–", "0e+00"]  # the CPU against itself
    what, ours, theirs, ratio = next(gpu.coupling_rows(torch.device("cpu"), 1))
    assert what.startswith("vectors")
    assert min(map(float, (ours, theirs, ratio))) > 0
