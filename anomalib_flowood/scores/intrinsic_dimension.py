# SPDX-License-Identifier: Apache-2.0
"""Local intrinsic dimension, from the flow's Jacobian."""

from __future__ import annotations

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor

from anomalib_flowood.flows import full_precision, with_doubles

from .score import FlowDensity, Inputs, Score

_IMAGES_AT_ONCE = 4
"""Images whose Jacobians are computed at once: each has D^2 numbers, and as many passes through the flow."""


def local_intrinsic_dimension(flow: InvertibleModule, x: Tensor, scale: float) -> Tensor:
    """Count the directions in which the density about a point is wider than ``scale``.

    log p convolved with N(0, scale^2 I) falls like log(scale) for each direction that is thinner than the noise, so
    that D + d log (p * N) / d log(scale) is the local intrinsic dimension (Tempczyk et al. 2022, arXiv 2206.14882).
    Kamkari et al. 2024 (arXiv 2403.18910, section 4.1) take the flow to be linear about the point, which makes p a
    Gaussian there and the derivative a formula. With J the Jacobian of x -> z and A = I + scale^2 J J^T it is::

        LID(x) = tr(A^-1) + z^T A^-1 z - |A^-1 z|^2

    Args:
        flow: ``flow(x) -> (z, log_det)`` with a standard normal base.
        x: Points, ``(N, ...)`` of D numbers each.
        scale: Standard deviation of the noise, in units of ``x``.

    Returns:
        Dimensions, ``(N,)``: near 0 where the density is narrower than the noise in all directions, near D where it
        is wider in all of them. NaN where the flow overflowed.
    """
    # Tensors made in inference mode have no derivatives, in whatever mode they are used.
    with torch.inference_mode(mode=False), torch.no_grad():
        return torch.cat([_dimensions(some, flow, scale) for some in x.clone().split(_IMAGES_AT_ONCE)])


@full_precision  # derivatives, too, which are computed behind what the flow computes in full precision
def _dimensions(x: Tensor, flow: InvertibleModule, scale: float) -> Tensor:
    """The same of some points."""

    def latents(point: Tensor) -> Tensor:
        return flow(point[None])[0].flatten()

    place = with_doubles(x.device)
    jacobian = torch.func.vmap(torch.func.jacrev(latents))(x).flatten(2).to(place).double()
    z = flow(x)[0].flatten(1).to(place).double()
    gram = torch.eye(z.shape[1], dtype=z.dtype, device=z.device) + scale**2 * jacobian @ jacobian.mT
    factor, failed = torch.linalg.cholesky_ex(gram)
    factor[failed > 0] = torch.nan
    inverse = torch.cholesky_inverse(factor)
    solved = (inverse @ z[:, :, None])[:, :, 0]
    trace = inverse.diagonal(dim1=1, dim2=2).sum(1)
    return (trace + (z * solved).sum(1) - solved.square().sum(1)).to(x.dtype).to(x.device)


class LocalIntrinsicDimension(Score):
    """The worse of two one-sided tests: too unlikely, or of too low an intrinsic dimension.

    A simple image, of low dimension, may lie where the density is high but holds next to no probability mass. The
    paper sets a threshold for each of the two; here both are put in units of their standard deviation over training
    images, and the larger counts. Source: Kamkari, Ross, Cresswell, Caterini, Krishnan and Loaiza-Ganem 2024
    (arXiv 2403.18910), section 4; the dimension by :func:`local_intrinsic_dimension`.
    """

    name = "lid"
    pixels_only = True
    in_graphs = False  # which have no Jacobians
    fit_images = 64
    scale = 0.1
    """Standard deviation of the noise in pixel values from 0 to 1: fainter variations are no dimension."""

    mean: Tensor
    std: Tensor

    def __init__(self, density: FlowDensity) -> None:
        super().__init__(density)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("std", torch.ones(2))

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """−log p and the negative local intrinsic dimension, both per dimension; ``(N, 2)``."""
        nll = -density.density(inputs).log_prob
        dimension = local_intrinsic_dimension(density.flow, inputs[0], self.scale)
        return torch.stack([nll, -dimension], dim=1) / density.dims

    def fit_statistics(self, statistics: Tensor) -> None:
        """Learn means and standard deviations."""
        self.mean.copy_(statistics.mean(0))
        # A statistic that is the same for all images differs by rounding alone, which must not count.
        self.std.copy_(torch.maximum(statistics.std(0), 1e-6 * self.mean.cpu().double().abs()).clamp(min=1e-12))

    def combine(self, statistics: Tensor) -> Tensor:
        """The larger of the two, in standard deviations, ``(N,)``."""
        return ((statistics - self.mean) / self.std).amax(1)
