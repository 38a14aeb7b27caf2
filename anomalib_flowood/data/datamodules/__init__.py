# SPDX-License-Identifier: Apache-2.0
"""Data modules for cross-dataset out-of-distribution detection and for one-class anomaly detection."""

from anomalib_flowood.data.datamodules.base import SourcedDataModule
from anomalib_flowood.data.datamodules.cross_dataset import CrossDataset
from anomalib_flowood.data.datamodules.one_class import OneClass

__all__ = ["CrossDataset", "OneClass", "SourcedDataModule"]
