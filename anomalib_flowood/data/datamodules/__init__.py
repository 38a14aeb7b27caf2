# SPDX-License-Identifier: Apache-2.0
"""Data modules for cross-dataset out-of-distribution detection and for one-class anomaly detection."""

from anomalib_flowood.data.datamodules.base import SourcedDataModule
from anomalib_flowood.data.datamodules.cross_dataset import CrossDataset
from anomalib_flowood.data.datamodules.normal_class import LAYOUTS_OF_PARTS
from anomalib_flowood.data.datamodules.one_class import OneClass

__all__ = ["LAYOUTS_OF_PARTS", "CrossDataset", "OneClass", "SourcedDataModule"]
