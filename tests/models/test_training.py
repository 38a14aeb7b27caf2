# SPDX-License-Identifier: Apache-2.0
from datetime import timedelta

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from model_helpers import TRAINER, pixel_flow


class Clock(Timer):
    """A limit in time, by another name."""


@pytest.mark.parametrize(
    ("limits", "epochs"),
    [
        ({}, 2),
        ({"max_epochs": 3}, 3),
        ({"max_epochs": -1}, -1),
        ({"max_steps": 5}, None),
        ({"max_time": "00:00:01:00"}, None),
        ({"callbacks": [Timer(timedelta(minutes=1))]}, None),
        ({"callbacks": [Clock(timedelta(minutes=1))]}, None),
        ({"callbacks": [Timer(None)]}, 2),  # which measures only
    ],
)
def test_only_a_trainer_without_any_limit_gets_the_detectors(limits, epochs, tmp_path):
    detector = pixel_flow(max_epochs=2)
    detector.trainer = Trainer(**{**TRAINER, **limits}, default_root_dir=tmp_path, logger=False)
    assert detector.trainer.fit_loop.max_epochs == epochs
