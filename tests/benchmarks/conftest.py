# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    """Grey noise; the broken ones have a bright square."""
    rng = np.random.default_rng(0)
    root = tmp_path / "plates"
    for place, count in {"train/good": 24, "test/good": 5, "test/spot": 6}.items():
        (root / place).mkdir(parents=True)
        for number in range(count):
            pixels = rng.normal(100, 12, (40, 40, 3))
            mask = np.zeros((40, 40), np.uint8)
            if place == "test/spot":
                corner = 4 + 3 * number
                pixels[corner : corner + 12, corner : corner + 12] += 130
                mask[corner : corner + 12, corner : corner + 12] = 255
                (root / "ground_truth/spot").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / f"ground_truth/spot/{number:03}.png")
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / place / f"{number:03}.jpg")
    return root
