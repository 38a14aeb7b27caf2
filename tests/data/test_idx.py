# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from data_helpers import idx_bytes, write_idx

from anomalib_flowood.data import sources
from anomalib_flowood.data.idx import read_idx
from anomalib_flowood.data.sources import find_sources


def source(data_set: str | Path, root: Path, held_out: float = 0.2, seed: int = 0) -> sources.Source:
    return find_sources([data_set], root, [held_out], seed)[0]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_idx_folder(tmp_path: Path, zipped: bool, labels: bool) -> None:
    folder = write_idx(tmp_path / "clothes", zipped=zipped, labels=labels)
    train = source(folder, tmp_path).read("train")
    assert train.pixels is not None
    assert train.pixels.shape == (20, 1, 8, 8)
    assert train.pixels[:, 0, 0, 0].tolist() == list(range(20))
    assert train.paths[12] == "clothes/train/clothes_00012.png"
    if labels:
        assert train.classes is not None
        assert train.classes[:3].tolist() == ["0", "1", "0"]
    else:
        assert train.classes is None
    assert len(source(folder, tmp_path).read("test")) == 10


def test_idx_names_with_a_dot(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "clothes", zipped=False)
    for file in list(folder.iterdir()):
        file.rename(folder / file.name.replace("-idx", ".idx"))
    assert len(source(folder, tmp_path).read("train")) == 20


def test_idx_folder_without_test_images_is_divided(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "clothes")
    for file in folder.glob("t10k*"):
        file.unlink()
    train, test = (source(folder, tmp_path).read(split) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)
    assert not set(train.paths) & set(test.paths)
    # A data set that is tested alone gives all of its images.
    assert len(source(folder, tmp_path, held_out=1.0).read("test")) == 20


def test_idx_cut_short(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "clothes") / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=f"Cannot read {path}"):
        source(path.parent, tmp_path).read("train")
    path.write_bytes(gzip.compress(idx_bytes(np.zeros((3, 8, 8)))[:-5]))
    with pytest.raises(ValueError, match=f"{path} is damaged: its header announces 192 values, it holds 187"):
        source(path.parent, tmp_path).read("train")


@pytest.mark.parametrize(
    "content", [b"", b"\x00\x00", b"\x00\x00\x0d\x01\x00\x00\x00\x01aaaa", b"\x00\x00\x08\x03\x00"]
)
def test_idx_with_a_bad_magic_number(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not an idx file"):
        read_idx(path)


def test_idx_that_is_not_gzip(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(b"plain text")
    with pytest.raises(ValueError, match=f"Cannot read {path}"):
        read_idx(path)


def test_idx_labels_that_do_not_match(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "clothes", zipped=False)
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(np.zeros(7)))
    with pytest.raises(ValueError, match=f"{path} should hold 20 labels"):
        source(folder, tmp_path).read("train")


def test_idx_images_that_are_labels(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "clothes", zipped=False)
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(np.zeros(7)))
    with pytest.raises(ValueError, match=rf"{path} should hold images .*\(7,\)"):
        source(folder, tmp_path).read("train")
