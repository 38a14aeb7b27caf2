# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from threading import Barrier

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset, Folder, ImageBatch
from anomalib.data.utils.split import random_split, split_by_label
from data_helpers import write_images
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.transforms.v2 import Compose, RandomHorizontalFlip, Resize, Transform

from anomalib_flowood.data import SourcedDataset
from anomalib_flowood.data.datasets import collate
from anomalib_flowood.data.images import Images


def array(name: str = "clothes", count: int = 12, channels: int = 1, size: int = 6) -> Images:
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, channels, size, size).contiguous()
    return Images(name, [f"{name}/test/{i:05d}.png" for i in range(count)], pixels=pixels)


def files(folder: Path) -> Images:
    return Images(folder.name, sorted(str(path) for path in folder.rglob("*.png")))


# --- fetching


def test_batch_and_items_agree(tmp_path: Path) -> None:
    for images in (array(), array(channels=3), files(write_images(tmp_path / "a", 12, (6, 6)))):
        data = SourcedDataset(images, 1, "test", augmentations=Resize([9, 9]))
        batch = data.__getitems__([5, 0, 11])
        assert isinstance(batch, ImageBatch)
        assert batch.image.shape == (3, 3, 9, 9)
        assert batch.image.dtype == torch.float32
        assert batch.image.is_contiguous()
        assert batch.gt_label.tolist() == [True] * 3
        for item, index in zip(batch, (5, 0, 11), strict=True):
            assert torch.allclose(data[index].image, item.image, atol=1e-6)
            assert data[index].image_path == item.image_path
            assert data[index].source == item.source == images.name
    assert data[-1].image_path == data[11].image_path
    with pytest.raises(IndexError):
        data[12]


def test_files_are_read_at_the_same_time_and_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = files(write_images(tmp_path / "a", 6, (6, 8)))
    indices = [5, 0, 3, 4]
    one_by_one = [SourcedDataset(images, 0, "train", augmentations=Resize([4, 5]))[index].image for index in indices]
    both, read = Barrier(2, timeout=20), Images.read

    def together(self: Images, rows: np.ndarray) -> torch.Tensor | list[torch.Tensor]:
        both.wait()  # breaks unless two are read at a time
        return read(self, rows)

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(Images, "read", together)
    batch = SourcedDataset(images, 0, "train", augmentations=Resize([4, 5])).__getitems__(indices)
    assert torch.equal(batch.image, torch.stack(one_by_one))


def test_values_lie_between_0_and_1() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    data = SourcedDataset(Images("a", ["0", "1", "2"], pixels=pixels.contiguous()), 0, "train")
    assert data.__getitems__([0, 1, 2]).image[:, :, 0, 0].tolist() == [[v] * 3 for v in (0, pytest.approx(0.2), 1)]


class Spy(Transform):
    """Records the shapes that it is given."""

    def __init__(self, shapes: list) -> None:
        super().__init__()
        self.shapes = shapes

    def transform(self, inpt, params):
        self.shapes.append(tuple(inpt.shape))
        return inpt


class SpyResize(Resize):
    shapes: list = []  # noqa: RUF012

    def transform(self, inpt, params):
        SpyResize.shapes.append(tuple(inpt.shape))
        return super().transform(inpt, params)


def test_a_plain_resize_sees_the_grey_batch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_flowood.data.datasets.Resize", SpyResize)
    SpyResize.shapes = []
    data = SourcedDataset(array(), 0, "train", augmentations=SpyResize([9, 9]))
    assert data.__getitems__([1, 2, 3]).image.shape == (3, 3, 9, 9)
    assert SpyResize.shapes == [(3, 1, 6, 6)]


def test_other_augmentations_see_each_image_as_anomalib_shows_it() -> None:
    shapes: list = []
    data = SourcedDataset(array(), 0, "train", augmentations=Compose([Compose([Spy(shapes)]), Resize([9, 9])]))
    assert data.__getitems__([1, 2]).image.shape == (2, 3, 9, 9)
    assert shapes == [(3, 6, 6)] * 2


def test_random_augmentations_are_drawn_per_image() -> None:
    ramp = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6).expand(64, 1, 6, 6).contiguous()
    images = Images("a", [str(i) for i in range(64)], pixels=ramp)
    data = SourcedDataset(images, 0, "train", augmentations=Compose([RandomHorizontalFlip(0.5), Resize([6, 6])]))
    flipped = data.__getitems__(range(64)).image[:, 0, 0, 0] > 0
    assert 0 < flipped.sum() < 64


