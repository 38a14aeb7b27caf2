# SPDX-License-Identifier: Apache-2.0
"""Keeps the weights of the epoch after which held-out normal images had the fewest bits per dimension."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sized
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from anomalib.data import InferenceBatch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_flowood import flows, processes
from anomalib_flowood.trainers import callbacks_of, is_trial, trainer_of, validation_loaders

from .flow_model import FlowModel
from .flow_module import FlowModule

logger = logging.getLogger(__name__)

_KEY = "anomalib_flowood_kept_epoch"


@dataclass(frozen=True)
class Epoch:
    """An epoch of a training, rated on held-out images.

    Attributes:
        epoch: Its number, from 1.
        bits: Mean bits per dimension of the held-out normal images after it, at the centres of the pixels' bins.
        images: How many images these are.
    """

    epoch: int
    bits: float
    images: int


class KeptEpoch(FlowModule):
    """Mixin for detectors that overfit, to the left of :class:`FlowModule`.

    Each validation of a fit rates the weights by −log p of held-out normal images. Before the last validation the
    weights are rated once more, and those of the best epoch so far are restored, so that the score is fitted, the
    images are validated and the checkpoint is written with them. Epochs are compared by the mean, which training
    minimises, and which unlike a median notices single images whose −log p explodes.

    The last weights stay where there is nothing to judge by, or where a callback of the trainer monitors a metric or
    averages weights and so makes the choice itself.
    """

    model: FlowModel
    kept_epoch: Epoch | None = None
    """The epoch whose weights these are; ``None`` if nothing was judged."""

    _best: tuple[Epoch, dict[str, Tensor]] | None = None
    """The best epoch of the present fit, and its weights."""
    _last: Epoch | None = None
    _judged_step = -1
    _validation_bits: list[Tensor] | None = None
    """Bits per dimension of the images of a validation that judges by itself, while it runs."""

    def on_fit_start(self) -> None:
        """Begin anew, unless a training is resumed."""
        super().on_fit_start()
        if self.trainer.ckpt_path is None:
            self._best = self._last = self.kept_epoch = None
            self._judged_step = -1

    def on_validation_start(self) -> None:
        """Judge the weights where training ends, and go back to better ones; only then is a score fitted to them."""
        self._validation_bits = None
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            if self._judged_step == self.trainer.global_step:  # once more, for a stop that came behind
                self._take_best()
            elif self._training_ends() or processes.ranks() > 1:
                self._judge()
            else:  # the images are looked at once
                self._validation_bits = []
        super().on_validation_start()

    def judged(self, batch: Any) -> tuple[InferenceBatch, Tensor]:
        """As all detectors do, and keep what the validation says of the weights."""
        found, losses = super().judged(batch)
        if self._validation_bits is not None:
            self._validation_bits.append(self._bits(batch, losses))
        return found, losses

    def on_validation_epoch_end(self) -> None:
        """Judge the weights by what the validation has seen, before a callback writes a checkpoint."""
        super().on_validation_epoch_end()
        if self._validation_bits is not None:
            self._judge()
            self._validation_bits = None

    def on_train_epoch_end(self) -> None:
        """Judge the last weights where no validation did."""
        if self._training_ends() and self._judged_step != self.trainer.global_step:
            self._judge()
        super().on_train_epoch_end()

    def on_train_end(self) -> None:
        """Say which epoch was kept, and why."""
        super().on_train_end()
        kept, last = self.kept_epoch, self._last
        self._best = None  # as much memory as the flow
        if is_trial(self.trainer) or not self.trainer.is_global_zero:
            return
        if kept is not None and last is not None:
            text = (
                "Kept the weights after epoch %d of %d: %d held-out normal images have %.2f bits per dimension (mean)"
            )
            logger.info(f"{text}, %.2f after the last.", kept.epoch, last.epoch, kept.images, kept.bits, last.bits)
            self._tell_of_too_many_bits(kept)
        else:
            why = self._chosen_elsewhere() or "there are no normal validation images to tell"
            logger.warning("The weights of the last epoch are kept, whichever was the best: %s.", why)

    def _tell_of_too_many_bits(self, kept: Epoch) -> None:
        """Warn of a flow under which images are far less likely than noise; one that has hardly trained is near it."""
        noise = math.log2(self.model.levels)
        if kept.bits > 2 * noise:
            logger.warning(
                "Held-out normal images have %.4g bits per dimension (mean), and noise would have %g: the flow has "
                "learnt no density of them, and its scores mean little. Lower learning_rate (%g), train longer or on "
                "more images, or look for images that are broken or unlike the others.",
                *(kept.bits, noise, self.learning_rate),
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the best epoch and, in the midst of a training, its weights, so that it can be resumed."""
        super().on_save_checkpoint(checkpoint)
        stored: dict[str, Any] = {"kept": None if self.kept_epoch is None else asdict(self.kept_epoch)}
        if self._best is not None and self.kept_epoch is None:
            stored |= {"best": asdict(self._best[0]), "weights": self._best[1]}
        checkpoint[_KEY] = stored

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load as :class:`FlowModule` does, and take the best epoch so far."""
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get(_KEY) or {}
        kept, best = stored.get("kept"), stored.get("best")
        self.kept_epoch = None if kept is None else Epoch(**kept)
        self._best = None
        trainer = trainer_of(self)
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if best is not None:
            self._best = Epoch(**best), stored["weights"]
        elif self.kept_epoch is not None:
            named = checkpoint["state_dict"].items()
            weights = {name.removeprefix("model."): value for name, value in named if name.startswith("model.")}
            self._best = self.kept_epoch, weights

    def _chosen_elsewhere(self) -> str:
        """What else chooses an epoch, as a clause; nothing if nothing does."""
        averaging = (WeightAveraging, StochasticWeightAveraging)
        names = [
            type(callback).__name__
            for callback in callbacks_of(self.trainer)
            if getattr(callback, "monitor", None) or isinstance(callback, averaging)
        ]
        verb = "chooses" if len(names) == 1 else "choose"
        return f"{' and '.join(names)} of the trainer {verb} weights" if names else ""

    # Tensors made in inference mode, in which Lightning validates, could not be trained on.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _judge(self) -> None:
        """Rate the weights; where training ends, take the best ones."""
        trainer = self.trainer
        if is_trial(trainer) or self._chosen_elsewhere():
            return
        bits = self._held_out_bits()
        self._judged_step = trainer.global_step
        if not len(bits):
            return
        last = Epoch(trainer.current_epoch + 1, trainer.strategy.broadcast(float(bits.mean())), len(bits))
        self._last, self.kept_epoch = last, None
        if self._best is None or last.bits < self._best[0].bits:
            self._best = last, {name: value.clone() for name, value in self.model.state_dict().items()}
        if self._training_ends():
            self._take_best()

    def _take_best(self) -> None:
        if self._best is not None:
            self.kept_epoch, weights = self._best
            if self.kept_epoch != self._last:
                self.model.load_state_dict(weights)

    def _held_out_bits(self) -> Tensor:
        """Bits per dimension of all normal validation images, ``(N,)``, float64; infinite where the flow overflowed.

        Every rank sees all images, so that all decide alike.
        """
        parts = self._validation_bits
        if parts is None:
            model, training = self.model, self.model.training
            model.eval()
            parts = [self._bits(batch, model.nll(model, self.inputs_of(batch))) for batch in self._held_out()]
            model.train(training)
        return torch.cat([torch.empty(0, dtype=torch.float64), *parts])

    def _bits(self, batch: Any, losses: Tensor) -> Tensor:
        """Bits per dimension of the normal images of a batch, from −log p per dimension of all, nats, ``(N,)``."""
        normal = slice(None) if batch.gt_label is None else ~batch.gt_label.bool()
        exact = losses[normal].cpu().double().nan_to_num(nan=math.inf, posinf=math.inf)
        return flows.bits_per_dim(-exact * self.model.dims, self.model.dims, self.model.levels)

    def _held_out(self) -> Iterator[Any]:
        """Pre-processed batches of the validation images, by loaders of our own: the trainer's may have begun."""
        trainer: Any = self.trainer
        limit, transform = trainer.limit_val_batches, getattr(self.pre_processor, "transform", None)
        for loader in validation_loaders(trainer):
            countable = isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized)
            own = _again(loader) if countable else loader
            count = limit if isinstance(limit, int) else None if limit == 1 else int(limit * len(own))
            for batch in islice(own, count):
                on_device = trainer.strategy.batch_to_device(batch)
                if transform is not None:
                    on_device.image = transform(on_device.image)
                yield on_device


def _again(loader: DataLoader) -> DataLoader:
    """Another loader of the same batches."""
    if loader.batch_sampler is None:  # its data set gives whole batches
        return processes.same_images(loader, batch_size=None, sampler=loader.sampler)
    return processes.same_images(loader, batch_sampler=loader.batch_sampler)
