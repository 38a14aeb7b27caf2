# SPDX-License-Identifier: Apache-2.0
"""From names and arguments to objects."""

import pytest
from benchmark_helpers import DFM

from anomalib_flowood.benchmark import build, find_class


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("model", "PixelFlow", "anomalib_flowood.models"),
        ("model", "pixel_flow", "anomalib_flowood.models"),
        ("model", "anomalib_flowood.PixelFlow", "anomalib_flowood.models"),
        ("model", "Padim", "anomalib.models"),
        ("model", "anomalib.models.Dfm", "anomalib.models"),
        ("data", "CrossDataset", "anomalib_flowood.data"),
        ("data", "cross_dataset", "anomalib_flowood.data"),
        ("data", "anomalib_flowood.data.CrossDataset", "anomalib_flowood.data"),
        ("data", "MVTecAD", "anomalib.data"),
    ],
)
def test_names_of_ours_and_anomalibs(kind: str, name: str, expected: str) -> None:
    assert find_class(kind, name).__module__.startswith(expected)


def test_nested_objects_are_built() -> None:
    model = build("model", DFM)
    assert list(model.pre_processor.transform.size) == [32, 32]