def test_mixed_sizes_need_a_resize(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 1, (6, 8), mode="L")
    write_images(tmp_path / "a" / "b", 2, (10, 8), mode="RGBA")
    data = SourcedDataset(files(tmp_path / "a"), 0, "train", augmentations=Resize([9, 9]))
    assert data.__getitems__([0, 1, 2]).image.shape == (3, 3, 9, 9)
    data.augmentations = None
    message = r"a/000.png has 6 x 8 pixels \(height x width\) and .*a/b/000.png has 10 x 8. .* a Resize"
    with pytest.raises(ValueError, match=message):
        data.__getitems__([0, 1, 2])
    with pytest.raises(ValueError, match=message):
        collate([data[0], data[1]])


def test_mixed_data_sets_need_a_resize() -> None:
    joined = SourcedDataset(array("clothes", size=6), 0, "test") + SourcedDataset(
        array("cars", channels=3, size=8), 1, "test"
    )
    with pytest.raises(ValueError, match=r"clothes/test/00000.png has 6 x 6 .* cars/test/00000.png has 8 x 8"):
        joined.__getitems__([0, 12])
    joined.augmentations = Resize([7, 7])
    batch = joined.__getitems__([13, 0, 12, 1])
    assert batch.source == ["cars", "clothes", "cars", "clothes"]
    assert (batch.image[:, 1, 3, 3] * 255).round().tolist() == [1, 0, 0, 1]


# One worker: PyTorch gives each worker 5 seconds to end after an error.
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_files_are_named_when_they_are_read(tmp_path: Path, workers: int) -> None:
    folder = write_images(tmp_path / "a", 4, (64, 64))
    path = folder / "002.png"
    path.write_bytes(path.read_bytes()[:500])
    data = SourcedDataset(files(folder), 0, "train")
    with pytest.raises(ValueError, match=f"Cannot read the image {path}"):
        list(DataLoader(data, 2, collate_fn=data.collate_fn, num_workers=workers))


@pytest.mark.parametrize(
    "wrap", [lambda data: data, lambda data: Subset(data, range(12)), lambda data: ConcatDataset([data])]
)
def test_data_loaders(wrap: Callable) -> None:
    data = SourcedDataset(array(), 0, "train")
    batches = list(DataLoader(wrap(data), 5, collate_fn=data.collate_fn))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert batches[1].image_path[0] == "clothes/test/00005.png"


# --- as an AnomalibDataset


def test_anomalibs_interface() -> None:
    data = SourcedDataset(array(), np.arange(12) % 2, "test", name="Any", category="some")
    assert isinstance(data, AnomalibDataset)
    assert (data.name, data.category, data.task, len(data)) == ("Any", "some", TaskType.CLASSIFICATION, 12)
    assert data.has_normal
    assert data.has_anomalous
    assert list(data.samples.label[:2]) == ["normal", "abnormal"]
    normal, anomalous = split_by_label(data)
    assert (len(normal), len(anomalous)) == (6, 6)
    assert not normal.has_anomalous
    assert anomalous.__getitems__([0, 1]).image_path == ["clothes/test/00001.png", "clothes/test/00003.png"]
    parts = random_split(data, 0.5, label_aware=True, seed=0)
    assert [len(part) for part in parts] == [6, 6]
    assert parts[0].task == TaskType.CLASSIFICATION


def test_parts_share_the_images() -> None:
    images = array()
    data = SourcedDataset(images, 0, "train")
    part = data.subsample([3, 1])
    assert part._stores[0] is images
    assert copy.deepcopy(data)._stores[0].pixels is images.pixels
    assert [item.image_path for item in (part[0], part[1])] == ["clothes/test/00003.png", "clothes/test/00001.png"]
    joined = part + data.subsample([0])
    assert joined._stores == (images,)
    assert joined.__getitems__([2, 0]).image_path == ["clothes/test/00000.png", "clothes/test/00003.png"]
    with pytest.raises(ValueError, match="No duplicates"):
        data.subsample([1, 1])


def test_what_samples_must_be() -> None:
    data = SourcedDataset(array(), 0, "train")
    data.samples = data.samples[data.samples.row > 9]
    assert len(data) == 2
    with pytest.raises(TypeError, match=r"must be a pandas.DataFrame"):
        data.samples = [1]
    with pytest.raises(ValueError, match="lack the columns source, store, row"):
        data.samples = pd.DataFrame({"image_path": ["a"], "split": ["b"], "label_index": [0]})


def test_only_its_kind_can_be_joined(tmp_path: Path) -> None:
    write_images(tmp_path / "good", 4)
    folder = Folder("a", "good", root=tmp_path, test_split_mode="none", val_split_mode="none")
    folder._setup()
    with pytest.raises(TypeError, match="SourcedDataset and a FolderDataset"):
        SourcedDataset(array(), 0, "train") + folder.train_data
