# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from data_helpers import write_images

from anomalib_flowood.data import sources
from anomalib_flowood.data.sources import find_sources


def source(data_set: str | Path, root: Path, held_out: float = 0.2, seed: int = 0) -> sources.Source:
    return find_sources([data_set], root, [held_out], seed)[0]


def test_memory_rule(tmp_path: Path) -> None:
    images = source(write_images(tmp_path / "a", 20, (64, 64)), tmp_path, held_out=1.0).read("test")
    assert images.in_memory(0).pixels is None
    kept = images.in_memory(1)
    assert kept.pixels is not None
    assert kept.pixels.shape == (20, 3, 64, 64)
    assert torch.equal(kept.pixels[3], images.read(np.array([3]))[0])
    write_images(tmp_path / "a" / "more", 1, (64, 65))
    assert source(tmp_path / "a", tmp_path, held_out=1.0).read("test").in_memory(1024).pixels is None


def test_grey_images_stay_grey_unless_one_has_colours(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 3, mode="L")
    images = source(tmp_path / "a", tmp_path, held_out=1.0).read("test").in_memory(1)
    assert images.pixels is not None
    assert images.pixels.shape == (3, 1, 8, 8)
    write_images(tmp_path / "a" / "colour", 1)
    images = source(tmp_path / "a", tmp_path, held_out=1.0).read("test").in_memory(1)
    assert images.pixels is not None
    assert images.pixels.shape == (4, 3, 8, 8)
