# SPDX-License-Identifier: Apache-2.0
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import anomalib_flowood
from anomalib_flowood.checks import refuse_infinite, refuse_nan


@pytest.mark.parametrize("scores", [torch.tensor([[0.0, math.nan], [math.inf, math.nan]]), np.array([1, np.nan] * 2)])
def test_nan_scores_are_refused(scores):
    with pytest.raises(ValueError, match=r"^2 of 4 scores are NaN: they cannot be ranked\. Has the training diverged"):
        refuse_nan(scores)
    with pytest.raises(ValueError, match=r"2 of 4 rows are NaN: they cannot be ranked, the first of image 1\. Has"):
        refuse_nan(scores, "rows", lambda row: f"image {row}")


@pytest.mark.parametrize(
    "scores", [torch.tensor([math.inf, -math.inf]), torch.empty(0), torch.arange(3), np.zeros((2, 0))]
)
def test_other_scores_are_not(scores):
    refuse_nan(scores)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_are_counted_and_not_values(value):
    values = torch.zeros(4, 3)
    refuse_infinite(values, "training", "statistic", "nothing is fitted")
    values[1], values[2, 1] = value, value
    with pytest.raises(ValueError, match="^2 of 4 training images have a NaN or infinite statistic, so nothing is fit"):
        refuse_infinite(values, "training", "statistic", "nothing is fitted")


def test_scores_are_refused_in_one_place():
    """Whoever refuses NaN scores says so by :mod:`anomalib_flowood.checks`."""
    package = Path(anomalib_flowood.__file__).parent
    sources = {path.relative_to(package): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    words = re.compile(r"scores? (?:are|is|was) NaN: |have a NaN or infinite|NaN and cannot be ranked")
    messages = [str(path) for path, text in sources.items() if words.search(text)]
    assert messages == ["checks.py"]
