# SPDX-License-Identifier: Apache-2.0
"""What test_architecture_page.py runs in another process, where the package of docs/architecture.md is imported."""

import numpy as np
import pytest
import torch

from anomalib_flowood import OneClass, PixelFlow

SMALL = {"image_size": (6, 6), "channels": 1, "coupling_layers": 2, "hidden_channels": 4, "bottleneck_dim": 2}


@pytest.mark.parametrize("added", [{"mask": "vertical"}, {"subnet": "separable"}])
def test_a_mask_and_a_network_in_a_flow_on_pixels(added):
    detector = PixelFlow(**SMALL, **added)
    images = torch.rand(3, 3, 6, 6)
    assert detector.model.log_prob(images).shape == (3,)
    detector.model.log_prob(images).sum().backward()


def test_a_data_set_by_its_name(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        pixels = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"rings-{split}.npz", pixels=pixels, labels=np.arange(count) % 2)
    data = OneClass("rings", normal_class=1, root=tmp_path, val_split_ratio=0.2)
    data.prepare_data()
    data.setup()
    assert [len(part) for part in (data.train_data, data.val_data, data.test_data)] == [8, 2, 6]
    with pytest.raises(ValueError, match="'rings'"):
        OneClass("ring", normal_class=1, root=tmp_path)
