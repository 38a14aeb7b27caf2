# SPDX-License-Identifier: Apache-2.0
"""Data modules for out-of-distribution and one-class detection, and the data sets behind them.

``get_datamodule`` looks for names in ``anomalib.data`` alone, so the data modules are put there.
"""

from anomalib import data as anomalib_data

from anomalib_flowood.data.datamodules import CrossDataset, OneClass
from anomalib_flowood.data.datasets import (
    SourcedDataset,
    SourcedImageBatch,
    SourcedImageItem,
    SourcedNumpyImageBatch,
    SourcedNumpyImageItem,
    show_images_without_files,
)
from anomalib_flowood.data.sources import DATA_SETS

__all__ = [
    "DATA_SETS",
    "CrossDataset",
    "OneClass",
    "SourcedDataset",
    "SourcedImageBatch",
    "SourcedImageItem",
    "SourcedNumpyImageBatch",
    "SourcedNumpyImageItem",
]

for _datamodule in (CrossDataset, OneClass):
    setattr(anomalib_data, _datamodule.__name__, _datamodule)
show_images_without_files()
