# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn.functional import interpolate

from anomalib_flowood.models.feature_map_flow.shown_map import ShownMap


@pytest.mark.parametrize(
    ("sizes", "shares", "image_size"),
    [
        ([(5, 7), (3, 4)], [1, 1], (40, 56)),
        ([(28, 28)], [1], (230, 250)),
        ([(9, 3), (9, 3), (2, 1)], [1, 0.5, 1], (65, 31)),
    ],
)
def test_up_samples_as_bicubic_interpolation_does(sizes, shares, image_size):
    maps = [torch.randn(2, *size) for size in sizes]
    total = sum(share * height for (height, _), share in zip(sizes, shares, strict=True))
    weighted = [part[:, None] * (share * len(part[0]) / total) for part, share in zip(maps, shares, strict=True)]
    expected = sum(interpolate(part, image_size, mode="bicubic", align_corners=False) for part in weighted)
    torch.testing.assert_close(ShownMap(sizes, shares, image_size)(maps), expected, rtol=1e-4, atol=1e-5)


def test_saves_nothing_and_keeps_its_precision():
    shown = ShownMap([(4, 4)], [1], (32, 32))
    assert not shown.state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert shown([torch.randn(1, 4, 4)]).dtype == torch.float32
