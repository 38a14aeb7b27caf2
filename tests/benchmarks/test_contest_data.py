# SPDX-License-Identifier: Apache-2.0

import torch
from PIL import Image

from benchmarks.contest.data import HELD_OUT, IndustrialFolder, LeftOut


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
