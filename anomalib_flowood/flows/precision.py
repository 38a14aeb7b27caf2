# SPDX-License-Identifier: Apache-2.0
"""Where reduced precision may be used, and where it may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Method = TypeVar("_Method", bound=Callable[..., Any])

# Precisions are of the process: the first of several threads sets them, and the last one puts them back.
_lock = Lock()
_depth: Counter[str] = Counter()
_before: dict[str, list[tuple[Any, str]]] = {}


_WITHOUT_DOUBLES = {"mps"}


def with_doubles(device: torch.device) -> torch.device:
    """Where numbers of a device are computed in float64: there, or on the CPU where the device has none."""
    return torch.device("cpu") if device.type in _WITHOUT_DOUBLES else device


def full_precision(method: _Method) -> _Method:
    """Decorate what a density is computed by, so that it works in the precision of its tensors, and no less.

    A score is a small difference of large numbers, for which neither 16 bits (``torch.autocast``, the trainer's
    ``16-mixed`` and ``bf16-mixed``) nor TF32 (what GPUs multiply float32 in: PyTorch's default for convolutions, and
    for matrix products what ``torch.set_float32_matmul_precision`` asks for, which with ``medium`` are bfloat16 on CPUs
    that have it) have enough digits.

    Args:
        method: A method of a module, or a function whose first argument is a module or a tensor. That says on what
            device: the module by its parameters, or its buffers where it has none.

    Returns:
        The method, which autocast and products of reduced precision leave alone. Nothing changes where it is traced for
        an export.
    """

    @wraps(method)
    def run(first: nn.Module | Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(first, *args, **kwargs)
        tensor = first if isinstance(first, Tensor) else next(chain(first.parameters(), first.buffers()))
        with _exactly(tensor.device.type):
            return method(first, *args, **kwargs)

    return run  # type: ignore[return-value]


@contextmanager
def _exactly(kind: str) -> Iterator[None]:
    with _lock:
        if not _depth[kind]:
            _before[kind] = _in_full_precision(kind)
        _depth[kind] += 1
    try:
        if torch.amp.is_autocast_available(kind):
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield
    finally:
        with _lock:
            _depth[kind] -= 1
            if not _depth[kind]:
                for level, precision in reversed(_before.pop(kind)):
                    level.fp32_precision = precision


def _in_full_precision(kind: str) -> list[tuple[Any, str]]:
    """Let a kind of device multiply in full precision; return what to set to undo it."""
    backends: Any = torch.backends
    # What has no precision of its own takes that of the level above it. Convolutions of CUDA have a default, which they
    # would lose if it were set: the level above overrules it. That of the CPU can be read, but not set (PyTorch 2.14).
    levels = {
        "cuda": [
            (backends.cudnn, backends),
            (backends.cudnn.conv, backends.cudnn),
            (backends.cuda.matmul, backends.cudnn),
        ],
        "cpu": [(backends.mkldnn.conv, backends.mkldnn), (backends.mkldnn.matmul, backends.mkldnn)],
    }
    before = []
    for level, above in levels.get(kind, []):
        precision = level.fp32_precision
        if precision != "ieee":
            before.append((level, "none" if precision == above.fp32_precision else precision))
            level.fp32_precision = "ieee"
    return before
