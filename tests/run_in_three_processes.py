# SPDX-License-Identifier: Apache-2.0
"""Fits, tests and predicts fewer images than suit three processes, as which this one goes on."""

import os
import sys
from pathlib import Path

import pandas as pd
import torch
from lightning.pytorch import Callback
from model_helpers import TRAINER, data, embedding_flow, feature_map_flow, forked_ranks, pixel_flow

from anomalib_flowood import processes
from anomalib_flowood.benchmark import ScoreRecorder
from anomalib_flowood.engine import RunEngine
from anomalib_flowood.report.predictions import keep_predictions

PROCESSES = 3
FEW = {"train_limit": 11, "val_split_ratio": 0.4, "test_limit": 1, "train_batch_size": 8, "eval_batch_size": 8}
"""Seven images to fit to, fewer than three batches; four to calibrate on; one to test of either kind."""
FITTED = {
    "embedding_flow": lambda: embedding_flow(coupling_layers=0),
    "feature_map_flow": lambda: feature_map_flow(coupling_layers=0),
}
TRAINED = {
    "glow": lambda: pixel_flow(architecture="glow", coupling_layers=1, score="typicality"),
    "feature_map_flow": lambda: feature_map_flow(coupling_layers=2),
}


class Steps(Callback):
    """Counts the steps of every epoch, and writes a checkpoint within the first."""

    def __init__(self, path):
        self.path, self.steps = path, [0]

    def on_train_epoch_start(self, trainer, detector):
        self.steps += [0]

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 1:
            trainer.save_checkpoint(self.path)
        self.steps[-1] += 1


def few(folder, *, mixed=False):
    """Few images; of those to calibrate on, every third is normal where `mixed`, which are all in one process."""
    module = data(folder, **FEW)
    module.setup()
    if mixed:
        samples = module.val_data.samples
        samples["label_index"] = [int(place % PROCESSES > 0) for place in range(len(samples))]
        module.val_data.samples = samples
    return module


def engine(folder, devices, *callbacks, precision="32-true"):
    own = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "logger": False, "precision": precision}
    return RunEngine(**{**TRAINER, **own}, default_root_dir=folder, callbacks=[*callbacks])


def run(folder, detector, devices, *, mixed=False):
    recorder = ScoreRecorder()
    out = folder / f"{type(detector).__name__}-{devices}-{mixed}"
    # Of maps, which are stored in 16 bits, single precision rounds some to a neighbour.
    maps = type(detector).__name__ == "FeatureMapFlow"
    runner = engine(out, devices, recorder, precision="64-true" if maps else "32-true")
    module = few(folder, mixed=mixed)
    runner.fit(detector, datamodule=module)
    metrics = runner.test(detector, datamodule=module)[0]
    refused = ""
    try:
        runner.predict(detector, datamodule=module)
    except ValueError as error:  # in all processes, before anything is predicted
        refused = str(error)
    module.test_data = module.train_data  # seven images
    predicted = runner.predict(detector, datamodule=module)
    keep_predictions(predicted, out, detector.post_processor)
    rows = None if processes.rank() else pd.read_csv(out / "predictions.csv")
    state = dict(detector.state_dict())
    return {"metrics": metrics, "scores": recorder.scores, "state": state, "rows": rows, "refused": refused}


def states_differ(detector):
    states = processes.gathered_objects({name: value.nan_to_num() for name, value in detector.state_dict().items()})
    return [name for name in states[0] for other in states[1:] if not torch.equal(states[0][name], other[name])]


def train(folder, name):
    """Train, and go on from within an epoch."""
    found = {}
    for ckpt_path in (None, folder / f"{name}.ckpt"):
        torch.manual_seed(processes.rank())
        detector, steps = TRAINED[name](), Steps(ckpt_path or folder / f"{name}.ckpt")
        runner = engine(folder / name, PROCESSES, steps)
        runner.fit(detector, datamodule=data(folder, train_batch_size=16), ckpt_path=ckpt_path)
        key = "resumed" if ckpt_path else "trained"
        found[key] = {
            "differ": states_differ(detector),
            "steps": processes.gathered_objects((steps.steps, runner.trainer.global_step)),
            "calibration": len(detector.post_processor.calibration),
            "state": dict(detector.state_dict()),
        }
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with forked_ranks(PROCESSES):
        found = {}
        for title, build in FITTED.items():
            for mixed in (False, True):
                torch.manual_seed(0)
                detector = build()
                torch.manual_seed(int(os.environ.get("LOCAL_RANK", "0")))  # no process draws what another does
                found[title, mixed] = run(place, detector, PROCESSES, mixed=mixed)
        for title in TRAINED:
            found[title] = train(place, title)
        if not processes.rank():
            torch.save(found, place / "found.pt")
