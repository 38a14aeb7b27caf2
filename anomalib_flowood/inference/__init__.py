# SPDX-License-Identifier: Apache-2.0
"""Trained detectors at work: images of any kind in, decisions as NumPy out; the same in PyTorch, ONNX and OpenVINO."""

from anomalib_flowood.inference.detector import Detector, Scores
from anomalib_flowood.inference.loading import load

__all__ = ["Detector", "Scores", "load"]
