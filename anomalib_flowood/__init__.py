# SPDX-License-Identifier: Apache-2.0
"""Normalizing flows for anomaly and out-of-distribution detection, as anomalib models.

Importing the package makes its detectors and data modules known to anomalib. ``anomalib_flowood.flows`` stays
importable without anomalib and Lightning, so that registration waits until ``anomalib.models`` is imported.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from . import models
    from .data import CrossDataset, OneClass
    from .inference import load
    from .inference.estimator import FlowOutlierDetector
    from .models import *  # noqa: F403
    from .models.components import open_checkpoint

    __all__ = ["CrossDataset", "FlowOutlierDetector", "OneClass", "load", "open_checkpoint"]
    __all__ += models.__all__  # type: ignore[has-type]  # which imports this module

__version__ = "0.2.0"

_MODULES = {
    "CrossDataset": "data",
    "FlowOutlierDetector": "inference.estimator",
    "OneClass": "data",
    "load": "inference",
    "open_checkpoint": "models.components",
}
"""Where to find what is offered here, but for the detectors, which ``models`` knows."""


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*_MODULES, *_imported("models").__all__})
    if name in _MODULES:
        return getattr(_imported(_MODULES[name]), name)
    # A class. What else is looked for here begins with a small letter: modules, before they are imported.
    if name[:1].isupper() and name in (detectors := _imported("models")).__all__:
        return getattr(detectors, name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Within the context, say nothing of what Python finds in the code of libraries, which no user can mend.

    anomalib and timm import what is deprecated. Python 3.12 warns of a string of FrEIA's when it compiles it, which pip
    does, and others leave to the first import.
    """
    with warnings.catch_warnings():
        for kind in (FutureWarning, SyntaxWarning):
            warnings.simplefilter("ignore", kind)
        yield


def _imported(module: str) -> ModuleType:
    with quiet_imports():
        return import_module(f"{__name__}.{module}")


def _register() -> None:
    """Import what registers itself with anomalib."""
    for module in ("data", "models"):
        import_module(f"{__name__}.{module}")


class _AfterAnomalib(MetaPathFinder):
    """Registers our classes whenever ``anomalib.models`` has been executed.

    The module is found by whoever finds it without us; only then does its loader call us. So to look for it, or to fail
    to import it, uses nothing up.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find ``anomalib.models`` and no other module."""
        if fullname != "anomalib.models":
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module  # of a loader that was made for this spec

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "anomalib.models" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterAnomalib())
