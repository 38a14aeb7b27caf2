# SPDX-License-Identifier: Apache-2.0
"""The flows of FeatureMapFlow's layers, side by side: on single positions, or on whole maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import InvertibleModule
from torch import Tensor

from anomalib_flowood import flows

POSITION = "position"
"""The name for no mask: every position is transformed on its own, with weights that all of them share."""

DRAWN = 512
"""Positions of each layer that a training step draws."""


def new_flow(shapes: Sequence[tuple[int, int, int]], mask: str, context: str, **arguments: Any) -> flows.SideBySide:
    """Build one flow for each layer, side by side."""
    if mask == POSITION:
        return flows.SideBySide(flows.position_flow(shape, context=context, **arguments) for shape in shapes)
    return flows.SideBySide(flows.map_flow(shape, mask=mask, **arguments) for shape in shapes)


def draws_positions(flow: InvertibleModule) -> TypeGuard[flows.PositionFlow]:
    """Whether a flow trains on single positions."""
    return isinstance(flow, flows.PositionFlow) and flow.context != "quadrant"


def coupled(flow: SequenceINN, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents of maps, ``(N, D, h, w)``, and the log-scales at each position, ``(N, h, w)``, or a 0 if none."""
    latents, scales = flows.couple(flow, maps) if len(flow) else (maps, maps.new_zeros(1, 1))
    return latents, scales.sum(1)


def transformed(flow: SequenceINN, maps: Tensor, noise: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Transform maps, ``(N, D, h, w)``, as training does, with added noise of the given standard deviation.

    Returns:
        Latents of the maps, or of some of their positions, drawn anew at every call, and their log-determinants.
    """
    if not draws_positions(flow):
        return flow(_blurred(maps.to(dtype), noise))
    points, places, images = flows.draw_positions(maps, DRAWN)
    points = _blurred(points.to(dtype), noise)
    condition = flow.condition(maps.to(dtype))
    if condition is not None:
        # Noise of one standard deviation: otherwise the flow could recognise its few images by their conditions.
        condition = (condition + condition.std(0, correction=0) * torch.randn_like(condition))[images]
    return flow.at(points, places, condition)


def _blurred(values: Tensor, noise: float) -> Tensor:
    return values + noise * torch.randn_like(values) if noise else values
