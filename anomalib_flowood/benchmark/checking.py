# SPDX-License-Identifier: Apache-2.0
"""What a benchmark finds out before its first job: whether data are there, and enough of them for each detector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from anomalib import LearningType
from anomalib.data.utils import LabelName

from anomalib_flowood.models.components import ConformalPostProcessor, FlowModule

from .building import build, readable


class Counts(NamedTuple):
    """Numbers of images of a data module.

    Attributes:
        train: Images to fit to.
        val: Normal images to calibrate on; ``None`` where nobody knows.
    """

    train: int
    val: int | None


def count_images(entry: dict) -> Counts:
    """Count the images of a data module, by its entry in a benchmark's configuration, without reading them.

    Raises:
        FileNotFoundError: If they are not there and cannot be downloaded.
        ValueError: If the entry is wrong, or does not fit the images.
    """
    datamodule = build("data", entry)
    if hasattr(datamodule, "memory_limit_mib"):
        datamodule.memory_limit_mib = 0
    datamodule.prepare_data()
    datamodule.setup()
    labels = getattr(getattr(datamodule, "val_data", None), "samples", {}).get("label_index")
    return Counts(len(datamodule.train_data), None if labels is None else int((labels == LabelName.NORMAL).sum()))


def check_detector(model: Any, trainer: dict[str, Any], counts: Counts) -> None:
    """Refuse a training, with these arguments of Lightning's trainer, that would run for ages or is bound to fail.

    Raises:
        ValueError: If the detector does not say how long to train, or there are too few images for it.
    """
    if model.learning_type in {LearningType.ZERO_SHOT, LearningType.FEW_SHOT}:
        return  # never trained
    limits = {"max_epochs", "max_steps", "max_time"}
    bounded = limits & {*model.trainer_arguments, *trainer} or hasattr(model, "max_epochs")
    if not bounded:
        msg = (
            f"{type(model).__name__} does not say how long to train, and Lightning would run 1,000 epochs. "
            "Set benchmark.trainer.max_epochs (or max_steps, max_time)."
        )
        raise ValueError(msg)
    if isinstance(model, FlowModule):
        model.check_number(counts.train)
    calibrates = isinstance(model.post_processor, ConformalPostProcessor) and "limit_val_batches" not in trainer
    if calibrates and counts.val is not None:
        model.post_processor.check_number(counts.val)


class Problems:
    """What is wrong with a benchmark's jobs, each thing once."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def catch(self, where: str, check: Callable[[], Any]) -> Any:
        """Do something for a job; return what it returns, or ``None`` if it fails: the error is noted."""
        try:
            return check()
        except Exception as error:  # detectors and data modules of others raise nearly everything
            self._found.setdefault(readable(error), []).append(where)
            return None

    def refuse(self) -> None:
        """Raise a :class:`ValueError` with everything that was found, if there is anything."""
        if not self._found:
            return
        lines = [
            f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''} cannot run: {message}"
            for message, places in self._found.items()
        ]
        first = "" if len(lines) == 1 else f"{len(lines)} things are wrong, and nothing was run.\n"
        msg = first + "\n".join(lines)
        raise ValueError(msg)
