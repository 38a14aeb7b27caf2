# SPDX-License-Identifier: Apache-2.0
"""The base class of the detectors' torch models."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import ClassVar

import torch
from anomalib.data import InferenceBatch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from anomalib_flowood import flows
from anomalib_flowood.scores import SCORES, NegativeLogLikelihood, Score
from anomalib_flowood.scores.score import Inputs


class FlowModel(nn.Module):
    """A density of images, and an anomaly score from it: what comes before the flow, the flow, and its base.

    Subclasses implement :meth:`inputs`.

    Args:
        new_flow: Makes a flow: ``flow(x) -> (z, log_det)``, ``flow(z, rev=True)``. Scores that compare several flows
            call it again.
        base: The distribution of its latents, a module of :mod:`anomalib_flowood.flows.bases` or like them.
        dims: Number of dimensions of what the density is over.
        levels: Quantisation levels per dimension: 256 for 8-bit pixels, 1 for values that were never quantised.
        score: One of :data:`anomalib_flowood.scores.SCORES`.

    Raises:
        ValueError: If the score is unknown, or works on pixels and the density does not.
    """

    reads_pixels: ClassVar[bool] = False
    parts: ClassVar[int] = 2
    new_flow: Callable[[], InvertibleModule]
    """Makes one more flow of the same architecture, with weights of its own."""
    fitted: Tensor
    """Whether it was trained and its scores mean something: a fit has validated it or finished an epoch."""

    def __init__(
        self,
        new_flow: Callable[[], InvertibleModule],
        base: flows.Base,
        dims: int,
        levels: int,
        score: str = "nll",
    ) -> None:
        super().__init__()
        score_class = SCORES[score]
        self.flow = new_flow()
        self.base = base
        self.dims = dims
        self.levels = levels
        self.new_flow = new_flow
        self.register_buffer("fitted", torch.tensor(False))
        self.scorer = score_class(self)
        self.nll = NegativeLogLikelihood(self)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the density."""
        tensors = chain(self.parameters(), self.buffers())
        return next(tensor.dtype for tensor in tensors if tensor.is_floating_point())

    @property
    def trained_flows(self) -> list[InvertibleModule]:
        """All flows that training changes: the detector's, and those of its score."""
        return [self.flow, *self.scorer.flows]

    @property
    def scores_are_likelihoods(self) -> bool:
        """Whether ``pred_score`` is −log p per dimension, nats."""
        return isinstance(self.scorer, NegativeLogLikelihood)

    def inputs(self, images: Tensor) -> Inputs:
        """Prepare images for :meth:`density`.

        Args:
            images: Pre-processed images, ``(N, C, H, W)``.

        Returns:
            What the flow takes, ``(N, ...)``, and where there is one, the rest of the log-density, nats, ``(N,)``.
        """
        raise NotImplementedError

    def checked(self, images: Tensor, *, unit_range: bool = False, size: tuple[int, int] | None = None) -> Tensor:
        """Refuse images that cannot be scored, as :func:`check_images` does, and bring the others to our precision.

        Raises:
            ValueError: As :func:`check_images`, and if the model's weights have fewer than 32 bits.
        """
        dtype = self.dtype
        check_precision(dtype)
        check_images(images, unit_range=unit_range, size=size)
        return images.to(dtype)

    def density(self, inputs: Inputs, flow: InvertibleModule | None = None) -> flows.Density:
        """Evaluate the density of prepared images.

        Args:
            inputs: What :meth:`inputs` returned.
            flow: Another flow of the same architecture, to use instead of the model's own.
        """
        return flows.density(self.flow if flow is None else flow, self.base, *inputs)

    def log_prob(self, images: Tensor) -> Tensor:
        """Log-density of pre-processed images, ``(N, C, H, W)``; nats, ``(N,)``.

        It is −∞ where the flow overflowed, so that there is no density. Errors as for :meth:`inputs`.
        """
        return self.log_prob_of(self.inputs(images))

    def log_prob_of(self, inputs: Inputs) -> Tensor:
        """Return the same for prepared images."""
        return _defined(self.density(inputs).log_prob, -math.inf)

    def bits_per_dim(self, images: Tensor, *, log_prob: Tensor | None = None) -> Tensor:
        """Bits per dimension, ``(N,)``, +∞ where there is no density; errors as for :meth:`log_prob`.

        Args:
            images: Pre-processed images, ``(N, C, H, W)``.
            log_prob: What :meth:`log_prob` returns for them, if it is known, which may save an evaluation.
        """
        return flows.bits_per_dim(self.log_prob(images) if log_prob is None else log_prob, self.dims, self.levels)

    def predict(self, inputs: Inputs, scorer: Score | None = None) -> InferenceBatch:
        """Score prepared images.

        Args:
            inputs: What :meth:`inputs` returned.
            scorer: A score to use instead of the model's own.

        Returns:
            A batch whose ``pred_score``, ``(N,)``, is higher for more anomalous images. Where the flow overflowed, so
            that there is no density, the score is infinite, the most anomalous one.

        Raises:
            NotFittedError: If the score has not been fitted.
        """
        return InferenceBatch(pred_score=_defined((scorer or self.scorer)(self, inputs), math.inf))

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score pre-processed images, ``(N, C, H, W)``; see :meth:`predict`."""
        return self.predict(self.inputs(images))


def check_precision(precision: str | int | torch.dtype) -> None:
    """Refuse weights of 16 bits, in which no density has digits enough to be compared.

    Args:
        precision: Lightning's name (``32-true``, ``bf16-mixed``, …), or the weights' type.

    Raises:
        ValueError: If weights of this precision have 16 bits.
    """
    if precision in {"16-true", "bf16-true", torch.float16, torch.bfloat16}:
        msg = (
            f"Weights of 16 bits ({precision}) leave a log-density of hundreds of nats two or three digits, and images "
            "differ by less. Set precision to bf16-mixed or 16-mixed, which train the s,t-networks in 16 bits and keep "
            "the density in 32, to 32-true (the default) or 64-true."
        )
        raise ValueError(msg)


def _defined(values: Tensor, overflow: float) -> Tensor:
    """Replace NaN, which an overflow of the flow causes, since broken images have been refused."""
    return torch.where(torch.isnan(values), torch.full_like(values, overflow), values)


def check_images(images: Tensor, *, unit_range: bool = False, size: tuple[int, int] | None = None) -> None:
    """Refuse images that cannot be scored. Skipped in exported graphs, which cannot raise.

    Args:
        images: Pre-processed images, ``(N, C, H, W)``; of bytes none is NaN.
        unit_range: Whether values must lie in [0, 1].
        size: Height and width that a model on a backbone was built for.

    Raises:
        ValueError: If a value is NaN or infinite, or outside of the range, or the images have another size, or are no
            batch.
    """
    if torch.compiler.is_compiling():
        return
    if images.ndim != 4:
        msg = f"Expected a batch of images, (N, C, H, W), got {tuple(images.shape)}; of one image that is image[None]."
        raise ValueError(msg)
    if size is not None and tuple(images.shape[2:]) != size:
        height, width = images.shape[2:]
        msg = (
            f"This model works on images of {size[0]} x {size[1]} pixels, got {height} x {width}. Keep the "
            "pre-processor's Resize, or set image_size."
        )
        raise ValueError(msg)
    if images.dtype == torch.uint8:
        return
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
