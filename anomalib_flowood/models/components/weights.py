# SPDX-License-Identifier: Apache-2.0
"""Weights are checked before they are used: none is NaN, and the calibration belongs to them."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from sklearn.exceptions import NotFittedError
from torch import Tensor

from anomalib_flowood.trainers import is_trial

from .checkpoints import check_finite, plain, settings_of
from .flow_model import FlowModel
from .mixin import Mixin
from .post_processor import ConformalPostProcessor

logger = logging.getLogger(__name__)


def checksum(value: Tensor) -> int:
    """Return a checksum of a tensor's values, the same on every device and for float32 and float64."""
    value = value.detach().float() if value.is_floating_point() else value
    values: Any = value.cpu().contiguous().numpy()
    return zlib.crc32(values)


class CheckedWeights(Mixin):
    """Checks weights and their calibration whenever they are about to be used."""

    model: FlowModel
    may_change: ClassVar[frozenset[str]] = frozenset({"score", "max_epochs", "learning_rate", "pre_trained"})
    """Arguments that may differ from a checkpoint's: the score, and what only training needs."""

    _seen: tuple[tuple[int, int], ...] = ()
    """Versions of the weights at the last check."""

    def fingerprint(self) -> Tensor:
        """Return a hash of everything that scores depend on, ``(32,)``, bytes: weights, statistics, settings, score.

        It is the same on every device, and for float32 and float64.
        """
        scorer = self.model.scorer if self.model.scorer.ready else self.model.nll
        defaults = inspect.signature(type(self).__init__).parameters
        # Without defaults, so that the hash stays the same when a later version adds a setting.
        settings = {
            name: value
            for name, value in plain(settings_of(self.hparams)).items()
            if name not in {*self.may_change, "backbone"}
            and (name not in defaults or value != plain(defaults[name].default))
        }
        digest = hashlib.sha256(json.dumps([scorer.name, settings], sort_keys=True).encode())
        for name, value in self.model.state_dict().items():
            if name == "fitted":  # says that training went on to the end of an epoch
                continue
            # Nobody forges weights: checksums are enough, and three times as fast as hashing all bytes.
            digest.update(f"{name} {tuple(value.shape)} {checksum(value)}\n".encode())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    def check_weights(self) -> None:
        """Refuse weights that are NaN; drop a calibration that is not of the present weights, score and settings.

        Tests, predictions, exports and loading call it, and so does a call of the detector after weights have changed.

        Raises:
            ValueError: If a weight is NaN or infinite, or the calibration too small for its ``alpha``.
        """
        check_finite(None, {f"model.{name}": value for name, value in self.model.state_dict().items()})
        if isinstance(self.post_processor, ConformalPostProcessor):
            self.post_processor.check(self.fingerprint())
        self._seen = self._versions()

    def check_fitted(self, what: str) -> None:
        """Refuse a detector that was never fitted, whose scores are meaningless.

        Tests, validations, predictions and exports call it.

        Args:
            what: What is about to be done with it, for the error.

        Raises:
            NotFittedError: If it was never fitted.
        """
        if not bool(self.model.fitted):
            msg = (
                f"This {type(self).__name__} was never fitted, so there is nothing to {what}. Train it first, or load "
                "a checkpoint (`--ckpt_path`; ckpt_path of anomalib's Engine)."
            )
            raise NotFittedError(msg)

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """Return a cheap key that changes whenever a weight or the calibration does."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if isinstance(self.post_processor, ConformalPostProcessor):
            tensors.append(self.post_processor.calibration)
        return tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Score images as :meth:`AnomalibModule.forward` does, after a check if weights have changed."""
        if not torch.compiler.is_compiling() and self._seen != self._versions():
            self.check_weights()
        return super().forward(batch, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights; drop a calibration that does not belong to them.

        Raises:
            ValueError: If a weight is NaN or infinite.
        """
        keys = super().load_state_dict(state_dict, *args, **kwargs)
        self.check_weights()
        return keys

    def on_fit_end(self) -> None:
        """Drop a calibration of other weights than the final ones; warn if there is none."""
        super().on_fit_end()
        processor = self.post_processor
        missing = isinstance(processor, ConformalPostProcessor) and not processor.calibrated
        if missing and not is_trial(self.trainer) and self.trainer.is_global_zero:
            logger.warning(
                "The fit ended without a calibration, since no validation followed the last weights (max_steps or "
                "max_time in the midst of an epoch, limit_val_batches=0, check_val_every_n_epoch): there are raw "
                "scores alone, no labels and no p-values. `flowood validate --ckpt_path` calibrates, and writes a "
                "checkpoint with the calibration; Engine.validate calibrates the detector in memory."
            )
        self.check_weights()

    def on_validation_start(self) -> None:
        """Refuse to calibrate a detector that was never fitted."""
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self.check_fitted("validate")

    def on_test_start(self) -> None:
        """Refuse to test a detector that was never fitted; check its weights."""
        super().on_test_start()
        self.check_fitted("test")
        self.check_weights()

    def on_predict_start(self) -> None:
        """Refuse to predict with a detector that was never fitted; check its weights."""
        super().on_predict_start()
        self.check_fitted("predict with")
        self.check_weights()
