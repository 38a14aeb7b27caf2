# SPDX-License-Identifier: Apache-2.0
"""The base class of parts that are mixed into a detector.

To type checkers it is anomalib's module, whose hooks the parts extend. At run time it is not: anomalib lists the direct
subclasses of its module as detectors.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule as Mixin
else:
    Mixin = object

__all__ = ["Mixin"]
