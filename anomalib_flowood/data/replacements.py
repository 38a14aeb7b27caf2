# SPDX-License-Identifier: Apache-2.0
"""What is replaced in anomalib where it has no hook: what, why, and by what. There is no other place that does so.

Importing :mod:`anomalib_flowood.data` replaces all of it; once more, under :func:`importlib.reload`, changes nothing.
Written for anomalib 2.7, the only version that ``pyproject.toml`` allows; ``tests/data/test_replacements.py`` has tests
for each that say which version broke it, or made it superfluous.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib import data
from anomalib.data import utils
from anomalib.metrics import AnomalibMetric
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image import visualizer
from torchvision.transforms.v2.functional import to_dtype, to_image

from anomalib_flowood.data.decoding import read_image
from anomalib_flowood.data.items import SourcedImageBatch, with_known_masks
from anomalib_flowood.data.path_dataset import PathDataset
from anomalib_flowood.data.pictures import as_read, save_pictures


@dataclass(frozen=True)
class Replacement:
    """Something that anomalib does and that we do otherwise.

    Attributes:
        owner: Module or class of anomalib.
        name: What is replaced in it.
        make: Makes what takes its place of what anomalib has there.
        why: What anomalib does not do.
        holders: What the names of those modules begin with that have imported it, where it has to be replaced, too.
            Those that are not imported yet, or are just being imported, will find it in ``owner``.
    """

    owner: Any
    name: str
    make: Callable[[Any], Any]
    why: str
    holders: str | None = None

    @property
    def original(self) -> Any:
        """What anomalib has there.

        Raises:
            ImportError: If the installed version of anomalib has nothing of that name.
        """
        if not hasattr(self.owner, self.name):
            msg = (
                f"anomalib {version('anomalib')} has no {self.owner.__name__}.{self.name}, which is replaced since "
                f"{self.why}. Install the version that pyproject.toml of anomalib-flowood names."
            )
            raise ImportError(msg)
        return vars(self.owner).get(self._kept, getattr(self.owner, self.name))

    @property
    def _kept(self) -> str:
        """Where the original is kept: not in this module, which may be imported again."""
        return f"_{self.name}_of_anomalib"

    def replace(self) -> None:
        """Replace it, or what has replaced it before."""
        original, current = self.original, getattr(self.owner, self.name)
        new = self.make(original)
        setattr(self.owner, self._kept, original)
        setattr(self.owner, self.name, new)
        for name, module in list(sys.modules.items()):
            if self.holders and name.startswith(self.holders) and getattr(module, self.name, None) is current:
                setattr(module, self.name, new)


def _read_image(path: str | Path, as_tensor: bool = False) -> torch.Tensor | np.ndarray:
    """Read an RGB image, as anomalib's function of this name does, but by our reader.

    Args:
        path: Path of the file.
        as_tensor: Whether to return a tensor of shape ``(3, H, W)``, ``float32``, and not an array ``(H, W, 3)``.

    Returns:
        The image in [0, 1]. One of 8 bits is what anomalib reads, number by number.

    Raises:
        UnreadableImageError: As for :func:`~anomalib_flowood.data.decoding.read_image`.
    """
    image = read_image(path)
    image = image.expand(3, *image.shape[1:])
    if as_tensor:
        return to_dtype(to_image(image), torch.float32, scale=True)
    return image.permute(1, 2, 0).numpy() / 255.0


def _drawing_what_was_read(draw: Callable) -> Callable:
    @functools.wraps(draw)
    def visualize_image_item(item: Any, *args: Any, **kwargs: Any) -> Any:
        return draw(as_read(item), *args, **kwargs)

    return visualize_image_item


def _where_masks_are_known(update: Callable) -> Callable:
    @functools.wraps(update)
    def update_where_masks_are_known(self: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        of_pixels = "gt_mask" in self.fields and isinstance(batch, SourcedImageBatch)
        known = with_known_masks(batch, self.fields) if of_pixels else batch
        if known is None:
            self._update_count -= 1  # as anomalib does where it passes over a batch
            return
        update(self, known, *args, **kwargs)

    return update_where_masks_are_known


def _naming_this_package(reduce: Callable) -> Callable:
    @functools.wraps(reduce)
    def reduce_naming_this_package(self: Any, protocol: Any) -> Any:
        make, arguments, *state = reduce(self, protocol)
        return _made, (make, arguments), *state

    return reduce_naming_this_package


def _made(make: Callable, arguments: tuple) -> Any:
    """Make an object anew; whoever looks for this function imports this module, and so has replaced all of it."""
    return make(*arguments)


REPLACEMENTS = (
    Replacement(
        utils,
        "read_image",
        lambda _: _read_image,
        "it clips 16 bits and floats, ignores how the camera was held, and hangs on a pipe",
        holders="anomalib.",
    ),
    Replacement(
        data,
        "PredictDataset",
        lambda _: PathDataset,
        "it finds images by another rule than training, and knows neither the detector's size nor its white",
        holders="anomalib.engine.",
    ),
    Replacement(
        visualizer,
        "visualize_image_item",
        _drawing_what_was_read,
        "it opens files again by a reader of its own, and fails where an image has no file",
    ),
    Replacement(
        ImageVisualizer,
        "on_test_batch_end",
        lambda _: save_pictures,
        "it names a picture after the image's file and its last folder, so that lot2/good/000.png overwrites "
        "lot1/good/000.png",
    ),
    Replacement(
        AnomalibMetric,
        "update",
        _where_masks_are_known,
        "it takes all pixels of an anomalous image without a mask for normal ones",
    ),
    Replacement(
        data.AnomalibDataset,
        "__reduce_ex__",
        _naming_this_package,
        "a worker process that is no fork of this one, as on macOS, Windows and from Python 3.14 on, imports what its "
        "data set is made of alone, and would read images by anomalib's reader",
    ),
)
"""All that is replaced."""


def replace_in_anomalib() -> None:
    """Replace all of it.

    Raises:
        ImportError: If the installed version of anomalib lacks something of it.
    """
    for replacement in REPLACEMENTS:
        replacement.replace()
