# SPDX-License-Identifier: Apache-2.0
"""What pages and configuration files say of defaults is what the code has."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from anomalib_flowood import models
from anomalib_flowood.models.feature_map_flow import nearest_patches
from anomalib_flowood.models.feature_map_flow.extraction import MAP_STRIDES, SCORE_STRIDES

ROOT = Path(__file__).parents[1]
README = (ROOT / "anomalib_flowood/models/feature_map_flow/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/model").glob("*.yaml")), ids=lambda path: path.stem)
def test_files_of_detectors_hold_their_defaults(path):
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    parameters = inspect.signature(getattr(models, model["class_path"].rpartition(".")[2])).parameters
    for name, value in model["init_args"].items():
        default = parameters[name].default
        assert value == (list(default) if isinstance(default, tuple) else default), name


def test_layers_are_chosen_by_the_strides_that_are_named():
    strides = {"map_layers": [*MAP_STRIDES], "score_layers": [*SCORE_STRIDES]}
    text = (ROOT / "configs/model/feature_map_flow.yaml").read_text(encoding="utf-8")
    for name, chosen in strides.items():
        (said,) = re.findall(rf"null: the last of (.*)\.\n    {name}: null", text)
        assert [*map(int, re.findall(r"\d+", said))] == chosen
        (said,) = re.findall(rf"^\| `{name}` \| (\d[^|]*) \|", README, re.MULTILINE)
        assert [*map(int, re.findall(r"\d+", said))] == chosen


def test_memory_banks_are_chosen_among_as_many_positions_as_is_said():
    tried = (ROOT / "docs/tried.md").read_text(encoding="utf-8")
    said = re.findall(r"out of ([\d,]+) positions that are drawn|chosen among ([\d,]+) positions", README)
    said += re.findall(r"A fit chooses of ([\d,]+) positions()|What is built draws ([\d,]+) of either", tried)
    assert len(said) == 3
    assert {"".join(one) for one in said} == {f"{nearest_patches._CANDIDATES:,}"}
