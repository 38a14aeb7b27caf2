# SPDX-License-Identifier: Apache-2.0
"""Which rows of the training features are fitted to, and which are scored by fits to others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from anomalib_flowood.models.components.folds import folds


class TrainingRows:
    """Rows of training images, which may have rotated copies, followed by those of damaged copies.

    A fit is to images and their rotated copies. Damaged copies are only scored, like the images that they were made
    of, by fits without all rows of these.

    Args:
        images: The number of images.
        copies: Consecutive rows of each image: itself and rotated copies, which are not independent of it.
        damaged: For each damaged copy the index of its image, ``(m,)``.
    """

    def __init__(self, images: int, copies: int = 1, damaged: Tensor | None = None) -> None:
        self.images, self.copies = images, copies
        self.damaged = torch.zeros(0, dtype=torch.int64) if damaged is None else damaged

    @property
    def fitted(self) -> int:
        """The number of rows that are fitted to, the first ones."""
        return self.images * self.copies

    @property
    def scored(self) -> Tensor:
        """The rows that the :meth:`folds` score, ``(n,)``, in their order."""
        return torch.cat([scored for _, _, scored in self.folds()])

    def apart(self, most: int) -> Iterator[slice]:
        """Yield all rows, at most so many at a time, and none that is fitted to together with a damaged copy.

        In a batch of others a row would be rounded otherwise.
        """
        every = self.fitted + len(self.damaged)
        for start, stop in ((0, self.fitted), (self.fitted, every)):
            yield from (slice(first, min(first + most, stop)) for first in range(start, stop, most))

    def folds(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the rows to fit to, those held out, and those to score: held-out images and their damaged copies."""
        for seen, held_out in folds(self.fitted, self.copies, self.damaged):
            images = held_out[:: self.copies]
            of_these = torch.isin(self.damaged, images // self.copies).nonzero().flatten()
            yield seen, held_out, torch.cat([images, self.fitted + of_these])

    def image(self, rows: Tensor) -> Tensor:
        """The index of the image that each row shows, ``(n,)``."""
        of_damaged = (rows - self.fitted).clamp(min=0)
        images = self.damaged[of_damaged] if len(self.damaged) else of_damaged
        return torch.where(rows < self.fitted, rows // self.copies, images)

    def undamaged(self, rows: Tensor) -> Tensor:
        """For each of some rows, ``(n,)``, the place among them of its image's own row: its own, if undamaged."""
        images, own = self.image(rows), (rows < self.fitted).nonzero().flatten()
        place = torch.zeros(self.images, dtype=torch.int64)
        place[images[own]] = own
        return place[images]
