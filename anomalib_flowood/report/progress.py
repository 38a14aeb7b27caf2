# SPDX-License-Identifier: Apache-2.0
"""How far a series of trainings is: a live line in a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class JobProgress(Callback):
    """Says which job runs, what it is doing and how long it will still take.

    In a terminal this is one live line. Elsewhere it is one line per epoch, at most one a second, and a sign of life
    after ``heartbeat`` seconds in which nothing else was said, so that a log never looks stuck.

    Args:
        console: Where to write.
        heartbeat: Seconds of silence after which the state is repeated, outside a terminal.
    """

    def __init__(self, console: Console, heartbeat: float = 10.0) -> None:
        self.console = console
        self._heartbeat = heartbeat
        self._live: Progress | None = None
        self._stop = threading.Event()
        self._job = ""
        self._state = ""
        self._fraction: float | None = None
        self._stage_start = self._said = self._drawn = time.monotonic()
        self._batches = 0
        self._epoch = ""

    def __enter__(self) -> JobProgress:
        if self.console.is_terminal:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._live.add_task("", total=None)
            self._live.start()
        else:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._live is not None:
            self._live.stop()

    def start_job(self, number: int, total: int, title: str) -> None:
        """Announce a job, numbered from 1."""
        self._job = f"[{number}/{total}]"
        self.say(f"{self._job} {title}")
        self.stage("preparing")

    def say(self, text: str) -> None:
        """Print a line of plain text that stays."""
        self._said = time.monotonic()
        self.console.out(text, highlight=False)

    def stage(self, text: str) -> None:
        """Say what the job is doing from now on; its progress starts at zero."""
        self._stage_start = time.monotonic()
        self._show(text, None)
        if self._live is not None:
            self._live.reset(self._task, total=None, description=f"{self._job} {text}")

    def _show(self, state: str, fraction: float | None) -> None:
        self._state, self._fraction = state, fraction
        now = time.monotonic()
        if self._live is not None and now - self._drawn > 0.1:  # a fast flow makes hundreds of steps a second
            self._drawn = now
            self._live.update(
                self._task,
                description=f"{self._job} {state}",
                total=None if fraction is None else 1.0,
                completed=fraction or 0.0,
            )

    def _line(self) -> str:
        elapsed = time.monotonic() - self._stage_start
        line = f"{self._job}   {self._state}, {_duration(elapsed)}"
        if self._fraction:
            line += f", {_duration(elapsed * (1 / self._fraction - 1))} left"
        return line

    def _beat(self) -> None:
        while not self._stop.wait(min(1.0, self._heartbeat)):
            if self._job and time.monotonic() - self._said >= self._heartbeat:
                self.say(self._line())

    # Lightning's hooks, in the order in which they come.

    def on_extract(self, what: str, done: int, total: int) -> None:
        """Show how far a frozen backbone is; our detectors call this before their training starts.

        Args:
            what: Which images, ``"training"`` or ``"validation"``.
            done: Batches done.
            total: Of how many.
        """
        if done == 0:
            self.stage(f"extracting {what} features")
        self._show(f"extracting {what} features, batch {done + 1}/{total}", done / total)

    def on_train_start(self, *_: Any) -> None:
        """Start counting the steps of a training."""
        self._batches = 0
        self.stage("training")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step."""
        del pl_module, outputs, batch
        self._batches += 1
        per_epoch = trainer.num_training_batches
        self._epoch = f"epoch {trainer.current_epoch + 1}"
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            self._epoch += f"/{trainer.max_epochs}"
        step = f"step {batch_idx + 1}" + (f"/{per_epoch}" if math.isfinite(per_epoch) else "")
        self._show(f"{self._epoch} {step}", self._train_fraction(trainer))

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        """Say that an epoch is over, with its loss."""
        losses = [f"{name} {float(value):.4g}" for name, value in trainer.callback_metrics.items() if "loss" in name]
        self._show(" ".join([self._epoch, *losses]), self._train_fraction(trainer))
        now = time.monotonic()
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if self._live is None and (last or now - self._said >= 1.0):
            self.say(self._line())

    def on_validation_start(self, *_: Any) -> None:
        """Say that the validation set is being scored; a training's progress stays."""
        self._show("validating", self._fraction)

    def on_test_start(self, *_: Any) -> None:
        """Start counting the batches of a test."""
        self._batches = 0
        self.stage("testing")

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Count a test batch."""
        self._batches += 1
        total = sum(trainer.num_test_batches)
        known = math.isfinite(total) and total > 0
        text = f"testing batch {self._batches}" + (f"/{int(total)}" if known else "")
        self._show(text, self._batches / total if known else None)

    def _train_fraction(self, trainer: Trainer) -> float | None:
        """The share of a training that is done, by whichever limit comes first."""
        shares = []
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(trainer.num_training_batches):
            shares.append(self._batches / max(1, trainer.max_epochs * trainer.num_training_batches))
        if trainer.max_steps is not None and trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        return min(1.0, max(shares)) if shares else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
