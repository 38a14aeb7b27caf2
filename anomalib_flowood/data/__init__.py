# SPDX-License-Identifier: Apache-2.0
"""Data modules for out-of-distribution and one-class detection, and the data sets behind them.

``get_datamodule`` looks for names in ``anomalib.data`` alone, so the data modules are put there. anomalib's own data
modules, its engine and its pictures read images by our reader from then on.
"""

import anomalib.models  # noqa: F401  (first: our detectors register after it, and import what is below)
from anomalib import data as anomalib_data

from anomalib_flowood.data.datamodules import CrossDataset, OneClass
from anomalib_flowood.data.datasets import SourcedDataset
from anomalib_flowood.data.decoding import UnreadableImageError, read_image
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.items import (
    SourcedImageBatch,
    SourcedImageItem,
    SourcedNumpyImageBatch,
    SourcedNumpyImageItem,
)
from anomalib_flowood.data.listing import image_files
from anomalib_flowood.data.path_dataset import PathDataset
from anomalib_flowood.data.prediction import read_as_trained
from anomalib_flowood.data.replacements import replace_in_anomalib
from anomalib_flowood.data.sources import DATA_SETS, LAYOUTS, register_data_set

__all__ = [
    "DATA_SETS",
    "LAYOUTS",
    "CrossDataset",
    "Images",
    "OneClass",
    "PathDataset",
    "SourcedDataset",
    "SourcedImageBatch",
    "SourcedImageItem",
    "SourcedNumpyImageBatch",
    "SourcedNumpyImageItem",
    "UnreadableImageError",
    "image_files",
    "read_as_trained",
    "read_image",
    "register_data_set",
]

for _datamodule in (CrossDataset, OneClass):
    setattr(anomalib_data, _datamodule.__name__, _datamodule)
replace_in_anomalib()
