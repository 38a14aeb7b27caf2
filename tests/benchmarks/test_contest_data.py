# SPDX-License-Identifier: Apache-2.0
import itertools
from types import SimpleNamespace

import torch
from anomalib.data import AnomalibDataset
from PIL import Image
from torchvision.transforms import v2

from benchmarks.contest import reading
from benchmarks.contest.data import HELD_OUT, IndustrialFolder, LeftOut
from benchmarks.contest.reading import reading_once


def test_the_class_that_is_left_out_is_the_anomalous_one(tmp_path):
    for value, name in enumerate(("ant", "bee", "cat")):
        for split, count in (("train", 6), ("test", 4)):
            folder = tmp_path / "animals" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8), 100 * value + number).save(folder / f"{number}.png")
    data = LeftOut(str(tmp_path / "animals"), 1, val_split_ratio=0.25, test_limit=3)
    data.prepare_data()
    data.setup()
    values = [int(item.image[0, 0, 0] * 255) // 100 for part in (data.train_data, data.val_data) for item in part]
    assert sorted(values) == [0] * 6 + [2] * 6
    batch = next(iter(data.test_dataloader()))
    bee = (batch.image[:, 0, 0, 0] * 255).round() // 100 == 1
    assert torch.equal(batch.gt_label, bee)
    assert batch.gt_label.sum() == 3
    assert len(batch.gt_label) == 6


def test_the_test_images_are_never_used_to_validate(folder):
    data = IndustrialFolder(folder.parent, folder.name, **HELD_OUT)
    data.setup()
    assert len(data.train_data) + len(data.val_data) == 24
    assert all("/train/good/" in path for path in data.val_data.samples["image_path"])
    assert len(data.test_data) == 11


def test_images_are_read_once_for_each_size(folder, monkeypatch):
    read = []
    plain = AnomalibDataset.__getitem__
    monkeypatch.setattr(AnomalibDataset, "__getitem__", lambda self, index: read.append(index) or plain(self, index))
    monkeypatch.setattr(reading, "time", SimpleNamespace(perf_counter=itertools.count().__next__))  # a second an image

    def folders(size):
        data = IndustrialFolder(folder.parent, folder.name, **HELD_OUT)
        data.setup()
        for part in (data.train_data, data.test_data):
            part.augmentations = v2.Resize((size, size))
        return data.train_data, data.test_data

    with reading_once() as reader:
        for size in (32, 32, 24):
            train, test = folders(size)
            batch = test.collate_fn([test[place] for place in range(len(test))])
            for place in range(len(train)):
                train[place]
        assert batch.image.shape == (11, 3, 24, 24)
        assert batch.gt_mask.shape == (11, 24, 24)
        assert len(read) == 2 * (22 + 11)
        assert reader.seconds_per_image == 1
        assert reader.saved == 33
        again = folders(32)[1]
        item = again[3]
        before = len(read)
        again.augmentations = v2.RandomHorizontalFlip()
        again[3]
        again[3]
        assert len(read) == before + 2  # what differs every time is read every time
    again.augmentations = v2.Resize((32, 32))
    plain_item = again[3]
    assert torch.equal(item.image, plain_item.image)
    assert torch.equal(item.gt_mask, plain_item.gt_mask)
    assert type(item.image) is type(plain_item.image)
    assert item.image_path == plain_item.image_path


def test_few_images_are_drawn(folder):
    def drawn(**arguments):
        data = IndustrialFolder(folder.parent, folder.name, **HELD_OUT, **arguments)
        data.setup()
        return [set(part.samples["image_path"]) for part in (data.train_data, data.val_data, data.test_data)]

    train, held_out, test = drawn(drawn=10, draw=1)
    assert (len(train), len(held_out), len(test)) == (9, 1, 11)
    assert drawn(drawn=10, draw=1)[0] == train
    assert drawn(drawn=10, draw=2)[0] != train
    assert len(drawn(drawn=100)[0]) == 22
