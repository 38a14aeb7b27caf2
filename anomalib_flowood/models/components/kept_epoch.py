# SPDX-License-Identifier: Apache-2.0
"""Which epoch's weights a training leaves: those under which held-out normal images have the fewest bits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_flowood import flows
from anomalib_flowood.trainers import validation_loaders

from .flow_model import FlowModel

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .flow_module import FlowModule

    _Base = FlowModule
else:
    _Base = object

_KEY = "anomalib_flowood_kept_epoch"


@dataclass(frozen=True)
class Epoch:
    """An epoch of a training, judged on images that it did not see.

    Attributes:
        epoch: Its number, from 1 on.
        bits: Mean bits per dimension of the held-out normal images after it, at the centres of the pixels' bins.
        images: How many images these are.
    """

    epoch: int
    bits: float
    images: int


class KeptEpoch(_Base):
    """Mixin for detectors that learn their images by heart, to the left of :class:`FlowModule`.

    Before each validation of a fit, held-out normal images are rated by −log p. Before the last one, the weights of the
    best epoch so far come back, so that the score is fitted, the images are validated and the checkpoint is written
    with them. The mean is compared, since it is what training minimises, and since it sees single images that explode:
    a median does not.

    The last weights stay where there is nothing to judge by, or where a callback of the trainer monitors a metric:
    then that one chooses.
    """

    model: FlowModel
    kept_epoch: Epoch | None = None
    """The epoch whose weights these are; ``None`` if nothing was judged."""

    _best: tuple[Epoch, dict[str, Tensor]] | None = None
    """The best epoch of the present fit, and its weights."""
    _last: Epoch | None = None

    def on_fit_start(self) -> None:
        """Begin anew, unless a training is resumed."""
        super().on_fit_start()
        if self.trainer.ckpt_path is None:
            self._best = self.kept_epoch = None

    def on_validation_start(self) -> None:
        """Judge the weights, and go back to better ones when training ends; only then is a score fitted to them."""
        trainer: Any = self.trainer
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not self._chosen_elsewhere():
            self._judge()
        super().on_validation_start()

    def on_train_end(self) -> None:
        """Say which epoch was kept, and why."""
        super().on_train_end()
        best = self.kept_epoch
        trainer: Any = self.trainer
        if best is not None and self._last is not None:
            logger.info(
                "Kept the weights after epoch %d of %d: %d held-out normal images have %.3f bits per dimension (mean), "
                "and %.3f after the last epoch.",
                *(best.epoch, self._last.epoch, best.images, best.bits, self._last.bits),
            )
        elif not trainer.fast_dev_run:
            why = self._chosen_elsewhere() or "there are no normal validation images to judge them by"
            logger.warning("The weights of the last epoch are kept, whichever was the best: %s.", why)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the best epoch and, unless they are the present ones, its weights, so that a training can be resumed."""
        super().on_save_checkpoint(checkpoint)
        kept: dict[str, Any] = {"kept": None if self.kept_epoch is None else asdict(self.kept_epoch)}
        if self._best is not None and self.kept_epoch is None:
            best, weights = self._best
            kept |= {"best": asdict(best), "weights": None if best == self._last else weights}
        checkpoint[_KEY] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load as :class:`FlowModule` does, and take the best epoch so far."""
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get(_KEY) or {}
        self.kept_epoch = Epoch(**stored["kept"]) if stored.get("kept") else None
        best = stored.get("best") or stored.get("kept")
        weights = stored.get("weights")
        if weights is None:
            weights = {
                name.removeprefix("model."): value
                for name, value in checkpoint["state_dict"].items()
                if name.startswith("model.")
            }
        self._best = None if best is None else (Epoch(**best), weights)

    def _chosen_elsewhere(self) -> str:
        """What else chooses an epoch, as a clause; nothing if nothing does."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        names = [type(callback).__name__ for callback in callbacks if getattr(callback, "monitor", None)]
        return f"{' and '.join(names)} of the trainer decides" if names else ""

    def _judge(self) -> None:
        bits = self._held_out_bits()
        if not len(bits):
            return
        self._last = Epoch(self.trainer.current_epoch + 1, float(bits.mean()), len(bits))
        self.kept_epoch = None
        if self._best is None or self._last.bits < self._best[0].bits:
            weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self._best = self._last, weights
        if self._training_ends():
            best, weights = self._best
            if best is not self._last:
                self.model.load_state_dict(weights)
            self.kept_epoch = best

    @torch.no_grad()
    def _held_out_bits(self) -> Tensor:
        """Bits per dimension of all normal validation images, ``(N,)``, float64; infinite where the flow overflowed.

        Every rank sees all of them, so that all ranks decide alike.
        """
        model, training = self.model, self.model.training
        model.eval()
        parts = [torch.empty(0, dtype=torch.float64)]
        for batch in self._held_out():
            log_prob = model.log_prob_of(self.inputs_of(batch))
            normal = slice(None) if batch.gt_label is None else ~batch.gt_label.bool()
            parts.append(flows.bits_per_dim(log_prob[normal].double().cpu(), model.dims, model.levels))
        model.train(training)
        return torch.cat(parts)
