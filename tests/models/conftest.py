# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from model_helpers import DETECTORS, Case

SMALLER = {"pixel_flow": {}, "embedding_flow": {"coupling_layers": 2}, "feature_map_flow": {"coupling_layers": 2}}


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """Detectors by name, each fitted once and exported once in each way, of which tests change nothing."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = Case(tmp_path_factory.mktemp(name), DETECTORS[name](**SMALLER[name]))
        return made[name]

    return get
