# SPDX-License-Identifier: Apache-2.0
"""Where reduced precision may be used, and where it may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

_Method = TypeVar("_Method", bound=Callable[..., Any])


def full_precision(method: _Method) -> _Method:
    """Decorate what a density is computed by, so that it works in the precision of its tensors, and no less.

    A score is a small difference of large numbers, for which neither 16 bits (``torch.autocast``, the trainer's
    ``16-mixed`` and ``bf16-mixed``) nor TF32 (what GPUs multiply float32 in: PyTorch's default for convolutions, and
    for matrix products what ``torch.set_float32_matmul_precision`` asks for, which with ``medium`` are bfloat16 on CPUs
    that have it) have enough digits.

    Args:
        method: A method of a module, or a function whose first argument is one. Its parameters, or its buffers where it
            has none, say on what device.

    Returns:
        The method, which autocast and products of reduced precision leave alone. Nothing changes where it is traced for
        an export.
    """

    @wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with _exactly(next(chain(self.parameters(), self.buffers())).device.type):
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


@contextmanager
def _exactly(kind: str) -> Iterator[None]:
    backends: Any = torch.backends
    multipliers = {
        "cuda": [backends.cudnn.conv, backends.cuda.matmul],
        "cpu": [backends.mkldnn.conv, backends.mkldnn.matmul],
    }.get(kind, [])
    before = [multiplier.fp32_precision for multiplier in multipliers]
    for multiplier in multipliers:
        multiplier.fp32_precision = "ieee"
    try:
        if torch.amp.is_autocast_available(kind):
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield
    finally:
        for multiplier, precision in zip(multipliers, before, strict=True):
            multiplier.fp32_precision = precision
