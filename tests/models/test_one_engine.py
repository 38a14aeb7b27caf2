# SPDX-License-Identifier: Apache-2.0
"""One engine works with one detector after another, as it does with anomalib's."""

from itertools import permutations

import pytest
import torch
from anomalib.models import Padim
from model_helpers import DETECTORS, data, engine


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Detectors by name, anomalib's Padim among them, and what each predicts in an engine of its own."""
    folder = tmp_path_factory.mktemp("fitted")
    padim = Padim(backbone="resnet18", layers=["layer1"], n_features=20, pre_trained=False, visualizer=False)
    detectors = {name: new(max_epochs=1) for name, new in DETECTORS.items()} | {"padim": padim}
    predicted = {}
    for name, detector in detectors.items():
        engine(folder / name).fit(detector, datamodule=data(folder))
        predicted[name] = predict(engine(folder), detector, folder)
    return folder, detectors, predicted


def predict(run, detector, folder):
    batches = run.predict(detector, datamodule=data(folder, test_limit=10))
    maps = [batch.anomaly_map.flatten() for batch in batches if batch.anomaly_map is not None]
    return torch.cat([batch.pred_score.flatten() for batch in batches] + maps)


@pytest.mark.parametrize(("first", "second"), permutations((*DETECTORS, "padim"), 2))
def test_a_detector_predicts_the_same_behind_another(first, second, fitted):
    folder, detectors, predicted = fitted
    run = engine(folder)
    for name in (first, second, first):
        assert torch.equal(predict(run, detectors[name], folder), predicted[name])


@pytest.mark.parametrize(("first", "second"), permutations((*DETECTORS, "padim"), 2))
def test_a_detector_is_tested_the_same_behind_another(first, second, fitted):
    folder, detectors, _ = fitted
    run, module = engine(folder), data(folder)
    run.test(detectors[first], datamodule=module, verbose=False)
    (metrics,) = run.test(detectors[second], datamodule=module, verbose=False)
    assert [metrics] == engine(folder).test(detectors[second], datamodule=module, verbose=False)
