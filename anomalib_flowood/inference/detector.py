# SPDX-License-Identifier: Apache-2.0
"""A loaded detector, and the scores that it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomalib_flowood import conformal
from anomalib_flowood.checks import refuse_nan
from anomalib_flowood.data.datasets import mapped, threads_to_read
from anomalib_flowood.inference.images import SingleImage, of_single, resized, single_images
from anomalib_flowood.models.components.export_check import Runtime

BATCH_SIZE = 32
"""The most images that are in memory at once."""

ReadImage = tuple[str, np.ndarray]
"""The path of an image, and the image, ``(3, H, W)``."""


@dataclass(frozen=True)
class Scores:
    """Scores and decisions for N images, in the order in which they were given.

    Attributes:
        paths: Their files; empty strings where there are none.
        score: In [0, 1], above 0.5 exactly where the label is 1, ``(N,)``; the raw score without a calibration.
        raw_score: What the detector computes, and p-values are based on, ``(N,)``; higher is more anomalous.
        p_value: Conformal p-values, ``(N,)``, float64: :func:`anomalib_flowood.conformal.p_values`; ``None`` without a
            calibration. ``p_value <= level`` is the label at any level.
        label: Whether they are anomalous at the detector's level, ``(N,)``; ``None`` without a calibration.
        anomaly_map: In [0, 1], with 0.5 at the threshold of pixels, ``(N, H, W)`` at the detector's size; ``None`` of
            detectors of whole images.
    """

    paths: tuple[str, ...]
    score: np.ndarray
    raw_score: np.ndarray
    p_value: np.ndarray | None
    label: np.ndarray | None
    anomaly_map: np.ndarray | None

    def __len__(self) -> int:
        return len(self.paths)


class Detector:
    """A trained detector that scores images: :func:`anomalib_flowood.load` makes one.

    Args:
        runtime: Computes the outputs.
        size: Height and width that images are resized to first, or the shorter side alone, which keeps the aspect;
            ``None`` leaves them as they are.
        calibration: Raw scores of normal images, ``(n,)``; empty without a calibration.
        level: The largest p-value that is labelled anomalous.
        max_value: The value of white in 16-bit files in training.
        left_out: Raw scores of held-out images that may be anomalies: only drift is tested with them.
        again: A function and its arguments that make the same detector. It is pickled as these, since runtimes cannot
            be pickled.
    """

    def __init__(
        self,
        runtime: Runtime,
        size: tuple[int, ...] | None,
        calibration: Sequence[float] = (),
        level: float | None = None,
        max_value: int | None = None,
        again: tuple[Callable[..., Detector], tuple[Any, ...]] | None = None,
        left_out: Sequence[float] = (),
    ) -> None:
        self.runtime = runtime
        self.size = size
        self.calibration = torch.tensor(calibration, dtype=torch.float64)
        self._ascending = np.sort(self.calibration.numpy())
        self._held_out = torch.tensor([*calibration, *left_out], dtype=torch.float64)
        self.level = level
        self.max_value = max_value
        self.again = again

    def __reduce__(self) -> tuple[Callable[..., Detector], tuple[Any, ...]]:
        """Pickle as the function that makes it again: from the same file, which has to be there."""
        if self.again is None:
            msg = "A Detector of a runtime of your own cannot be pickled: make it in each process."
            raise TypeError(msg)
        return self.again

    def score(self, images: Any, *, maps: bool = True) -> Scores:
        """Score images, one or many.

        Args:
            images: Files, folders, arrays, tensors, Pillow images, or any iterable of these, a generator too: see
                :func:`~anomalib_flowood.inference.images.each_image`.
            maps: Whether to keep anomaly maps, which take most of the memory: 200 KB per image of 224 x 224 pixels.

        Returns:
            The scores, with a first axis even for a single image.

        Raises:
            FileNotFoundError: If a folder holds no image.
            UnreadableImageError: If a file cannot be read; it names it.
            ValueError: If an array has no shape or values of images, or an image has no score.
            TypeError: If something is no image.
        """
        parts = [part if maps else replace(part, anomaly_map=None) for part in self.score_batches(images)]
        if not parts:
            none = np.empty(0, dtype=np.float32)
            calibrated = len(self.calibration) > 0
            return Scores(
                (), none, none, none.astype(float) if calibrated else None, none > 0 if calibrated else None, None
            )
        if len(parts) == 1:
            return parts[0]
        columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0]) if name != "paths"}
        joined: Any = {name: None if column[0] is None else np.concatenate(column) for name, column in columns.items()}
        return Scores(paths=tuple(chain.from_iterable(part.paths for part in parts)), **joined)

    def score_batches(self, images: Any) -> Iterator[Scores]:
        """Score images batch by batch, with no more than 32 in memory.

        Arguments and errors as for :meth:`score`.

        Yields:
            The scores of the next images.
        """
        read = self.read(images)
        while chunk := list(islice(read, self.images_at_once)):
            yield from self.score_read(chunk)

    @property
    def images_at_once(self) -> int:
        """The most images that are scored together: 32, or the batch size of a graph that has one."""
        return self.runtime.shape[0] or BATCH_SIZE

    def read(self, images: Any) -> Iterator[ReadImage]:
        """Read images, and resize them as training did, without scoring them.

        Files are read in up to four threads, no more than :attr:`images_at_once` ahead.

        Arguments and errors as for :meth:`score`.

        Yields:
            The path, empty where there is none, and the image, ``(3, H, W)``, float32 in [0, 1]; of a detector with
            tiles it may be uint8, which takes a quarter of the memory.
        """
        _, _, height, width = self.runtime.shape
        size = self.size
        if size and (height or width):  # a graph of a fixed size
            size = (height or size[0], width or size[-1])

        def read(image: SingleImage) -> ReadImage:
            path, pixels = of_single(image, self.max_value)
            return path, resized(pixels, size, keep_bytes=self.runtime.takes_bytes)  # large ones in strips

        single = single_images(images)
        while some := list(islice(single, self.images_at_once)):
            of_files = all(isinstance(image, str | Path | bytes) for image in some)
            yield from mapped(read, some, threads_to_read() if of_files else 1)

    def score_read(self, images: Sequence[ReadImage]) -> Iterator[Scores]:
        """Score images that :meth:`read` gave, :attr:`images_at_once` at most.

        Yields:
            The scores of all of them, or of one after the other if their sizes differ.

        Raises:
            ValueError: If an image has no score.
        """
        paths = tuple(path for path, _ in images)
        pixels = [image for _, image in images]
        if len({image.shape for image in pixels}) > 1:  # a detector without a size of its own
            for path, image in images:
                yield self._scores((path,), image[None])
        else:
            yield self._scores(paths, np.stack(pixels) if len(pixels) > 1 else pixels[0][None])

    def drift_p_value(self, raw_scores: np.ndarray) -> float:
        """Test whether images, together, are like normal ones: :func:`anomalib_flowood.conformal.drift_p_value`."""
        return conformal.drift_p_value(self._held_out, torch.from_numpy(np.asarray(raw_scores, dtype=np.float64)))

    def _scores(self, paths: tuple[str, ...], images: np.ndarray) -> Scores:
        given = len(images)
        count = self.runtime.shape[0] or given
        if given < count:  # a graph of a fixed batch size
            images = np.concatenate([images, np.repeat(images[-1:], count - given, axis=0)])
        outputs = {name: np.asarray(value)[:given] for name, value in self.runtime.run(images).items()}
        score = outputs["pred_score"].reshape(given)
        raw = outputs.get("raw_score", score).reshape(given)
        refuse_nan(raw)
        maps = outputs.get("anomaly_map")
        p_value = label = None
        if len(self.calibration):
            p_value = conformal.p_values_among(self._ascending, raw.astype(np.float64))
            label = p_value <= self.level
        maps = None if maps is None else maps.reshape(given, *maps.shape[-2:])
        return Scores(paths, score, raw, p_value, label, maps)
