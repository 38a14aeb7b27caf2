# SPDX-License-Identifier: Apache-2.0
"""Where images come from.

A data set is known by name (:data:`DATA_SETS`: :func:`register_data_set` adds one), or is a folder, in which images lie
in one of a few ways (:data:`LAYOUTS`).
"""

from anomalib_flowood.data.sources import torchvision_sets  # noqa: F401  (registers them)
from anomalib_flowood.data.sources.finding import Source, find_sources
from anomalib_flowood.data.sources.folder import FolderSource
from anomalib_flowood.data.sources.layouts import LAYOUTS, Layout, what_folders_hold
from anomalib_flowood.data.sources.named import DATA_SETS, NamedDataSet, NamedSource, register_data_set

__all__ = [
    "DATA_SETS",
    "LAYOUTS",
    "FolderSource",
    "Layout",
    "NamedDataSet",
    "NamedSource",
    "Source",
    "find_sources",
    "register_data_set",
    "what_folders_hold",
]
