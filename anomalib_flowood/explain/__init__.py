# SPDX-License-Identifier: Apache-2.0
"""Why a flow detects, or fails to: pictures of what it does to images from inside and outside, on one page."""

from .coadaptation import CouplingRecord, coadaptation, record_couplings
from .explanation import explain

__all__ = ["CouplingRecord", "coadaptation", "explain", "record_couplings"]
