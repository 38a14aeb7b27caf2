# SPDX-License-Identifier: Apache-2.0
"""Cutting large images into tiles, and combining the results of the tiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor
from torchvision.transforms.v2 import Normalize

from anomalib_flowood.features import backbone_config

AT_ONCE = 8
"""Tiles that the backbone sees at a time, for any number of images."""


class Tiles:
    """A grid of equal tiles that cover an image, evenly spaced, each within it.

    If tiles fit at the given stride, they are those of anomalib's :class:`~anomalib.data.utils.tiler.Tiler`, in its
    order, row by row. Otherwise the latter pads the image with black, which looks anomalous, while here tiles move
    closer together. It also holds all tiles of an image at once, twice.

    Args:
        image_size: Height and width of the images.
        size: Height and width of a tile.
        stride: The largest step from one tile to the next, down and to the right; the size of a tile by default.

    Raises:
        ValueError: If a tile is larger than the image, or a stride is larger than a tile, or not positive.
    """

    def __init__(
        self, image_size: tuple[int, int], size: tuple[int, int], stride: tuple[int, int] | None = None
    ) -> None:
        self.image_size, self.size, self.stride = image_size, size, stride or size
        if any(tile > length or tile < 1 for tile, length in zip(size, image_size, strict=True)):
            msg = f"tile_size {size} must be positive and not larger than image_size {image_size}, height and width."
            raise ValueError(msg)
        if any(not 1 <= step <= tile for step, tile in zip(self.stride, size, strict=True)):
            msg = f"tile_stride {stride} must be positive and not larger than tile_size {size}: it would leave gaps."
            raise ValueError(msg)
        self.rows, self.columns = map(_starts, image_size, size, self.stride)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __eq__(self, other: object) -> bool:
        """Whether other tiles, or an anomalib ``Tiler``, cut images in the same way."""
        if isinstance(other, Tiler):
            sizes = (other.tile_size_h, other.tile_size_w), (other.stride_h, other.stride_w)
            return sizes == (self.size, self.stride) and not other.remove_border_count
        return isinstance(other, Tiles) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def cut(self, image: Tensor, which: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Yield the tiles of an image, ``(C, H, W)``, in batches, ``(n, C, h, w)``.

        Args:
            image: The image.
            which: Indices of the wanted tiles, row by row; all by default.
        """
        height, width = self.size
        places = list(product(self.rows, self.columns))
        places = places if which is None else [places[place] for place in which]
        for start in range(0, len(places), AT_ONCE):
            yield torch.stack(
                [image[:, row : row + height, left : left + width] for row, left in places[start : start + AT_ONCE]]
            )

    def stitch(self, tiles: Iterable[Tensor]) -> Tensor:
        """Put tiles together, and average them where they overlap.

        Args:
            tiles: Results for the tiles of one image, in the order and the batches of :meth:`cut`: ``(n, C, h, w)``.

        Returns:
            The image, ``(C, H, W)``.
        """
        height, width = self.size
        whole: Tensor | None = None
        places = iter(product(self.rows, self.columns))
        for tile in (tile for part in tiles for tile in part):
            if whole is None:
                whole = tile.new_zeros(len(tile), *self.image_size)
            row, left = next(places)
            whole[:, row : row + height, left : left + width] += tile
        assert whole is not None  # there is at least one tile
        for starts, length, of_tile, dim in zip(
            (self.rows, self.columns), self.image_size, self.size, (1, 2), strict=True
        ):
            times = torch.zeros(length).to(whole)
            for start in starts:
                times[start : start + of_tile] += 1
            whole /= times[:, None] if dim == 1 else times
        return whole

    def joined(self, images: Iterable[Iterable[InferenceBatch]]) -> InferenceBatch:
        """Combine the results of tiles into those of images: the highest score, and the stitched map.

        Args:
            images: For each image the results of its tiles, in the batches of :meth:`cut`.
        """
        scores, maps = [], []
        for parts in images:
            highest: list[Tensor] = []
            maps.append(self.stitch(_maps(parts, highest)))
            scores.append(torch.stack(highest).amax())
        return InferenceBatch(pred_score=torch.stack(scores), anomaly_map=_stacked(maps))


def new_tiles(image_size: tuple[int, int], size: Sequence[int] | None, stride: Sequence[int] | None) -> Tiles | None:
    """Return the tiles of a size and stride; ``None`` for whole images. Errors as for :class:`Tiles`."""
    if size is None:
        if stride is not None:
            msg = f"tile_stride {tuple(stride)} needs a tile_size: without one images are not cut into tiles."
            raise ValueError(msg)
        return None
    height, width = size
    down, right = stride or size
    return Tiles(image_size, (height, width), (down, right))


def normalise_of(backbone: str) -> Normalize:
    """Return the normalisation with which a backbone was trained.

    With tiles it is done by the model: a normalised whole image would be another copy in memory.
    """
    config = backbone_config(backbone)
    return Normalize(config["mean"], config["std"])


def _maps(parts: Iterable[InferenceBatch], highest: list[Tensor]) -> Iterator[Tensor]:
    """Yield the maps of tiles, and append the highest score of each batch to a list."""
    for part in parts:
        assert part.pred_score is not None and part.anomaly_map is not None  # noqa: PT018
        highest.append(part.pred_score.amax())
        yield part.anomaly_map


def _stacked(maps: list[Tensor]) -> Tensor:
    """Stack maps, without a copy of a single large one."""
    return maps[0][None] if len(maps) == 1 else torch.stack(maps)


def _starts(length: int, tile: int, stride: int) -> list[int]:
    count = math.ceil((length - tile) / stride) + 1
    return [round(place * (length - tile) / max(1, count - 1)) for place in range(count)]
