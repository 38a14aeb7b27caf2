# SPDX-License-Identifier: Apache-2.0
"""Flows with random weights, and the two checks that every one of them has to pass."""

import torch
from torch import nn

from anomalib_flowood.flows import couple


def randomise(module: nn.Module, scale: float = 0.3, seed: int = 0) -> nn.Module:
    """Replace all weights, which start at the identity, by random ones; float64."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def check_inverse(flow, x: torch.Tensor, tolerance: float = 1e-9) -> None:
    z, log_det = flow(x)
    back, log_det_back = flow(z, rev=True)
    torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_det_back, -log_det, rtol=tolerance, atol=tolerance)


def check_log_det(flow, x: torch.Tensor) -> None:
    """Compare with the determinant of the Jacobian that autograd computes."""
    _, log_det = flow(x)
    for image, value in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0].flatten(), image)
        matrix = jacobian.reshape(image.numel(), image.numel())
        torch.testing.assert_close(value, torch.linalg.slogdet(matrix)[1], rtol=1e-8, atol=1e-8)


def shares(couplings, base, x: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
    """Split −log p(x) among the values of x; of the shape of x."""
    z, scales = couple(couplings, x, condition)
    return -base.elementwise(z) - scales
