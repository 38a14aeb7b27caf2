# SPDX-License-Identifier: Apache-2.0
"""One engine works with one detector after another, as it does with anomalib's."""

from itertools import pairwise, permutations

import pytest
import torch
from anomalib.models import Padim
from model_helpers import DETECTORS, data, engine


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder, and detectors by name, anomalib's Padim among them."""
    folder = tmp_path_factory.mktemp("fitted")
    padim = Padim(
        backbone="resnet18",
        layers=["layer1"],
        n_features=20,
        pre_trained=False,
        pre_processor=Padim.configure_pre_processor((32, 32)),
        visualizer=False,
    )
    detectors = {name: new(max_epochs=1) for name, new in DETECTORS.items()} | {"padim": padim}
    for detector in detectors.values():
        engine(folder).fit(detector, datamodule=data(folder))
    return folder, detectors


def walk(names):
    """Names in an order in which each of them once comes directly behind each other one."""
    order = [name for place, first in enumerate(names) for other in names[place + 1 :] for name in (first, other)]
    return [*order, names[0]]


def predict(run, detector, module):
    batches = run.predict(detector, datamodule=module)
    maps = [batch.anomaly_map.flatten() for batch in batches if batch.anomaly_map is not None]
    return torch.cat([batch.pred_score.flatten() for batch in batches] + maps)


def measure(run, detector, module):
    return run.test(detector, datamodule=module, verbose=False)


@pytest.mark.parametrize("use", [predict, measure])
def test_a_detector_says_the_same_behind_another(use, fitted):
    folder, detectors = fitted
    order = walk(list(detectors))
    assert set(pairwise(order)) == set(permutations(detectors, 2))
    alone = {name: use(engine(folder), detector, data(folder)) for name, detector in detectors.items()}
    run, module = engine(folder), data(folder)
    said = [use(run, detectors[name], module) for name in order]
    different = [
        (before, name)
        for before, name, found in zip([None, *order], order, said, strict=False)
        if not (torch.equal(found, alone[name]) if use is predict else found == alone[name])
    ]
    assert different == []
