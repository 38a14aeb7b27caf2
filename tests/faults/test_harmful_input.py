# SPDX-License-Identifier: Apache-2.0
"""Input that is out to harm: refused before it does, with what it is."""

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from anomalib_flowood import EmbeddingFlow, FeatureMapFlow, PixelFlow
from anomalib_flowood.conformal import CONTAMINATION_LEVEL, contamination_p_value
from anomalib_flowood.data.decoding import UnreadableImageError, read_image
from anomalib_flowood.data.idx import read_idx
from anomalib_flowood.models.components import ConformalPostProcessor


def inflating(path, *shape: int, content: int):
    """A file of idx that holds more than its header says."""
    with gzip.open(path, "wb") as file:
        file.write(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape))
        for _ in range(content // 2**20):
            file.write(bytes(2**20))
    return path


def test_an_idx_file_is_read_no_further_than_its_header_says(tmp_path):
    path = inflating(tmp_path / "bomb.gz", 10, 28, 28, content=100 * 2**20)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.gz is damaged: its header announces 7,840 values, it holds more"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_an_idx_file_of_more_than_memory_is_not_begun(tmp_path):
    path = inflating(tmp_path / "huge.gz", 2**31, 28, 28, content=2**20)
    with pytest.raises(ValueError, match=r"huge\.gz announces 1,683,627,180,032 values; up to 4,294,967,296"):
        read_idx(path)


def test_an_image_that_inflates_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    with pytest.raises(UnreadableImageError, match=r"bomb\.png: Image size \(10000 pixels\) exceeds limit"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("detector", "argument", "value", "bound"),
    [
        (PixelFlow, "coupling_layers", 10**7, "at most 1,000"),
        (EmbeddingFlow, "subspace_dim", 10**9, "at most 65,536"),
        (EmbeddingFlow, "modes", 10**6, "at most 65,536"),
        (EmbeddingFlow, "feature_noise", float("nan"), "at most 1,000,000"),
        (FeatureMapFlow, "hidden_channels", 10**9, "at most 65,536"),
        (FeatureMapFlow, "cache_gib", -1, "at least 0"),
        (FeatureMapFlow, "cache_gib", float("nan"), "at most 1,048,576"),
        (FeatureMapFlow, "feature_noise", float("nan"), "at most 1,000,000"),
    ],
)
def test_sizes_that_nobody_means_are_refused_before_anything_is_built(detector, argument, value, bound, monkeypatch):
    timms = timm.create_model

    def without_weights(*args, **kwargs):
        assert torch.empty(0).is_meta  # of which names and sizes are asked
        return timms(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", without_weights)
    with pytest.raises(ValueError, match=f"{argument} must be {bound}, got {value}"):
        detector(**{argument: value})


TAILS = {
    "uniform": lambda rng, shape: rng.uniform(size=shape),
    "normal": lambda rng, shape: rng.normal(size=shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape),
    "two kinds": lambda rng, shape: rng.normal(size=shape) + 4 * (rng.random(shape) < 0.15),
    "Student's t with 3 degrees of freedom": lambda rng, shape: rng.standard_t(3, size=shape),
    "Pareto": lambda rng, shape: rng.pareto(1, size=shape),
}


@pytest.mark.parametrize("tail", TAILS)
def test_clean_calibrations_rarely_look_contaminated(tail):
    rng = np.random.default_rng(0)
    for images in (20, 50, 200):
        scores = torch.from_numpy(TAILS[tail](rng, (500, images)))
        flagged = sum(contamination_p_value(row)[0] < CONTAMINATION_LEVEL for row in scores)
        assert flagged <= 11  # of 5 expected at most: 1 in 90 tests of the kind would have more


def test_far_anomalies_among_validation_images_are_warned_of_once(caplog):
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(np.concatenate([rng.normal(size=380), 12 + rng.normal(size=20)])).float()
    post_processor = ConformalPostProcessor()
    post_processor.calibrate(scores)
    post_processor.calibrate(scores)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert warnings[0].startswith("20 of 400 normal validation images score far above the others")
