# SPDX-License-Identifier: Apache-2.0
"""Where images come from: data sets known by name, folders of images and folders of idx files."""

from anomalib_flowood.data.sources.finding import Source, find_sources
from anomalib_flowood.data.sources.folders import FolderSource
from anomalib_flowood.data.sources.named import DATA_SETS, NamedSource

__all__ = ["DATA_SETS", "FolderSource", "NamedSource", "Source", "find_sources"]
