# SPDX-License-Identifier: Apache-2.0
"""How much rarer the content of a map's positions is than usual where they lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anomalib_flowood import flows

from .nearest_patches import ALIKE

_AROUND = 2
"""Rows and columns around a position that are not elsewhere in its image: a defect covers several positions."""
_EVERY = 2
"""Least step, in rows and columns, between the positions that others are compared with: if a defect is larger, fewer of
its own positions are among them."""
_MOST = 1000
"""Most positions that others are compared with; larger maps take larger steps."""


class RarePatches(flows.ForEachKind):
    """How much farther each position is from everything normal, and from the rest of its image, than usual there.

    No memory bank holds all textures and layouts, least of all one of few images. But what occurs in several places of
    an image is hardly a defect. With d(p) the distance of a position p to the nearest one in a memory bank, and x(p)
    its vector::

        e(p) = min(d(p), min over q of |x(p) - x(q)|)
        a(p) = e(p) - mean of e(p) over normal images

    where q are positions of the same image more than two rows or columns away, in every second row and column. The
    mean, one for each position, is subtracted since an edge or a label is rare in normal images, too, but always in the
    same place.

    Args:
        size: ``(h, w)`` of the maps.
    """

    usual: Tensor
    """Mean of e(p) over normal images, ``(h, w)``; a buffer."""
    near: Tensor
    """Whether positions q are too near to p, ``(Q, h * w)``; a buffer that is not saved."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.of_kind = {"usual": 2}
        self.register_buffer("usual", torch.zeros(size))
        self.step = _EVERY
        while math.prod(-(-side // self.step) for side in size) > _MOST:
            self.step += 1
        places = torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij")
        apart = [(axis[:: self.step, :: self.step].flatten()[:, None] - axis.flatten()).abs() for axis in places]
        self.register_buffer("near", torch.maximum(*apart) <= _AROUND, persistent=False)

    def fit(self, maps: Tensor, distances: Tensor, undamaged: Tensor | None = None) -> Tensor:
        """Set what is usual.

        Args:
            maps: Reduced maps of images, ``(m, D, h, w)``.
            distances: d, ``(m, h, w)``, to positions of other images.
            undamaged: For each row that of its image before it was damaged, its own if it is not, ``(m,)``; by default
                none is damaged.

        Returns:
            a, ``(m, h, w)``, each image's from the mean over the others.
        """
        rare = self._rare(maps.to(distances), distances)
        every = torch.arange(len(rare))
        undamaged = every if undamaged is None else undamaged
        normal = rare[undamaged == every]
        self.usual = normal.mean(0)
        return rare - self.usual + (rare[undamaged] - self.usual) / max(1, len(normal) - 1)

    def forget(self) -> None:
        """Forget what is usual."""
        self.usual = self.usual.new_zeros(self.usual.shape[-2:])

    def forward(self, maps: Tensor, distances: Tensor, kind: Tensor | None = None) -> Tensor:
        """Return a.

        Args:
            maps: Reduced maps, ``(N, D, h, w)``.
            distances: d, ``(N, h, w)``.
            kind: The index of each image's kind, ``(N,)``, if there are several.

        Returns:
            ``(N, h, w)``, in the unit of distances; about 0 at normal positions.
        """
        return self._rare(maps, distances) - (self.usual if kind is None else self.usual[kind])

    @flows.full_precision
    def _rare(self, maps: Tensor, distances: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.minimum(distances, self._elsewhere(maps))
        # One by one: of several images the products would not fit into a processor's cache.
        return torch.minimum(distances, torch.cat([self._elsewhere(one) for one in maps.split(1)]))

    def _elsewhere(self, maps: Tensor) -> Tensor:
        """Return the least ``|x(p) - x(q)|``, ``(N, h, w)``; infinite where all q are too near."""
        vectors, others = maps.flatten(2), maps[:, :, :: self.step, :: self.step].flatten(2)
        # |x - y|^2 = |x|^2 - 2 (x·y - |y|^2 / 2)
        similarity = torch.baddbmm(-0.5 * others.square().sum(1)[:, :, None], others.mT, vectors)
        square, nearest = vectors.square().sum(1), similarity.masked_fill_(self.near, -torch.inf).amax(1)
        return torch.maximum(square - 2 * nearest, ALIKE * square).sqrt().unflatten(1, maps.shape[2:])
