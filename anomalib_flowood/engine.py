# SPDX-License-Identifier: Apache-2.0
"""Where the results of a run go: anomalib's engine, with folders that say what they hold."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule

from anomalib_flowood.files import files_below
from anomalib_flowood.saving import keep_end
from anomalib_flowood.started import was_started
from anomalib_flowood.trainers import is_trial

_WEIGHTS = ("weights", "lightning")
"""Where anomalib's engine writes checkpoints, in the folder of a run."""


class RunEngine(Engine):
    """anomalib's engine, but a failed fit leaves ``latest`` alone, and a test or a prediction has its own folder.

    anomalib lets the link ``latest`` point to a new folder before the training begins, and writes what a checkpoint
    gives on other data into the folder that ``latest`` names, whichever checkpoint it is.
    """

    folder: Path | None = None
    """Where to write what a test or a prediction gives; where anomalib does if it is not set."""
    _new: Path | None = None
    _previous: Path | None = None

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Fit as anomalib's engine does; a checkpoint is left in any case."""
        with self._latest_has_weights():
            super().fit(*args, **kwargs)
            keep_end(self.trainer)

    def train(
        self,
        model: AnomalibModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        test_dataloaders: Any = None,
        datamodule: AnomalibDataModule | None = None,
        ckpt_path: str | Path | None = None,
    ) -> Any:
        """Fit and test as anomalib's engine does, which after a resumed fit would test what that began with."""
        with self._latest_has_weights():
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path)
            keep_end(self.trainer)
            return self.trainer.test(model, test_dataloaders, datamodule=datamodule)

    def _setup_trainer(self, model: AnomalibModule) -> None:
        try:
            super()._setup_trainer(model)
        except TypeError as error:  # Lightning's, for a value that only it can judge
            msg = f"The trainer cannot be set up so: {error}"
            raise ValueError(msg) from error

    def _setup_workspace(self, *args: Any, **kwargs: Any) -> None:
        # Other processes than that of rank 0 find its folder under `latest`.
        versioned = kwargs.pop("versioned_dir", False) and not was_started()
        arguments = self._cache.args
        root = arguments["default_root_dir"]
        super()._setup_workspace(*args, **kwargs)  # the folder that `latest` names
        if versioned:
            self._previous = Path(arguments["default_root_dir"])
            if self._previous.name == "latest" and self._previous.is_dir():
                msg = f"{self._previous} is a folder, where a link to the newest run has to be. Move it elsewhere."
                raise FileExistsError(msg)
            arguments["default_root_dir"] = root
            super()._setup_workspace(*args, **{**kwargs, "versioned_dir": True})
            self._new = Path(arguments["default_root_dir"])
        elif self.folder is not None:
            arguments["default_root_dir"] = self.folder

    @contextlib.contextmanager
    def _latest_has_weights(self) -> Iterator[None]:
        """Reset ``latest`` if the run has no weights: it failed, was a trial, or had nothing left to train."""
        self._new = None
        ended = False
        try:
            yield
            ended = not is_trial(self.trainer)
        finally:
            if self._new is not None and self.kept_checkpoint() is None:
                if not ended or self.best_model_path:  # that of the run which was resumed, and had ended
                    self._turn_latest_back(self._new)
                if not ended:
                    with contextlib.suppress(OSError):  # what it holds says what failed
                        self._new.rmdir()
                        self._new.parent.rmdir()  # of these data, if there is no other run

    def kept_checkpoint(self) -> Path | None:
        """The newest checkpoint that this training has written so far; ``None`` if there is none."""
        if self._new is None:
            return None
        found = [path for path in files_below(self._new) if path.suffix == ".ckpt"]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    def _turn_latest_back(self, new: Path) -> None:
        latest = new.parent / "latest"
        if latest.is_symlink():
            latest.unlink()
            if self._previous is not None and self._previous.is_dir():
                latest.symlink_to(self._previous, target_is_directory=True)


def run_folder(checkpoint: Path | None, root: Path, detector: str, *, chosen: bool = True) -> Path:
    """Return the folder that what a checkpoint gives belongs to.

    Args:
        checkpoint: The checkpoint, if there is one.
        root: Where results go (``default_root_dir``).
        detector: The detector's name.
        chosen: Whether somebody has said so; else a run's own folder counts, wherever it lies.

    Returns:
        The folder of the run that wrote the checkpoint, if it lies below ``root``, or elsewhere where that was not
        chosen, and files can be written there; else the detector's in ``root``.
    """
    root = root.resolve()
    if checkpoint is not None:
        folder = checkpoint.resolve().parent
        if folder.parts[-2:] == _WEIGHTS:
            run = folder.parents[1]
            if root in folder.parents or (not chosen and os.access(run, os.W_OK)):
                return run
    return root / detector


def new_folder(root: Path) -> Path:
    """Make a folder that did not exist before, named after the time, in another one, which is made if missing."""
    stamp = datetime.now().strftime("%Y-%m-%d-%H_%M_%S")
    number = 1
    while True:
        folder = root / (stamp if number == 1 else f"{stamp}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        number += 1


@contextlib.contextmanager
def used_folder(folder: Path) -> Iterator[Path]:
    """Remove a new folder, and the one above it, if nothing was written into it: what was to write has failed."""
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()
