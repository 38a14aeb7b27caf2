# SPDX-License-Identifier: Apache-2.0
"""Fits, validates, tests and predicts in two processes; this one goes on as both."""

import sys
from pathlib import Path
from unittest.mock import patch

import torch
from lightning.pytorch import Callback
from model_helpers import TRAINER, data, embedding_flow, feature_map_flow, forked_ranks, pixel_flow

from anomalib_flowood import processes
from anomalib_flowood.benchmark import ScoreRecorder
from anomalib_flowood.engine import RunEngine
from anomalib_flowood.models.components import rotations
from anomalib_flowood.report.predictions import keep_predictions

DETECTORS = {
    "pixel_flow": lambda: pixel_flow(architecture="glow", coupling_layers=1, score="typicality", max_epochs=1),
    "embedding_flow": lambda: embedding_flow(coupling_layers=0, rotations=True),
    "feature_map_flow": lambda: feature_map_flow(coupling_layers=0, rotations=True),
}
EXACT = {"embedding_flow", "feature_map_flow"}
"""Those that are fitted in closed form, which are compared in float64."""
TRAINED = {"pixel_flow": pixel_flow, "feature_map_flow": lambda: feature_map_flow(coupling_layers=2, max_epochs=1)}
LOADING = {"train_limit": 91, "test_limit": 25, "eval_batch_size": 8, "train_batch_size": 16}
"""So that neither training, nor validation, nor test images can be dealt out evenly."""


def run(folder: Path, name: str, detector, devices: int, *, fit: bool) -> dict:
    """Do all there is to do; return what came of it, the same in every process."""
    recorder = ScoreRecorder()
    engine = RunEngine(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="64-true" if name in EXACT else "32-true",
        default_root_dir=folder / f"{name}-{devices}",
        callbacks=[recorder],
        logger=False,
        enable_progress_bar=False,
    )
    module = data(folder, **LOADING)
    if fit:
        with patch.object(rotations, "LIMIT", 1.0):  # so that there are copies
            engine.fit(detector, datamodule=module)
    engine.validate(detector, datamodule=module)
    metrics = engine.test(detector, datamodule=module)[0]
    predicted = engine.predict(detector, datamodule=module)
    out = folder / f"{name}-{devices}"
    keep_predictions(predicted, out, detector.post_processor)
    maps = {path: kept.map for path, kept in recorder.shown_maps.items()}
    return {"metrics": metrics, "scores": recorder.scores, "maps": maps, "state": dict(detector.state_dict())}


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


class Save(Callback):
    """Writes a checkpoint from within the first epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 1:
            trainer.save_checkpoint(self.path)


def unlike_when_resumed(folder: Path, build) -> list[str]:
    """Train, and once more from within the first epoch with other random numbers; what differs in any process."""
    path, states = folder / "within.ckpt", []
    for seed, ckpt_path in ((10, None), (20, path)):
        torch.manual_seed(seed + processes.rank())
        own = {**TRAINER, "devices": 2, "strategy": "ddp", "logger": False, "callbacks": [Save(path)]}
        detector = build()
        RunEngine(**own, default_root_dir=folder).fit(detector, datamodule=data(folder.parent), ckpt_path=ckpt_path)
        states.append({name: value.clone() for name, value in detector.state_dict().items()})
        path = folder / "other.ckpt"
    unlike = [name for name in states[0] if not _same(states[0][name], states[1][name])]
    return [name for names in processes.gathered_objects(unlike) for name in names]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with forked_ranks(2):
        for title, build in DETECTORS.items():
            torch.manual_seed(0)
            found = run(place, title, build(), 2, fit=True)
            others = processes.gathered_objects(found["state"])
            found["unlike"] = [key for key in others[0] if not _same(others[0][key], others[1][key])]
            if not processes.rank():
                torch.save(found, place / f"{title}.pt")
        resumed = {title: unlike_when_resumed(place / f"{title}-resumed", build) for title, build in TRAINED.items()}
        if not processes.rank():
            torch.save(resumed, place / "resumed.pt")
