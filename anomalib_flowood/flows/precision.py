# SPDX-License-Identifier: Apache-2.0
"""Full precision for densities, whatever the trainer's precision is."""

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

# These settings hold for the whole process: the first thread to need them sets them, the last one restores them.
_lock = Lock()
_depth: Counter[str] = Counter()
_before: dict[str, list[tuple[Any, str]]] = {}

_WITHOUT_DOUBLES = {"mps"}
"""Types of devices that have no float64."""


def with_doubles(device: torch.device) -> torch.device:
    """Return the device on which to compute in float64: the given one, or the CPU if that has no float64."""
    return torch.device("cpu") if device.type in _WITHOUT_DOUBLES else device


def full_precision(method: _Method) -> _Method:
    """Decorate a part of the computation of a density, so that it runs in no less than the precision of its tensors.

    A score is a small difference of large numbers, for which 16 bits (``torch.autocast``, the trainer's ``16-mixed``
    and ``bf16-mixed``) are too few, and so is TF32 on GPUs (PyTorch's default for convolutions of float32, and for
    matrix products if ``torch.set_float32_matmul_precision`` says so; with ``medium``, CPUs that have bfloat16 multiply
    in it).

    Args:
        method: A method of a module, or a function whose first argument is a module or a tensor. The device is that of
            the tensor, or of the module's first parameter or buffer.

    Returns:
        The method, without autocast and products of reduced precision. Where it is traced for an export, nothing
        changes.
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
def _exactly(device_type: str) -> Iterator[None]:
    with _lock:
        if not _depth[device_type]:
            _before[device_type] = _set_full_precision(device_type)
        _depth[device_type] += 1
    try:
        if torch.amp.is_autocast_available(device_type):
            with torch.autocast(device_type, enabled=False):
                yield
        else:
            yield
    finally:
        with _lock:
            _depth[device_type] -= 1
            if not _depth[device_type]:
                for level, precision in reversed(_before.pop(device_type)):
                    level.fp32_precision = precision


def _set_full_precision(device_type: str) -> list[tuple[Any, str]]:
    """Let devices of a type multiply in full precision; return the levels that were changed, with their settings."""
    backends: Any = torch.backends
    # A level without a precision of its own inherits that of the level above. CUDA's convolutions have a default, which
    # would be lost if it were set, so the level above them is set, which overrides it. On the CPU the level above can
    # be read, but not set (PyTorch 2.14).
    levels = {
        "cuda": [
            (backends.cudnn, backends),
            (backends.cudnn.conv, backends.cudnn),
            (backends.cuda.matmul, backends.cudnn),
        ],
        "cpu": [(backends.mkldnn.conv, backends.mkldnn), (backends.mkldnn.matmul, backends.mkldnn)],
    }
    before = []
    for level, above in levels.get(device_type, []):
        precision = level.fp32_precision
        if precision != "ieee":
            before.append((level, "none" if precision == above.fp32_precision else precision))
            level.fp32_precision = "ieee"
    return before
