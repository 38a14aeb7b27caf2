# SPDX-License-Identifier: Apache-2.0
"""Kinds of normal images, such as several products, which are found without labels and fitted separately."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from anomalib_flowood import flows, processes

logger = logging.getLogger(__name__)

_LOOKED_AT = 10_000
"""The most images among which kinds are looked for: all are compared with each other."""

_FITTED = 1000
"""The most images of a kind that others are compared with, and a whitening is fitted to; more only take longer."""

_SAME = 1e-5
"""As a share of the points' length: the distance up to which points are the same but for rounding."""


def pooled(features: Sequence[Tensor], like: Tensor) -> Tensor:
    """Describe images by what they contain, wherever it is: each layer's mean feature vector, of length 1.

    Args:
        features: Feature maps of some layers, ``(N, C, h, w)`` each, or their means, ``(N, C)``.
        like: A tensor of the device and precision that the result is to have.

    Returns:
        ``(N, P)``, with the sum P of the layers' channels.
    """
    means = [layer.to(like) if layer.ndim == 2 else layer.to(like).mean((2, 3)) for layer in features]
    return torch.cat([mean / torch.linalg.vector_norm(mean, dim=1, keepdim=True).clamp_min(1e-12) for mean in means], 1)


def kinds_of(points: Tensor, least: int) -> np.ndarray:
    """Find groups of points that are unconnected.

    They are the connected components of the graph that joins each point with its ``least - 1`` nearest ones, the
    symmetric k-nearest-neighbour graph (Maier et al. 2009, "Optimal construction of k-nearest-neighbor graphs for
    identifying noisy clusters", section 2): two groups are one as soon as a single point has a neighbour in the other.
    So each has at least ``least`` points, and there is no distance to choose. Equal points count as one: nothing can be
    fitted to mere copies of an image.

    Args:
        points: ``(n, P)``.
        least: The fewest points of a group, at least 2.

    Returns:
        The number of each point's group, ``(n,)``.
    """
    values = points.cpu().numpy()
    if len(values) < 2 * least:
        return np.zeros(len(values), dtype=np.int64)
    distances, nearest = NearestNeighbors(n_neighbors=least - 1).fit(values).kneighbors()
    same = _connected(nearest, distances <= _SAME * np.linalg.norm(values, axis=1).max())
    firsts = np.unique(same, return_index=True)[1]
    return kinds_of(points[firsts], least)[same] if len(firsts) < len(values) else _connected(nearest)


def _connected(nearest: np.ndarray, joined: np.ndarray | bool = True) -> np.ndarray:
    """Connected component of each point, ``(n,)``, by its nearest ones, ``(n, k)``, or only those that are joined."""
    rows, places = np.nonzero(np.broadcast_to(joined, nearest.shape))
    graph = coo_array((np.ones(len(rows)), (rows, nearest[rows, places])), shape=(len(nearest), len(nearest)))
    return connected_components(graph, directed=False)[1]


class Kinds(nn.Module):
    """Tells the kind of an image: that of the most similar training image.

    Args:
        least: The fewest training images of a kind; 0 if all images are of one kind.

    Raises:
        ValueError: If it is negative, 1 or 2: images of a kind are scored by fits to others of the kind.
    """

    points: Tensor | None
    """Training images as :func:`pooled` describes them, ``(R, P)``; a buffer; ``None`` with one kind."""
    of_points: Tensor | None
    """The index of each one's kind, ``(R,)``; a buffer."""
    _like: Tensor

    def __init__(self, least: int) -> None:
        super().__init__()
        if least < 0 or least in {1, 2}:
            msg = f"kind_images must be at least 3, or 0 for one kind, got {least}."
            raise ValueError(msg)
        self.least = least
        self.register_buffer("points", None)
        self.register_buffer("of_points", None)
        self.register_buffer("_like", torch.zeros(0), persistent=False)  # has the module's device and precision

    def fit(self, images: int, points: flows.Rows) -> list[Tensor]:
        """Find the kinds of training images.

        Args:
            images: Their number.
            points: What :func:`pooled` returns for them, ``(images, P)``.

        Returns:
            For each kind, the indices of the images that a whitening is fitted to.
        """
        self.forget()
        fitted = self.find(images, points)
        if len(fitted) > 1:
            self.points = flows.take(points, torch.cat(fitted)).to(self._like)
            sizes = torch.tensor([len(own) for own in fitted])
            self.of_points = torch.arange(len(fitted)).repeat_interleave(sizes).to(self._like.device)
        return fitted

    def find(self, images: int, points: flows.Rows) -> list[Tensor]:
        """Return the same as :meth:`fit`, and change nothing."""
        if not self.least:
            return [flows.draw(images, _FITTED)]
        looked_at = flows.draw(images, _LOOKED_AT)
        found = torch.from_numpy(kinds_of(flows.take(points, looked_at), self.least))
        own = [looked_at[found == kind] for kind in range(int(found.max()) + 1)]
        return [some[flows.draw(len(some), _FITTED)] for some in own]

    def forget(self) -> None:
        """Know only one kind."""
        self.points = self.of_points = None

    @flows.full_precision
    def forward(self, points: Tensor) -> Tensor | None:
        """Return the index of each image's kind, ``(N,)``, from what :func:`pooled` returns; ``None`` with one kind."""
        if self.points is None or self.of_points is None:
            return None
        # All have the same length, so the largest product is that with the nearest.
        return self.of_points[(points.to(self.points) @ self.points.T).argmax(1)]

    def of_features(self, features: Sequence[Tensor]) -> Tensor | None:
        """Return the same for features, which are only pooled if there are several kinds."""
        return None if self.points is None else self(pooled(features, like=self.points))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, dtype in (("points", self._like.dtype), ("of_points", torch.int64)):
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else self._like.new_empty(saved.shape, dtype=dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)


def fit_to_each(rows: Sequence[Tensor], fit: Callable[[Tensor], None], modules: Sequence[flows.ForEachKind]) -> None:
    """Fit modules to each kind, and let them hold all fits.

    Args:
        rows: The rows of each kind.
        fit: Fits the modules to given rows.
        modules: The modules.
    """
    fits = []
    for some in rows:
        fit(some)
        fits.append([module.fit_state() for module in modules])
    if len(rows) > 1:
        for module, of_kinds in zip(modules, zip(*fits, strict=True), strict=True):
            module.join(of_kinds)


def report(images: Sequence[int], what: str) -> None:
    """Log how many kinds there are, if there are several.

    Args:
        images: The number of images of each kind.
        what: What was fitted to each kind.
    """
    if len(images) > 1 and not processes.rank():
        logger.info(
            "The training images are of %d kinds that have nothing to do with each other, and %s was fitted to each "
            "kind separately: %s images. kind_images=0 treats all as one kind.",
            len(images),
            what,
            ", ".join(map(str, images)),
        )
