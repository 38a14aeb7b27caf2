# SPDX-License-Identifier: Apache-2.0
"""What every torch model of a flow detector offers."""

from __future__ import annotations

from typing import ClassVar

import torch
from anomalib.data import InferenceBatch
from FrEIA.framework import SequenceINN
from torch import Tensor, nn

from anomalib_flowood import flows


class FlowModel(nn.Module):
    """A density of images, whose negative logarithm is the anomaly score.

    Args:
        flow: The flow: ``flow(x) -> (z, log_det)``, ``flow(z, rev=True)``.
        dims: Number of dimensions of what the density is over.
        levels: Quantisation levels per dimension: 256 for 8-bit pixels, 1 for values that were never quantised.
    """

    scores_are_likelihoods: ClassVar[bool] = True
    """Whether ``pred_score`` is −log p per dimension, as :meth:`score` makes it."""
    fitted: Tensor
    """Whether training has finished an epoch, or a checkpoint was loaded that had."""

    def __init__(self, flow: SequenceINN, dims: int, levels: int) -> None:
        super().__init__()
        self.flow = flow
        self.dims = dims
        self.levels = levels
        self.register_buffer("fitted", torch.tensor(False))

    def log_prob(self, images: Tensor) -> Tensor:
        """Log-density of pre-processed images, ``(N, C, H, W)``; nats, ``(N,)``."""
        raise NotImplementedError

    def bits_per_dim(self, images: Tensor) -> Tensor:
        """Bits per dimension, ``(N,)``; arguments and errors as for :meth:`log_prob`."""
        return flows.bits_per_dim(self.log_prob(images), self.dims, self.levels)

    def score(self, log_prob: Tensor) -> InferenceBatch:
        """Turn log-densities in nats, ``(N,)``, into anomaly scores.

        Returns:
            A batch whose ``pred_score`` is −log p per dimension, ``(N,)``: higher is more anomalous. Where the flow
            overflowed, so that there is no density, the score is infinite: the most anomalous one.
        """
        score = -log_prob / self.dims
        return InferenceBatch(pred_score=torch.where(torch.isnan(score), torch.full_like(score, float("inf")), score))

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score pre-processed images, ``(N, C, H, W)``; see :meth:`score`."""
        return self.score(self.log_prob(images))


def check_images(images: Tensor, *, unit_range: bool = False, size: tuple[int, int] | None = None) -> None:
    """Refuse images that cannot be scored. Skipped in exported graphs, which cannot raise.

    Args:
        images: Pre-processed images, ``(N, C, H, W)``.
        unit_range: Whether values must lie in [0, 1].
        size: Height and width that a model on a backbone was built for.

    Raises:
        ValueError: If a value is NaN or infinite, or outside of the range, or the images have another size.
    """
    if torch.compiler.is_compiling():
        return
    if size is not None and tuple(images.shape[2:]) != size:
        height, width = images.shape[2:]
        msg = (
            f"This model works on images of {size[0]} x {size[1]} pixels, got {height} x {width}. Keep the "
            "pre-processor's Resize, or set image_size."
        )
        raise ValueError(msg)
    # NaN and infinities survive a sum, which is much cheaper than a look at every value. A sum may also overflow.
    if not bool(images.sum().isfinite()):
        broken = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
        if broken:
            msg = f"Images {broken[:10]} of this batch have NaN or infinite pixels. Repair or remove them."
            raise ValueError(msg)
    if unit_range and images.numel() and bool((images.min() < -1e-3) | (images.max() > 1 + 1e-3)):
        msg = (
            f"Images must lie in [0, 1], got values from {images.min():.3g} to {images.max():.3g}. A flow on pixels "
            "takes no normalisation: pass a pre-processor that only resizes, or none."
        )
        raise ValueError(msg)
