# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from anomalib_flowood.data import SourcedDataset, SourcedImageBatch, SourcedImageItem
from anomalib_flowood.data.datasets import collate
from anomalib_flowood.data.images import Images


def array(name: str = "clothes", count: int = 12, channels: int = 1, size: int = 6) -> Images:
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, channels, size, size).contiguous()
    return Images(name, [f"{name}/test/{i:05d}.png" for i in range(count)], pixels=pixels)


@pytest.fixture
def batch() -> SourcedImageBatch:
    return SourcedDataset(array(), 0, "test", source=[str(i) for i in range(12)]).__getitems__([3, 1, 4])


def test_source_survives_update(batch: SourcedImageBatch) -> None:
    assert batch.update(pred_score=torch.zeros(3)).source == ["3", "1", "4"]
    other = batch.update(in_place=False, pred_score=torch.ones(3))
    assert (type(other), other.source) == (SourcedImageBatch, ["3", "1", "4"])


def test_source_survives_iteration_and_collation(batch: SourcedImageBatch) -> None:
    items = list(batch)
    assert [(type(item), item.source) for item in items] == [(SourcedImageItem, s) for s in "314"]
    again = collate(items)
    assert again.source == batch.source
    assert again.image_path == batch.image_path
    assert torch.equal(again.image, batch.image)
    assert torch.equal(again.gt_label, batch.gt_label)


def test_source_survives_numpy(batch: SourcedImageBatch) -> None:
    assert batch.to_numpy().source == ["3", "1", "4"]
    assert [item.source for item in batch.to_numpy()] == ["3", "1", "4"]
    assert next(iter(batch)).to_numpy().source == "3"


def test_source_survives_pickling(batch: SourcedImageBatch) -> None:
    assert pickle.loads(pickle.dumps(batch)).source == ["3", "1", "4"]


def test_source_survives_the_transfer_to_a_device(batch: SourcedImageBatch) -> None:
    moved = move_data_to_device(batch, torch.device("meta"))
    assert (type(moved), moved.source) == (SourcedImageBatch, ["3", "1", "4"])
    assert moved.image.device.type == moved.gt_label.device.type == "meta"
    assert batch.image.device.type == "cpu"
    same = move_data_to_device(batch, torch.device("cpu"))
    assert torch.equal(same.image, batch.image)


def test_a_batch_without_sources_works() -> None:
    plain = SourcedImageBatch(image=torch.zeros(2, 3, 4, 4))
    assert [item.source for item in plain] == [None, None]
