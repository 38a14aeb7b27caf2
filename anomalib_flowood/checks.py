# SPDX-License-Identifier: Apache-2.0
"""Checks of scores, sizes, batches and data loading that several parts share."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def refuse_nan(scores: Tensor | np.ndarray, what: str = "scores", first: Callable[[int], str] | None = None) -> None:
    """Refuse scores that are NaN, and so cannot be ranked; infinite ones can.

    Args:
        scores: Scores of any shape.
        what: What users call them, in the plural.
        first: Names what a score is of, from its index; the error names the first NaN so.

    Raises:
        ValueError: If a score is NaN.
    """
    nans = np.isnan(scores) if isinstance(scores, np.ndarray) else scores.isnan().cpu().numpy()
    count = int(nans.sum())
    if count:
        which = f", the first of {first(int(np.flatnonzero(nans)[0]))}" if first else ""
        msg = f"{count} of {nans.size} {what} are NaN: they cannot be ranked{which}. Has the training diverged?"
        raise ValueError(msg)


_MOST = {
    "bank_size": 65_536,
    "cache_gib": 2**20,
    "coupling_layers": 1_000,
    "feature_noise": 1e6,
    "hidden_channels": 65_536,
    "bottleneck_dim": 65_536,
    "kind_images": 65_536,
    "layout_dims": 65_536,
    "map_dims": 65_536,
    "modes": 65_536,
    "subspace_dim": 65_536,
}
"""The largest values of arguments that are sizes: far more than is of use, and still possible to build."""


def check_sizes(arguments: Mapping[str, Any]) -> None:
    """Refuse sizes that nobody means, before anything is built.

    Args:
        arguments: A detector's arguments by name; a size that is ``None`` is the detector's own choice.

    Raises:
        ValueError: If a size is too large, or NaN; ``cache_gib`` also if it is negative.
    """
    for argument, most in _MOST.items():
        value = arguments.get(argument)
        if value is None:
            continue
        if not value <= most:
            msg = f"{argument} must be at most {most:,.0f}, got {value}."
            raise ValueError(msg)
        if argument == "cache_gib" and value < 0:
            msg = f"cache_gib must be at least 0, got {value}."
            raise ValueError(msg)


SINGLE_IMAGES = (
    "A detector takes batches, and this DataLoader gives images one by one (batch_size None): give it a batch_size, 1 "
    "for batches of one."
)
"""Said of a loader that makes no batches."""


def check_batch(batch: Any) -> None:
    """Refuse batches that are not anomalib's, before anything asks them for images.

    Args:
        batch: What a loader returned.

    Raises:
        TypeError: If it is something else, or a single item.
    """
    if hasattr(batch, "gt_label") and not hasattr(batch, "batch_size"):
        raise TypeError(SINGLE_IMAGES)
    if not hasattr(batch, "gt_label"):
        msg = (
            f"A detector takes anomalib's batches (ImageBatch), got {type(batch).__name__}: give a data module "
            "(OneClass, anomalib's Folder), or loaders of data sets of anomalib's kind (DataLoader(…, "
            "collate_fn=dataset.collate_fn))."
        )
        raise TypeError(msg)


_TOO_BRIGHT = 10.0
"""Floats above it are no image in [0, 1], whatever an interpolation, or a normalisation before ours, makes of one."""


def check_range(images: Tensor) -> None:
    """Refuse floats that are not divided by what white is: a backbone would take them without a word.

    Args:
        images: Images before any pre-processing, of any shape; NaN and infinities are others' to refuse.

    Raises:
        ValueError: If they run far beyond 1.
    """
    if not images.is_floating_point() or not images.numel():
        return
    brightest = float(images.detach().amax())
    if _TOO_BRIGHT < brightest < math.inf:
        msg = (
            f"Floats of images lie in [0, 1], and these run to {brightest:g}: divide them by what white is (8 bits by "
            "255), or let anomalib_flowood.load(…).score read images of any kind."
        )
        raise ValueError(msg)


_LEAST = {"train_batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "seed": 0}


def check_loading(data: Any) -> None:
    """Refuse batch sizes, numbers of workers and seeds that PyTorch does not take, by the argument's name.

    Args:
        data: A data module, anomalib's or ours; arguments that it lacks are not checked.

    Raises:
        ValueError: If a batch has no images, there are fewer than 0 workers, or a seed is negative.
    """
    for argument, least in _LEAST.items():
        value = getattr(data, argument, None)
        if value is not None and value < least:
            msg = f"{argument} of {type(data).__name__} has to be at least {least}, got {value}."
            raise ValueError(msg)


def check_workers(data: Any) -> None:
    """Refuse workers of a data loader on a machine without the shared memory that they need.

    Args:
        data: As for :func:`check_loading`.

    Raises:
        OSError: If there is none; the message says what helps.
    """
    if not getattr(data, "num_workers", 0):
        return
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise OSError(no_shared_memory(str(error))) from error


def no_shared_memory(reason: str) -> str:
    """Say what helps where the workers of a data loader cannot share what they read.

    Args:
        reason: What the system or PyTorch says.
    """
    return (
        f"The processes that read images got no shared memory: {reason.rstrip('.')}. Read without them "
        "(--data.num_workers 0), or mount a larger /dev/shm (docker run --shm-size 2g)."
    )


def refuse_infinite(values: Tensor, images: str, what: str, so: str) -> None:
    """Refuse values to which nothing can be fitted.

    Args:
        values: The values of each image, ``(N, …)``.
        images: Which images these are: ``"training"``, say.
        what: What users call a value.
        so: What cannot be done, as the end of a sentence.

    Raises:
        ValueError: If a value is NaN or infinite; the message counts the images.
    """
    broken = int((~values.isfinite()).flatten(1).any(1).sum())
    if broken:
        msg = (
            f"{broken} of {len(values)} {images} images have a NaN or infinite {what}, so {so}. Lower the learning "
            f"rate, or look for broken {images} images."
        )
        raise ValueError(msg)
