# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``flowood``, for its help, its parser and its dispatch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Subcommand:
    """What is known of a subcommand without importing anomalib.

    Attributes:
        description: What it does.
        ours: Whether anomalib's parser lacks it: :class:`~anomalib_flowood.cli.commands.FlowoodCLI` has a method of its
            name, and ``add_…_arguments``.
        on_checkpoint: Whether it takes the detector from a checkpoint, if one is named.
    """

    description: str
    ours: bool = False
    on_checkpoint: bool = False


SUBCOMMANDS = {
    "train": Subcommand("Fit a detector, then test it."),
    "fit": Subcommand("Fit a detector."),
    "validate": Subcommand("Run a fitted detector on the validation set.", on_checkpoint=True),
    "test": Subcommand("Run a fitted detector on the test set and print its metrics.", on_checkpoint=True),
    "predict": Subcommand(
        "Score images, keep the scores as predictions.csv and show the most anomalous.", on_checkpoint=True
    ),
    "export": Subcommand("Export a fitted detector (torch, ONNX, OpenVINO).", on_checkpoint=True),
    "benchmark": Subcommand("Compare detectors, ours and anomalib's, on data sets: a table, scores and histograms."),
    "explain": Subcommand(
        "Draw what a fitted flow does to images from inside and outside, on one page.", ours=True, on_checkpoint=True
    ),
    "score": Subcommand(
        "Give a trained checkpoint another anomaly score, without training it again.", ours=True, on_checkpoint=True
    ),
    "watch": Subcommand("Score images as they arrive in a folder; set aside what is anomalous.", ours=True),
    "serve": Subcommand("Score images that are sent over HTTP, with a page to drop them on and metrics.", ours=True),
    "report": Subcommand("Show the results of a benchmark or a test on one page.", ours=True),
    "backbone": Subcommand("Save a timm backbone with its weights into a folder, for use offline.", ours=True),
    "install": Subcommand("Install anomalib's optional dependencies."),
}
