# SPDX-License-Identifier: Apache-2.0
"""Explain a trained detector: score images from inside and outside, draw, and write the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from anomalib.data import AnomalibDataModule
from rich.console import Console
from rich.progress import Progress, TextColumn
from sklearn.exceptions import NotFittedError
from torch import Tensor

from anomalib_flowood.files import at_home, write_text
from anomalib_flowood.models.components import FlowModule, known_flows
from anomalib_flowood.report.markup import finite

from .images import image_sets, normal_images
from .numbers import all_numbers, chunks, score, table
from .page import write_page
from .pictures import DARK, SHOWN_SETS
from .sections import sections_of

_COMPARED = 4
"""Training images that others are compared with, for each image of a set."""


def explain(
    detector: FlowModule,
    data: AnomalibDataModule | Mapping[str, Tensor],
    output: str | Path,
    *,
    max_images: int = 64,
) -> Path:
    """Write pictures of what a trained flow does to images from inside and outside, and a page that shows them.

    Every flow gets log-likelihood histograms. A flow on pixels also gets latents, s and t of every coupling layer and
    co-adaptation (after Kirichenko et al. 2020, figures 1 to 3); a flow that images can be drawn from, samples; one on
    embeddings, the inside images nearest to the outside images that the detector finds the least anomalous. A score
    that can be taken apart, by layers and positions or by directions, is taken apart for single images, beside the
    training images that are nearest to them.
    :mod:`anomalib_flowood.models.components.capabilities` says how a detector of your own offers these.

    ``explain.json`` holds the numbers: for each set the log-likelihoods (nats), bits per dimension, AUROC against the
    inside set, and for each coupling layer its co-adaptation and what it predicts, see
    :func:`~anomalib_flowood.explain.coadaptation`.

    Args:
        detector: A trained detector, on the device that is to do the work. It is left as it is: mode, weights and
            running statistics.
        data: A data module, whose test images with label 0 are inside and those with label 1 outside, told apart by
            their ``source`` where they have one. Or images in [0, 1] by name, each of shape ``(N, 3, H, W)`` or
            ``(N, 1, H, W)``, the inside ones first.
        output: Folder to write to; made if missing.
        max_images: The most images of each set.

    Returns:
        The page, ``index.html`` in the folder.

    Raises:
        ValueError: If the detector is of another kind, ``max_images`` is below 2, or there are no images from inside
            or none from outside.
        NotFittedError: If the detector was never trained.
    """
    check_explainable(type(detector))
    if not bool(detector.model.fitted):
        msg = f"This {type(detector).__name__} was never fitted, so there is nothing to explain: train it first."
        raise NotFittedError(msg)
    if max_images < 2:
        msg = f"max_images must be at least 2, got {max_images}."
        raise ValueError(msg)
    folder = at_home(output)
    modes = {module: module.training for module in detector.modules()}
    detector.eval()
    try:
        _, *bars = Progress.get_default_columns()
        described = TextColumn("{task.description}", markup=False)  # names of sets are no markup
        # Progress goes to the error stream, so that the output of a command stays what it prints.
        with Progress(described, *bars, console=Console(stderr=True), transient=True) as progress:
            return _explain(detector, data, folder, max_images, progress)
    finally:
        for module, training in modes.items():
            module.training = training


def check_explainable(detector: type) -> None:
    """Refuse a class of detectors that cannot be explained, since it is no flow."""
    if not issubclass(detector, FlowModule):
        able = ", ".join(known_flows())
        msg = f"{detector.__name__} cannot be explained: it is no flow. Detectors that can: {able}."
        raise ValueError(msg)


@torch.no_grad()
def _explain(
    detector: FlowModule,
    data: AnomalibDataModule | Mapping[str, Tensor],
    folder: Path,
    max_images: int,
    progress: Progress,
) -> Path:
    task = progress.add_task("reading images", total=None)
    sets = image_sets(detector, data, max_images)
    sections = sections_of(detector)
    progress.update(task, total=sum(len(chunks(part)) for part in sets) + len(sections))

    scored = []
    for part in sets:
        progress.update(task, description=f"scoring images of {part.name}")
        scored.append(score(detector, part, lambda: progress.advance(task)))
    numbers = all_numbers(detector, scored)
    (folder / DARK).mkdir(parents=True, exist_ok=True)  # not before it is known that there is something to write
    pictures = []
    compared = any(section.compares for section in sections)
    normal = [normal_images(detector, data, sets, _COMPARED * max_images)] if compared else []
    for section in sections:
        progress.update(task, description=section.doing)
        pictures.append(section.draw(detector, scored, *(normal if section.compares else []), folder))
        progress.advance(task)
    cases = [case.numbers for picture in pictures for case in picture.cases]
    numbers |= {"cases": cases} if cases else {}

    text = json.dumps(finite(numbers), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / "explain.json", text + "\n")
    names = [part.images.name for part in scored]
    introduction = (
        f"What a trained {numbers['detector']} makes of images from inside ({names[0]}, which it was trained to know) "
        f"and from outside ({', '.join(names[1:])})."
    )
    if len(names) > SHOWN_SETS:
        introduction += f" Pictures show the first {SHOWN_SETS - 1} of the {len(names) - 1} outside sets."
    header, rows = table(numbers)
    return write_page(
        folder / "index.html", f"{numbers['detector']} on {names[0]}", introduction, header, rows, pictures
    )
