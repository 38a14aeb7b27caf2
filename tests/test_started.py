# SPDX-License-Identifier: Apache-2.0
"""Of several processes one says what all would, and each what it alone can know."""

import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_flowood import started
from anomalib_flowood.started import is_said_once, rank_zero_ends

DDP = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
DATA, DECODING = "anomalib_flowood.data.datamodules.base", "anomalib_flowood.data.decoding"


@pytest.mark.parametrize(
    ("name", "level", "beside"),
    [
        (DATA, logging.INFO, False),
        (DATA, logging.WARNING, False),
        (DATA, logging.ERROR, True),
        (DECODING, logging.WARNING, True),  # another file may be it
        ("lightning.pytorch.trainer", logging.WARNING, False),
        ("lightning_fabric", logging.INFO, False),
        ("tifffile", logging.WARNING, True),
    ],
)
def test_lines_of_a_started_process(monkeypatch: pytest.MonkeyPatch, name: str, level: int, beside: bool) -> None:
    record = logging.LogRecord(name, level, __file__, 1, "a line", None, None)
    for rank, said in (("0", True), ("1", beside)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert is_said_once(record) == said, rank


def test_rank_zero_that_goes_on_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not rank_zero_ends(60)  # this is it
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not rank_zero_ends(0.1)
    monkeypatch.setattr(started, "_PARENT", -1)  # that one is gone
    assert rank_zero_ends(60)


def test_two_processes_say_once_what_is_and_what_went_wrong(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    flow = ["--model", "PixelFlow", "--model.image_size", "[8,8]", "--model.channels", "1", "--model.max_epochs", "1"]
    data = ["--data", str(tmp_path), "--data.memory_limit_mib", "0"]  # so that they are read when the training is on
    content = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(content[: len(content) // 2])
    code = "from anomalib_flowood.cli import main; main()"
    (tmp_path / "main.py").write_text(code, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "main.py"), "train", *flow, *data, *DDP]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "1000",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path
    )
    said = Counter(re.findall("(?:INFO|WARNING|ERROR) .*", done.stderr))
    assert any("images to fit to" in line for line in said)
    assert [line for line, count in said.items() if count > 1] == []
    assert "Traceback" not in done.stderr
    assert done.stderr.count("flowood: Cannot read the image") == 1
    assert done.returncode in {1, -9}  # the latter where it was not rank 0 that met it, and Lightning killed that one
