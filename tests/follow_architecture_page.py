# SPDX-License-Identifier: Apache-2.0
"""What test_architecture_page.py runs in another process, where the package of docs/architecture.md is imported."""

import pytest
import torch

from anomalib_flowood import PixelFlow

SMALL = {"image_size": (6, 6), "channels": 1, "coupling_layers": 2, "hidden_channels": 4, "bottleneck_dim": 2}


@pytest.mark.parametrize("added", [{"mask": "vertical"}, {"subnet": "separable"}])
def test_a_mask_and_a_network_in_a_flow_on_pixels(added):
    detector = PixelFlow(**SMALL, **added)
    assert f"``{next(iter(added.values()))}``" in PixelFlow.__doc__
    images = torch.rand(3, 3, 6, 6)
    assert detector.model.log_prob(images).shape == (3,)
    detector.model.log_prob(images).sum().backward()
