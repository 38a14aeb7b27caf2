# SPDX-License-Identifier: Apache-2.0
"""PyTorch model of PixelFlow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anomalib_flowood import flows
from anomalib_flowood.models.components import FlowModel


class PixelFlowModel(FlowModel):
    """Density of images under a normalizing flow on their pixels.

    Args:
        image_size: Height and width of the images.
        channels: 3 for colour, 1 for grey.
        score: One of :data:`anomalib_flowood.scores.SCORES`.
        **flow_arguments: Those of :func:`anomalib_flowood.flows.pixel_flow`.

    Raises:
        ValueError: If the configuration makes no sense.
    """

    reads_pixels = True

    luma: Tensor

    def __init__(
        self,
        image_size: Sequence[int] = (32, 32),
        channels: int = 3,
        *,
        score: str = "nll",
        **flow_arguments: Any,
    ) -> None:
        if channels not in {1, 3}:
            msg = f"channels must be 1 (grey) or 3 (colour), got {channels}."
            raise ValueError(msg)
        height, width = image_size
        shape = (channels, height, width)
        new_flow = partial(flows.pixel_flow, shape, **flow_arguments)
        super().__init__(new_flow, flows.StandardNormal(), math.prod(shape), levels=flows.LEVELS, score=score)
        self.shape = shape
        # Rec. 601, as in PIL's conversion to grey; they sum to 1, so that grey images keep their values.
        self.register_buffer("luma", torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1), persistent=False)

    def pixels(self, images: Tensor) -> Tensor:
        """Check images and convert them to the flow's number of channels.

        Args:
            images: Images in [0, 1], ``(N, 3, H, W)`` or ``(N, C, H, W)``.

        Returns:
            ``(N, C, H, W)``; colour is converted to grey if the flow has one channel.

        Raises:
            ValueError: If the shape is wrong, or a pixel is NaN or outside of [0, 1].
        """
        if images.ndim != 4 or tuple(images.shape[2:]) != self.shape[1:] or images.shape[1] not in {3, self.shape[0]}:
            height, width = self.shape[1:]
            msg = (
                f"Expected images of shape (N, {self.shape[0]}, {height}, {width}), got {tuple(images.shape)}. "
                "The pre-processor resizes; or set image_size to the size of your images."
            )
            raise ValueError(msg)
        images = self.checked(images, unit_range=True)
        if images.shape[1] != self.shape[0]:
            images = (images * self.luma).sum(1, keepdim=True)
        return images

    def inputs(self, images: Tensor, *, noisy: bool = False) -> tuple[Tensor]:
        """Check and dequantise images.

        Args:
            images: Images in [0, 1], ``(N, 3, H, W)`` or ``(N, C, H, W)``.
            noisy: Whether to dequantise with uniform noise, as training does, and not with its mean, with which scores
                are deterministic and independent of the batch.

        Returns:
            Images in the open unit cube, ``(N, C, H, W)``, to which densities refer.

        Raises:
            ValueError: If the shape is wrong, or a pixel is NaN or outside of [0, 1].
        """
        images = self.pixels(images)
        return (flows.dequantize(images, torch.rand_like(images) if noisy else None),)

    def log_prob(self, images: Tensor, *, noisy: bool = False) -> Tensor:
        """Log-density of images with respect to the unit cube; nats, ``(N,)``. Arguments as for :meth:`inputs`.

        Without noise it is the density at the centres of the pixels' bins, from which the score is computed; it is
        higher than the average over the bins, see :meth:`bits_per_dim`. It is −∞ where the flow overflowed.
        """
        return self.log_prob_of(self.inputs(images, noisy=noisy))

    def bits_per_dim(
        self, images: Tensor, *, log_prob: Tensor | None = None, draws: int = flows.NOISE_DRAWS, seed: int = 0
    ) -> Tensor:
        """Bits per dimension as the literature reports them: the mean of −log2 p(x + u) / D over uniform noise u.

        The noise is seeded and the same for every image, so that no value depends on the batch. It takes ``draws``
        evaluations of the flow.

        Args:
            images: Images in [0, 1], ``(N, 3, H, W)`` or ``(N, C, H, W)``.
            log_prob: Not used: the average over the bins does not follow from the density at their centres.
            draws: Draws of :func:`anomalib_flowood.flows.dequantization_noise`.
            seed: Random seed of the noise.

        Returns:
            ``(N,)``, the dequantisation's 8 bits included; +∞ where the flow overflowed.

        Raises:
            ValueError: As for :meth:`inputs`.
        """
        del log_prob
        images = self.pixels(images)
        noises = flows.dequantization_noise(self.shape, draws, seed).to(images)
        log_probs = [self.log_prob_of((flows.dequantize(images, noise),)) for noise in noises]
        return flows.bits_per_dim(torch.stack(log_probs).mean(0), self.dims, self.levels)

    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images as :meth:`draw` does, with the same arguments, and clamp them to [0, 1].

        Returns:
            Images in [0, 1], ``(n, C, H, W)``. They are continuous, not quantised to 256 grey levels.
        """
        return self.draw(n, temperature, generator).clamp(0, 1)

    @torch.no_grad()
    def draw(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the flow's density, which reaches beyond black and white: see :class:`flows.Logit`.

        Args:
            n: Number of images.
            temperature: Standard deviation of the latents. Below 1, images are more likely than draws from the density.
            generator: Source of randomness, on the model's device.

        Returns:
            Images, ``(n, C, H, W)``.
        """
        weight = next(self.flow.parameters())
        shape = (n, *self.flow.shapes[-1])
        z = temperature * torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
        # Evaluation mode: batch statistics would make images depend on each other, and change the running statistics.
        training = self.flow.training
        self.flow.eval()
        images, _ = self.flow(z, rev=True)
        self.flow.train(training)
        return images
