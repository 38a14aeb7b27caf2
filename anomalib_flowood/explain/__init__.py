# SPDX-License-Identifier: Apache-2.0
"""Why a flow detects, or fails to: pictures of what it does to images from inside and outside, on one page."""

from .coadaptation import Coadaptation, CouplingRecord, coadaptation, record_couplings, squared_correlation
from .explanation import explain

__all__ = [
    "Coadaptation",
    "CouplingRecord",
    "coadaptation",
    "explain",
    "record_couplings",
    "squared_correlation",
]
