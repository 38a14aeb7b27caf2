# SPDX-License-Identifier: Apache-2.0
"""What a detector saves in a checkpoint, and how it is restored."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_flowood import __version__
from anomalib_flowood.parsing import arguments_of
from anomalib_flowood.trainers import trainer_of

from .checkpoint_files import CLASS, MODULE, CheckpointError, read_checkpoint
from .checkpoints import (
    SCORE,
    VERSION,
    check_finite,
    check_fitted,
    check_settings,
    check_version,
    settings_of,
    written_by,
)
from .weights import CheckedWeights

logger = logging.getLogger(__name__)


class Restoring(CheckedWeights):
    """Saves class, score and version; loads with the checkpoint's settings, and refuses checkpoints that do not fit."""

    readable_since: ClassVar[str | None] = None
    """The earliest version of this package whose checkpoints can be read; ``None`` if all can."""
    _left = ""
    """The score of a checkpoint that was dropped, of which the user has been told."""
    _scored_anew: ClassVar[bool] = False
    """Whether the caller fits and calibrates the score anew, so that a dropped one is no loss."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the names of class, module, score and version."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CLASS], checkpoint[MODULE] = type(self).__name__, type(self).__module__
        checkpoint[SCORE] = self.model.scorer.name
        checkpoint[VERSION] = __version__
        self._leave_callback_state(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another class or of other settings; drop what belongs to another score.

        Raises:
            ValueError: If it was written by another class or by a version that is too old, or lacks the flows that the
                score trains.
            SettingsError: If it was trained with other settings than this detector has: nobody knows which are meant.
            CheckpointError: If a weight is NaN or infinite, or nothing is fitted yet, unless a fit is resumed.
        """
        trainer = trainer_of(self)
        path = None if trainer is None else trainer.ckpt_path
        self._check_writer(checkpoint, path)
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            check_fitted(path, checkpoint)
        check_settings(
            path,
            checkpoint.get("hyper_parameters", {}),
            self.hparams,
            self.may_change,
            f"{type(self).__name__}.load_from_checkpoint builds a detector with the checkpoint's settings, "
            "`flowood … --ckpt_path` without --model does, too.",
        )
        state = checkpoint["state_dict"]
        check_finite(path, state)
        self._leave_callback_state(checkpoint)
        self._leave_score(checkpoint)
        super().on_load_checkpoint(checkpoint)

    def _leave_score(self, checkpoint: dict[str, Any]) -> None:
        """Drop what belongs to another score than this detector's, including its calibration."""
        scorer, state = self.model.scorer, checkpoint["state_dict"]
        # Not from the hyper-parameters, which are those of the loading detector by now.
        trained = checkpoint.get(SCORE, "nll")
        if trained == scorer.name:
            return
        if scorer.flows:
            msg = (
                f"The score {scorer.name!r} compares flows that train together, and the checkpoint was trained "
                f"with score {trained!r}. Train with score {scorer.name!r}."
            )
            raise ValueError(msg)
        # Said once: the engine loads a checkpoint again that a command has opened.
        if trained != self._left and not self._scored_anew:
            logger.warning(
                "The checkpoint has the score %r and this detector %r (argument score): what belongs to the former "
                "is left behind, the calibration of labels and p-values too.",
                trained,
                scorer.name,
            )
        self._left = trained
        for key in [key for key in state if key.startswith("model.scorer.")]:
            del state[key]
        # Thresholds of any post-processor: anomalib's are NaN before a validation.
        for key in [key for key in state if key.startswith("post_processor.")]:
            value = state[key]
            if "calibrat" in key:
                state[key] = value[:0]
            elif value.is_floating_point():
                state[key] = torch.full_like(value, float("nan"))

    def _leave_callback_state(self, checkpoint: dict[str, Any]) -> None:
        """Remove the post-processor from the callbacks' states, which are restored after the weights.

        It is a part of the detector, and its calibration is restored with the weights.
        """
        if isinstance(self.post_processor, Callback):
            checkpoint.get("callbacks", {}).pop(self.post_processor.state_key, None)

    @classmethod
    def _check_writer(cls, checkpoint: dict[str, Any], path: object = None) -> None:
        writer = checkpoint.get(CLASS)
        if writer != cls.__name__:
            by = f"written by {writer}" if writer else "not written by a detector of anomalib_flowood"
            remedy = f"load it with anomalib_flowood.{writer}" if writer else "load it with the class that wrote it"
            raise CheckpointError(path, f"was {by}, so {cls.__name__} cannot load it; {remedy}.")
        check_version(path, checkpoint, cls)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **kwargs: Any) -> AnomalibModule:  # type: ignore[override]
        """Load a detector; the arguments are those of :meth:`AnomalibModule.load_from_checkpoint`.

        Its settings are the checkpoint's. ``score``, what counts in training alone, and the post-processor's ``alpha``
        may be given anew.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If it is broken, does not fit, was written by another class or by a version that is too
                old, or is of a training that had fitted nothing yet.
            SettingsError: If a setting is given that may not differ from the checkpoint's, but does.
        """
        # Before anything is built: another class's settings may name a backbone that is not at hand.
        checkpoint = read_checkpoint(checkpoint_path)
        cls._check_writer(checkpoint, checkpoint_path)
        check_fitted(checkpoint_path, checkpoint)
        check_finite(checkpoint_path, checkpoint["state_dict"])
        stored = settings_of(checkpoint["hyper_parameters"])
        allowed = ", ".join(sorted(cls.may_change.intersection(arguments_of(cls))))
        check_settings(
            checkpoint_path,
            stored,
            kwargs,
            cls.may_change,
            f"Leave them out, or train with them. What may change: {allowed}, and the post-processor's alpha.",
        )
        # Settings also hold arguments that a class passes to its base class.
        inits = [vars(parent)["__init__"] for parent in cls.__mro__ if "__init__" in vars(parent)]
        known = {name for init in inits for name in inspect.signature(init).parameters}
        unknown = sorted(stored.keys() - known)
        if unknown:
            logger.warning(
                "The checkpoint %s (%s) has settings that this version does not know, which are left out: %s.",
                checkpoint_path,
                written_by(checkpoint),
                ", ".join(unknown),
            )
        if "pre_trained" in stored:
            # The checkpoint holds the backbone's weights, so nothing needs to be fetched.
            kwargs["pre_trained"] = False
        if "_instantiator" in checkpoint["hyper_parameters"]:
            kwargs["_instantiator"] = None  # LightningCLI's, whose parser a command has replaced
        try:
            detector: Any = super().load_from_checkpoint(checkpoint_path, **kwargs)
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            first = " ".join(str(error).split())[:300]
            what = f"({written_by(checkpoint)}) does not fit {cls.__name__} with its settings: {first} …"
            raise CheckpointError(checkpoint_path, what) from error
        if "pre_trained" in stored:
            detector.hparams["pre_trained"] = stored["pre_trained"]
        detector._checkpoint_path = Path(checkpoint_path)
        return detector


@contextmanager
def scored_anew() -> Iterator[None]:
    """Within the context, say nothing of dropped scores: the loaded detector's score is fitted and calibrated next."""
    Restoring._scored_anew = True
    try:
        yield
    finally:
        Restoring._scored_anew = False
