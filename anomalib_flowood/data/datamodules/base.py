# SPDX-License-Identifier: Apache-2.0
"""What both data modules share: their sources, what memory they take, what white is in files of 16 bits."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
from anomalib.data.utils import LabelName, Split
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_flowood.data.datasets import SourcedDataset
from anomalib_flowood.data.decoding import plain_max_value
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.sources import Source

logger = logging.getLogger(__name__)


class _ReadsSources:
    """What both data modules share: their sources, what memory they take, what white is in files of 16 bits."""

    max_value: int | None
    memory_limit_mib: int
    trainer: Any
    _sources: list[Source]
    _is_setup: bool
    _given_max_value: int | None
    _memory_left: float

    def prepare_data(self) -> None:
        """Download what is missing.

        Raises:
            FileNotFoundError: If a data set is neither on this machine nor to be had, with what helps.
        """
        if not self._is_setup:
            for position, source in enumerate(self._sources):
                source.prepare(["train", "test"] if position == 0 else ["test"])

    def _create_test_split(self) -> None:
        """Leave the test split as it is: anomalib would take the normal images out of it."""

    def read_for(self, max_value: int | None) -> None:
        """Read 16 bits as a detector's training images were read, unless the data module was told otherwise.

        Args:
            max_value: The detector's: what white was in the files of 16 bits that it was trained on, if any.
        """
        if max_value == self.max_value:
            return
        if self._given_max_value is not None:
            logger.warning(
                "The detector was trained with max_value %s, and the data module has %s: taking the latter.",
                max_value,
                self._given_max_value,
            )
            return
        self.max_value = max_value
        for part in ("train_data", "val_data", "test_data"):
            if hasattr(self, part):
                getattr(self, part).read_for(max_value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: ``max_value``."""
        return {"max_value": self.max_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read as the training images of a checkpoint were read, by any detector."""
        self.read_for(state_dict["max_value"])

    def _begin_reading(self, training: Images, stage: str | None) -> None:
        """Find out what white is in files of 16 bits: as given, as the detector has it, as the training files show."""
        self._memory_left = 0 if stage == TrainerFn.PREDICTING else self.memory_limit_mib  # each is read just once
        detector: Any = None if stage == TrainerFn.FITTING else getattr(self.trainer, "lightning_module", None)
        if self._given_max_value is not None:
            return
        if hasattr(detector, "max_value"):
            self.max_value = detector.max_value
        elif training.pixels is None:
            self.max_value = plain_max_value(training.paths)
            if self.max_value is not None:
                logger.info(
                    "Files of 16 bits: white is taken to be %d, from the training images (max_value).", self.max_value
                )

    def _in_memory(self, images: Images) -> Images:
        """Keep files in memory if all splits together stay within the limit."""
        kept = replace(images, max_value=self.max_value).in_memory(self._memory_left)
        if images.pixels is None and kept.pixels is not None:
            self._memory_left -= kept.pixels.numel() / 2**20
        return kept


def _check_ranges(
    train_limit: int | None,
    test_limit: int | None,
    memory_limit_mib: int,
    max_value: int | None,
    val_ratio: float,
    test_ratio: float,
) -> None:
    """Refuse numbers that cannot work."""
    for name, limit in {"train_limit": train_limit, "test_limit": test_limit, "max_value": max_value}.items():
        if limit is not None and limit < 1:
            default = "as the files show" if name == "max_value" else "for all images"
            msg = f"{name} has to be at least 1 (or None, {default}), got {limit}."
            raise ValueError(msg)
    if memory_limit_mib < 0:
        msg = f"memory_limit_mib cannot be negative, got {memory_limit_mib}."
        raise ValueError(msg)
    for name, ratio in {"val_split_ratio": val_ratio, "test_split_ratio": test_ratio}.items():
        if not 0 < ratio < 1:
            msg = f"{name} has to lie between 0 and 1, got {ratio}."
            raise ValueError(msg)


def _train_and_val(
    module: Any, stage: str | None, images: Images, rows: np.ndarray, source: str, what: str
) -> tuple[SourcedDataset, SourcedDataset]:
    """Divide normal images into training and validation; both share one store.

    Validation images come from a part of ``rows`` that does not depend on ``train_limit``: those of one limit are never
    trained on with another.
    """
    count = len(rows) if module.train_limit is None else min(module.train_limit, len(rows))
    if count < 2:
        cause = f"train_limit={module.train_limit}" if len(rows) > 1 else f"the training split has {len(rows)}"
        msg = f"{what} needs at least 2 training images, of which one is for validation, but {cause}."
        raise ValueError(msg)

    def held_out(number: int) -> int:
        return min(max(1, round(module.val_split_ratio * number)), number - 1)

    order = np.random.default_rng(module.seed).permutation(rows)
    val = np.sort(order[: held_out(count)])
    train = np.sort(order[held_out(len(rows)) :][: count - len(val)])
    chosen = np.union1d(train, val)
    store = images.select(chosen)
    module._begin_reading(store, stage)
    store = module._in_memory(store)
    train_data, val_data = (
        SourcedDataset(
            store,
            label_index=LabelName.NORMAL,
            split=split.value,
            rows=np.searchsorted(chosen, part),
            source=source,
            name=module.name,
            category=module.category,
        )
        for split, part in ((Split.TRAIN, train), (Split.VAL, val))
    )
    return train_data, val_data
