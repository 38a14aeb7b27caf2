# SPDX-License-Identifier: Apache-2.0
"""A device that is not the CPU on machines that have none, so that a forgotten ``.to`` fails on any of them.

Tensors there say that their device is ``meta``, the one accelerator-like device of which every build of PyTorch knows,
and which autograd serves without a driver. Unlike true meta tensors they have values: each wraps a tensor in main
memory, and operations run on that for real. So whole fits run, data-dependent ones too, and their results can be
compared with the CPU's. As on a GPU, an operation on tensors of both devices raises, NumPy refuses, and a generator
must be of the device that it draws for; what may be mixed there (copies, scalars in pointwise operations, indices in
main memory) may be mixed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import torch
from lightning.pytorch.accelerators import Accelerator
from torch import Tensor
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torchvision.tv_tensors import TVTensor

from anomalib_flowood.flows import precision

aten = torch.ops.aten
DEVICE = torch.device("meta")

_INDICES_MAY_BE_ELSEWHERE = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class PretendTensor(Tensor):
    """A tensor in main memory that says it is elsewhere."""

    inner: Tensor
    doubles: ClassVar[bool] = True
    """Whether the device has float64."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        _refuse_doubles(inner)
        inference = inner.is_inference()
        if inference != torch.is_inference_mode_enabled():
            with torch.inference_mode(inference):
                return cls(inner)
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        tensor.inner = inner
        return tensor

    def __repr__(self, **kwargs: Any) -> str:
        return f"PretendTensor({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().inner.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def as_subclass(self, cls: Any) -> PretendTensor:
        return self  # A tensor cannot be of two subclasses: torchvision's are left off.

    def new_tensor(self, values: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(values, **{"dtype": self.dtype, "device": DEVICE} | kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del cls, types
        return _run(func, args, kwargs or {})


class _Generator(torch.Generator):
    """``torch.Generator``, which can be of the device."""

    away: ClassVar[list[torch.Generator]] = []
    """Those of the device; operations get them without their Python type."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        generator = super().__new__(cls, "cpu")
        if _is_away(device):
            cls.away.append(generator)
        return generator


def _is_away(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    about = _about(func)
    if about.is_composite:  # in inference mode
        with _Dispatch():
            return func.decompose(*args, **kwargs)
    seen: list[Tensor] = []
    inner_args, inner_kwargs = _unwrap(args, seen), {name: _unwrap(value, seen) for name, value in kwargs.items()}
    types = set(map(type, seen))
    any_away = PretendTensor in types
    device = kwargs.get("device")
    away = any_away if device is None else _is_away(device)
    if func is aten.copy_.default:
        away = type(args[0]) is PretendTensor
    elif func is not aten._to_copy.default:
        if any_away and len(types) > 1:
            _check(func, args, seen)
        generator = kwargs.get("generator")
        if generator is not None and any(generator._cdata == other._cdata for other in _Generator.away) != away:
            msg = f"{func}: the generator is not on the device of the tensors."
            raise RuntimeError(msg)
    out = func(*inner_args, **inner_kwargs)
    if not away:
        if any_away and func in (aten.copy_.default, aten._to_copy.default) and seen[-1].dtype != out.dtype:
            _refuse_doubles(out)  # another precision is converted before it is copied
        return out
    out = _wrap(out)
    return return_and_correct_aliasing(func, args, kwargs, out) if any_away and about.aliases else out


def _refuse_doubles(x: Tensor) -> None:
    if not PretendTensor.doubles and x.dtype == torch.float64:
        msg = "Cannot convert a tensor to float64 dtype as the device doesn't support float64."
        raise TypeError(msg)


def _unwrap(x: Any, seen: list[Tensor]) -> Any:
    """Replace what says that it is away; add all tensors to a list."""
    if isinstance(x, Tensor):
        seen.append(x)
        return x.inner if type(x) is PretendTensor else x
    if isinstance(x, torch.device):
        return torch.device("cpu") if x == DEVICE else x
    return type(x)([_unwrap(part, seen) for part in x]) if type(x) in (list, tuple) else x


def _wrap(x: Any) -> Any:
    """Let tensors say that they are away."""
    if isinstance(x, Tensor):
        return PretendTensor(x)
    return type(x)([_wrap(part) for part in x]) if type(x) in (list, tuple) else x


def _check(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    if func in _INDICES_MAY_BE_ELSEWHERE and type(args[0]) is PretendTensor:
        tensors = [args[0], *(x for x in args[2:] if isinstance(x, Tensor))]
    pointwise = torch.Tag.pointwise in func.tags
    if any(type(x) is not PretendTensor and not (pointwise and x.ndim == 0) for x in tensors):
        shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        msg = f"{func}: expected all tensors to be on the same device, got {shapes}."
        raise RuntimeError(msg)


class _About(NamedTuple):
    """What is asked of every call of an operation, and does not change."""

    is_composite: bool
    aliases: bool


@cache
def _about(func: Any) -> _About:
    return _About(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        any(result.alias_info is not None for result in func._schema.returns),
    )


class _Dispatch(TorchDispatchMode):
    """Makes tensors that are asked for on the device."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Nothing is compiled here, and what would keep it from being takes as long as an operation.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _made_there(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` and its like copy data there, where PyTorch would make a meta tensor without any."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        if _is_away(kwargs.get("device")):
            return make(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        return make(*args, **kwargs)

    return made


def _to(self: TVTensor, *args: Any, **kwargs: Any) -> Tensor:
    return self.as_subclass(Tensor).to(*args, **kwargs)  # see PretendTensor.as_subclass


class PretendAccelerator(Accelerator):
    """The device for Lightning's trainer."""

    def setup_device(self, device: torch.device) -> None:
        assert device == DEVICE

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE] * int(devices)

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "pretend"


@contextmanager
def pretend_device(*, doubles: bool = True) -> Iterator[torch.device]:
    """Make the device, which is there until the context ends.

    Args:
        doubles: Whether it has float64, which Apple's MPS has not.
    """
    fused = [*optimizer._get_fused_kernels_supported_devices(), DEVICE.type]
    with (
        patch.object(optimizer, "_get_fused_kernels_supported_devices", lambda: fused),
        patch.object(torch, "Generator", _Generator),
        patch.object(_Generator, "away", []),
        patch.object(PretendTensor, "doubles", doubles),
        patch.object(precision, "_WITHOUT_DOUBLES", set() if doubles else {DEVICE.type}),
        patch.object(torch.accelerator, "synchronize", lambda device=None: None),
        # What PyTorch decides before operations are dispatched. A function mode would be asked about all of them.
        patch.object(torch, "tensor", _made_there(torch.tensor)),
        patch.object(torch, "as_tensor", _made_there(torch.as_tensor)),
        patch.object(TVTensor, "to", _to),
        _Dispatch(),
    ):
        yield DEVICE
