# SPDX-License-Identifier: Apache-2.0
"""Normalizing flows for anomaly and out-of-distribution detection, as anomalib models.

Importing the package makes its detectors and data modules known to anomalib. ``anomalib_flowood.flows`` stays
importable without anomalib and Lightning, so that registration waits until ``anomalib.models`` is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .data import CrossDataset, OneClass
    from .models import EmbeddingFlow, FeatureMapFlow, PixelFlow
    from .models.components import open_checkpoint

__version__ = "0.2.0"

__all__ = ["CrossDataset", "EmbeddingFlow", "FeatureMapFlow", "OneClass", "PixelFlow", "open_checkpoint"]

_MODULES = {
    "EmbeddingFlow": "models",
    "FeatureMapFlow": "models",
    "PixelFlow": "models",
    "CrossDataset": "data",
    "OneClass": "data",
    "open_checkpoint": "models.components",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def _register() -> None:
    """Import what registers itself with anomalib."""
    for module in sorted(set(_MODULES.values())):
        import_module(f"{__name__}.{module}")


class _AfterAnomalib(MetaPathFinder, Loader):
    """Registers our classes right after `anomalib.models` has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Step in for `anomalib.models` alone, once."""
        del path, target
        if fullname != "anomalib.models":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as anomalib's own loader would."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run anomalib's module, then register."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()


if "anomalib.models" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterAnomalib())
