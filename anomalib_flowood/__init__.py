"""Normalizing flows for anomaly and out-of-distribution detection, as anomalib models."""
