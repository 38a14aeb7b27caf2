# SPDX-License-Identifier: Apache-2.0
"""What both data modules share: their sources, their splits, what memory they take, what white is in 16 bits."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName, Split, ValSplitMode
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_flowood.checks import check_loading
from anomalib_flowood.data.datamodules.splits import MOST_IMAGES, held_out, limited, needed_for, train_and_val
from anomalib_flowood.data.datasets import SourcedDataset
from anomalib_flowood.data.decoding import plain_max_value
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.path_dataset import takes_bytes
from anomalib_flowood.data.sources import FolderSource, Source

logger = logging.getLogger(__name__)

_LONGEST = 200
"""Bytes of the name of a folder of results; files in it may be named by it, too."""
_DIGITS = 8


class SourcedDataModule(AnomalibDataModule):
    """What both data modules share.

    They name anomalib's class among their bases all the same: its list of data modules has direct subclasses alone.
    """

    _sources: list[Source]
    _validation: Path | None = None
    """The folder of images that are for validation, if there is one and it is used."""

    def __init__(
        self,
        *,
        root: str | Path,
        train_limit: int | None,
        test_limit: int | None,
        test_split_ratio: float,
        val_split_ratio: float | None,
        memory_limit_mib: int,
        max_value: int | None,
        seed: int,
        **loading: Any,
    ) -> None:
        super().__init__(
            val_split_mode=ValSplitMode.FROM_DIR,  # anomalib's word for "there is one already"
            val_split_ratio=val_split_ratio,
            test_split_ratio=test_split_ratio,
            seed=seed,
            **loading,
        )
        check_loading(self)
        _check_ranges(train_limit, test_limit, memory_limit_mib, max_value, val_split_ratio, test_split_ratio)
        # For anomalib none is a half.
        self.val_split_ratio = val_split_ratio  # type: ignore[assignment]
        self.root = root
        self.train_limit = train_limit
        self.test_limit = test_limit
        self.memory_limit_mib = memory_limit_mib
        self.max_value = self._given_max_value = max_value
        self._memory_left: float = memory_limit_mib

    @property
    def eval_batch_size(self) -> int:
        """Images in a batch that is not trained on: as many as were asked for; one, for detectors of large images."""
        detector = getattr(self.trainer, "lightning_module", None)
        return 1 if getattr(detector, "images_at_once", None) == 1 else self._eval_batch_size

    @eval_batch_size.setter
    def eval_batch_size(self, images: int) -> None:
        self._eval_batch_size = images

    def _update_augmentations(self) -> None:
        """Resize as the trainer's detector does, and leave images in 8 bits for those that take them so."""
        super()._update_augmentations()
        detector: Any = getattr(self.trainer, "lightning_module", None)
        for part in ("train_data", "val_data", "test_data"):
            if hasattr(self, part):
                getattr(self, part).keep_bytes = takes_bytes(detector)

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
        """Read 16 bits as a detector's training images were read, by its ``max_value``, unless told otherwise."""
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

    def _hold_out(
        self, images: Images, rows: np.ndarray, source: str, what: str, stage: str | None, normal: str | None = None
    ) -> None:
        """Divide normal images into training and validation, unless their folder has some for validation.

        Args:
            images: The training split.
            rows: Positions of the normal images in it.
            source: What to call their source.
            what: What to call them in errors.
            stage: Lightning's.
            normal: Name of the normal class; ``None`` if all images of the source are normal.

        Raises:
            ValueError: If there are fewer than two to divide.
        """
        given = self._kept_for_validation(normal, stage)
        if not given and min(len(rows), self.train_limit or len(rows)) < 2:
            cause = f"train_limit={self.train_limit}" if len(rows) > 1 else f"the training split has {len(rows)}"
            msg = f"{what} needs at least 2 training images, of which one is for validation, but {cause}."
            raise ValueError(msg)
        if given:
            fitted = images.select(limited(rows, self.train_limit, self.seed))
            numbers = len(fitted), len(given)
            logger.info("%s: %d images to fit to; the %d in %s calibrate.", what, *numbers, self._validation)
            self._begin_reading(fitted, stage)
            stores = [self._in_memory(fitted), self._in_memory(given)]
            places = [np.arange(number) for number in numbers]
        else:
            parts = train_and_val(rows, self.train_limit, self.val_split_ratio, self.seed)
            logger.info("%s: %d images to fit to, %d held out to calibrate on.", what, *map(len, parts))
            chosen = np.union1d(*parts)
            store = images.select(chosen)
            self._begin_reading(store, stage)
            stores = [self._in_memory(store)] * 2
            places = [np.searchsorted(chosen, part) for part in parts]
        self.train_data, self.val_data = (
            self._dataset(store, LabelName.NORMAL, split, source, of_split)
            for store, split, of_split in zip(stores, (Split.TRAIN, Split.VAL), places, strict=True)
        )

    def _kept_for_validation(self, normal: str | None, stage: str | None) -> Images | None:
        """Normal images that a folder has for validation, unless a share is to be held out; warn of what is unread."""
        source, self._validation = self._sources[0], None
        if not isinstance(source, FolderSource):
            return None
        name, given = (source.read_validation(normal) if self.val_split_ratio is None else None) or ("", None)
        self._validation = source.folder / name if given else None
        unread = source.left_out([name]) if stage in {None, "fit"} else []
        if unread:
            logger.warning(
                "Of %s, only train, %stest and masks are read, not %s. Images %s calibrate: put further normal ones "
                "there.",
                source.name,
                f"{name}, " if name else "",
                ", ".join(unread),
                f"in {name}" if name else "that are held out of train (val_split_ratio)",
            )
        return given

    def how_to_hold_out(self, images: int) -> str:
        """Say what makes so many validation images of those that there are, for messages."""
        fitted = len(self.train_data)
        if self._validation:
            there = len(self.val_data)
            advice = f"put {images - there} more normal images to the {there} in {self._validation}"
            if held_out(fitted, None) >= images:
                advice += f", or set val_split_ratio to hold out a share of the {fitted} training images in their place"
            return advice
        total = fitted + len(self.val_data)
        needed = needed_for(images, self.val_split_ratio, total)
        if self.train_limit == total:
            advice = f"raise train_limit to {needed}, if there are so many normal images"
        else:
            source, tested = self._sources[0], 0
            if isinstance(source, FolderSource) and source.divided:  # of more images more become test images
                tested = int((self.test_data.samples["label_index"] == LabelName.NORMAL).sum())
                numbers = range(needed, MOST_IMAGES)
                needed += bisect_left(numbers, needed, key=lambda number: number - source.tested(number))
            there, used = total + tested, f"fitted to: {fitted}" + (f", tested on: {tested}" if tested else "")
            advice = f"give {needed - there} more normal images to the {there} that there are ({used})"
        if total > images:
            share = math.ceil(100 * images / total) / 100
            advice += f", or set val_split_ratio to {share:g}, which leaves {total - images} to fit to"
        return advice

    def _dataset(
        self,
        images: Images,
        label_index: np.ndarray | int,
        split: Split,
        source: Sequence[str] | str,
        rows: np.ndarray | None = None,
    ) -> SourcedDataset:
        return SourcedDataset(images, label_index, split.value, rows, source, self.name, self.category)

    def _begin_reading(self, training: Images, stage: str | None) -> None:
        """Find out what white is in files of 16 bits: as given, as the detector has it, as the training files show."""
        detector: Any = getattr(self.trainer, "lightning_module", None)
        once = stage == TrainerFn.PREDICTING or takes_bytes(detector)  # each image is read just once, or is large
        self._memory_left = 0 if once else self.memory_limit_mib
        if self._given_max_value is not None:
            return
        if stage != TrainerFn.FITTING and hasattr(detector, "max_value"):
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
    val_ratio: float | None,
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
        if ratio is not None and not 0 < ratio < 1:
            msg = f"{name} has to lie between 0 and 1, got {ratio}."
            raise ValueError(msg)


def folder_name(*parts: str) -> str:
    """Name a folder by data sets and classes, the first of which is the normal one: ``parts-wood+steel``.

    What a name cannot hold is left out (``T-shirt/top`` has a slash), and many sets or long names are cut off: file
    systems take 255 bytes. A digest then tells names apart that begin alike.
    """
    first, *others = [re.sub(r"[^\w.-]+", "_", part) for part in parts]
    whole = f"{first}-{'+'.join(others)}" if others else first
    encoded = whole.encode()
    if len(encoded) <= _LONGEST:
        return whole
    digest = hashlib.sha256(encoded).hexdigest()[:_DIGITS]
    return f"{encoded[: _LONGEST - _DIGITS - 1].decode(errors='ignore')}-{digest}"
