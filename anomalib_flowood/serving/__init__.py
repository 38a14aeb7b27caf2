# SPDX-License-Identifier: Apache-2.0
"""A trained detector behind HTTP: ``flowood serve``. FastAPI and uvicorn are the extra ``anomalib-flowood[serve]``."""

from __future__ import annotations

from importlib.util import find_spec

from anomalib_flowood.serving.limits import Limits

__all__ = ["Limits", "check_installed"]

_NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def check_installed() -> None:
    """Say how to install what a server needs, before a detector is loaded.

    Raises:
        ModuleNotFoundError: If any of it is missing.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        msg = f"flowood serve needs {', '.join(missing)}: pip install 'anomalib-flowood[serve]'"
        raise ModuleNotFoundError(msg)
