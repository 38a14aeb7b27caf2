# SPDX-License-Identifier: Apache-2.0
"""What a score is, and what it needs of a flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

import torch
from FrEIA.modules import InvertibleModule
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from anomalib_flowood.checks import refuse_infinite
from anomalib_flowood.flows import Density

Inputs = tuple[Tensor, ...]
"""What a density is computed from: its own preparation of a batch of images, each tensor with one row per image."""

_FEWEST_IMAGES = 2
"""One image has no standard deviation."""


class FlowDensity(Protocol):
    """A density that scores can work on; every torch model of this package is one."""

    flow: InvertibleModule
    dims: int
    """Dimensions of what the density is over."""
    reads_pixels: ClassVar[bool]
    """Whether the inputs are dequantised pixels, ``(N, C, H, W)`` in the open unit cube."""
    parts: ClassVar[int]
    """Number of terms whose sum is −log p."""
    new_flow: Callable[[], InvertibleModule]
    """Makes one more flow of the same architecture, with weights of its own."""

    def density(self, inputs: Inputs, flow: InvertibleModule | None = None) -> Density:
        """Evaluate the density of prepared inputs, with another flow of the same shape if one is given."""
        ...


class Score(nn.Module):
    """One number per image, higher = more anomalous, from a density that was fitted to in-distribution images.

    A score keeps what it learns in buffers, so that it is saved and exported with its detector.

    Args:
        density: What it will score with. It is not kept: a score is a part of its detector.

    Raises:
        ValueError: If the score works on pixels only, and the density does not.
    """

    name: ClassVar[str]
    fit_images: ClassVar[int] = 0
    """Training images that it is fitted on; 0 if there is nothing to fit."""
    pixels_only: ClassVar[bool] = False
    """Whether it needs a density of pixels."""
    in_graphs: ClassVar[bool] = True
    """Whether ONNX and OpenVINO can compute it."""

    fitted: Tensor

    def __init__(self, density: FlowDensity) -> None:
        super().__init__()
        if not self.suits(density):
            msg = f"Score {self.name!r} works on a flow of pixels alone (PixelFlow)."
            raise ValueError(msg)
        if self.fit_images:
            self.register_buffer("fitted", torch.tensor(False))

    def forget(self) -> None:
        """Be unfitted again, if there is anything to fit."""
        if self.fit_images:
            self.fitted.fill_(False)

    @property
    def ready(self) -> bool:
        """Whether there is nothing (more) to fit."""
        return not self.fit_images or bool(self.fitted)

    @classmethod
    def suits(cls, density: FlowDensity) -> bool:
        """Whether it can work on such a density."""
        return density.reads_pixels or not cls.pixels_only

    @classmethod
    def exportable(cls, density: FlowDensity) -> bool:
        """Whether ONNX and OpenVINO can compute it on such a density."""
        del density
        return cls.in_graphs

    @property
    def flows(self) -> list[InvertibleModule]:
        """Flows that train beside the detector's."""
        return []

    def training_loss(self, density: FlowDensity, inputs: Inputs) -> Tensor | None:
        """Mean −log p per dimension of the flows that train beside the detector's, summed over them.

        Args:
            density: The detector's torch model.
            inputs: A training batch, with the noise that the detector trains with.
        """
        del density, inputs
        return None

    def fit(self, density: FlowDensity, batches: Iterable[Inputs]) -> None:
        """Learn from training images; without anything to learn, do nothing.

        Args:
            density: The detector's torch model, in evaluation mode.
            batches: Prepared inputs of in-distribution training images, without noise.

        Raises:
            ValueError: If a statistic of a training image is NaN or infinite, or there are fewer than two of them.
        """
        if not self.fit_images:
            return
        with torch.no_grad():
            rows = [self.statistics(density, inputs) for inputs in batches]
        count = sum(len(row) for row in rows)
        if count < _FEWEST_IMAGES:
            msg = f"The score {self.name!r} is fitted on at least {_FEWEST_IMAGES} training images, got {count}."
            raise ValueError(msg)
        statistics = torch.cat(rows).cpu().double()
        refuse_infinite(statistics, "training", "statistic", f"the score {self.name!r} cannot be fitted")
        self.fit_statistics(statistics)
        self.fitted.fill_(True)

    def statistics(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Compute what the score is fitted on and made of, ``(N, S)``."""
        raise NotImplementedError

    def fit_statistics(self, statistics: Tensor) -> None:
        """Learn from the statistics of all training images, ``(n, S)``, float64 and finite, in main memory."""
        raise NotImplementedError

    def combine(self, statistics: Tensor) -> Tensor:
        """Turn statistics, ``(N, S)``, into scores, ``(N,)``; by default the only statistic is the score."""
        return statistics[:, 0]

    def forward(self, density: FlowDensity, inputs: Inputs) -> Tensor:
        """Score a batch.

        Args:
            density: The detector's torch model.
            inputs: Prepared inputs of N images.

        Returns:
            Scores, ``(N,)``.

        Raises:
            NotFittedError: If the score has not been fitted.
        """
        if not torch.compiler.is_compiling() and not self.ready:
            msg = (
                f"The score {self.name!r} has not been fitted: training does it in its last epoch, `flowood score` "
                "for a trained checkpoint."
            )
            raise NotFittedError(msg)
        return self.combine(self.statistics(density, inputs))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load what was fitted; stay unfitted if the checkpoint has another score, or other statistics of this one.

        The flows of a score have to be in the checkpoint.
        """
        own = {prefix + name: buffer for name, buffer in self.named_buffers(recurse=False)}
        if any(name not in state_dict or state_dict[name].shape != buffer.shape for name, buffer in own.items()):
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args)
