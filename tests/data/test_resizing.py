# SPDX-License-Identifier: Apache-2.0
"""Large images are resized in strips, to the same numbers as in one piece."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, Resize

from anomalib_flowood.data import PathDataset, datasets, resizing
from anomalib_flowood.data.resizing import is_antialiased, resize_bytes
from anomalib_flowood.inference.images import resized


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 3, 700, 500), (96, 80)),
        ((2, 1, 301, 77), (40, 50)),
        ((1, 3, 60, 70), (61, 200)),
        ((1, 3, 300, 80), (96, 80)),
        ((1, 3, 96, 300), (96, 80)),
        ((1, 1, 9, 7), (9, 7)),
    ],
)
def test_strips_give_what_the_whole_gives(shape, size, monkeypatch):
    monkeypatch.setattr(resizing, "_STRIP", 20_000)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    want = Resize(size, antialias=True)(images.float() / 255)
    assert torch.equal(resize_bytes(images, size), want)
    assert np.array_equal(resized(images[0].numpy(), size), want[0].expand(3, -1, -1).numpy())


def test_other_resizes_are_told_apart():
    assert is_antialiased(Resize((4, 5)))
    others = (Resize(4), Resize((4, 5), antialias=False), Resize((4, 5), interpolation=InterpolationMode.NEAREST))
    assert not any(map(is_antialiased, (*others, None)))


@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_read_in_strips(tmp_path, monkeypatch, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 150, channels), dtype=np.uint8).squeeze()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    want = PathDataset(tmp_path, resize=Resize((32, 40), antialias=True))[0].image
    floats = []
    plain = resizing.in_unit_range
    monkeypatch.setattr(resizing, "in_unit_range", lambda strip: (floats.append(strip.numel()), plain(strip))[1])
    monkeypatch.setattr(datasets, "_LARGE", 1000)
    monkeypatch.setattr(resizing, "_STRIP", 5000)
    assert torch.equal(PathDataset(tmp_path, resize=Resize((32, 40), antialias=True))[0].image, want)
    assert sum(floats) == pixels.size
    assert max(floats) <= 5000
