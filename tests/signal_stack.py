# SPDX-License-Identifier: Apache-2.0
"""The stack that a thread handles signals on, as Linux keeps it."""

import ctypes

_DISABLED = 2


class _Stack(ctypes.Structure):
    """``stack_t``."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def disable_signal_stack() -> None:
    """Let this thread handle signals on its own stack."""
    ctypes.CDLL(None).sigaltstack(ctypes.byref(_Stack(None, _DISABLED, 0)), None)


def has_signal_stack() -> bool:
    """Whether this thread handles signals on another stack."""
    found = _Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.flags != _DISABLED
