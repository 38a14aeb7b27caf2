# SPDX-License-Identifier: Apache-2.0
"""Which detector is fitted to what, and with which seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from .detectors import DETECTORS, ON_EMBEDDINGS, Detector, ablation
from .tasks import PARTS, SUITE_PARTS, Options, Task, cross, few, industrial, left_out, one_class, unified

LONG_CLASS = 0
"""The class of each set on which detectors run that train for long; on all of them a contest would take hours."""
TRAIN_LONG = ("Fastflow", "Patchflow", "Cflow")


@dataclass(frozen=True)
class Job:
    """One fit; a row for each of its tests."""

    task: Task
    detector: Detector
    seed: int

    def keys(self, parts: Sequence[str]) -> list[tuple[str, str, str, int]]:
        """The rows that it gives, as far as they are among the wanted parts."""
        tests = [test for test in self.task.tests if test.part in parts]
        return [(test.part, test.name, self.detector.name, self.seed) for test in tests]


def plan(options: Options) -> list[Job]:
    """Return all fits, the first seed of everything first.

    Raises:
        ValueError: If a detector or a part is unknown, or there is nothing to do.
        FileNotFoundError: If a folder is not there.
    """
    _check_names("detector", options.detectors, DETECTORS)
    _check_names("part", options.parts, dict.fromkeys((*PARTS, *SUITE_PARTS)))
    chosen = [DETECTORS[name] for name in DETECTORS if not options.detectors or name in options.detectors]
    pairs: list[tuple[Task, Detector]] = []
    if "industrial" in options.parts:
        pairs += product(industrial(options, "industrial"), chosen)
    if "few" in options.parts:
        pairs += product(few(options), chosen)
    if "unified" in options.parts:
        pairs += product(unified(options), chosen)
    if {"one_class", "cross"} & set(options.parts):
        pairs += product(one_class(options), chosen)
    if "left_out" in options.parts:
        pairs += product(left_out(options), [detector for detector in chosen if detector.name in ON_EMBEDDINGS])
    if "cross" in options.parts:
        pairs += product(cross(options), chosen)
    if "ablation" in options.parts and DETECTORS["FeatureMapFlow"] in chosen:
        pairs += product(industrial(options, "ablation"), ablation().values())
    if options.tasks:
        # Whole words, so that "mnist class 0" is not also a class of "fashion_mnist".
        wanted = re.compile("|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in options.tasks))
        pairs = [pair for pair in pairs if wanted.search(pair[0].name)]
    jobs = [Job(*pair, seed) for seed in options.seeds for pair in pairs if seed in _seeds(*pair, options.seeds)]
    if not jobs:
        msg = "Nothing to run: name a folder with --industrial, --mvtec or --visa, or other --parts or --tasks."
        raise ValueError(msg)
    return jobs


def _seeds(task: Task, detector: Detector, seeds: Sequence[int]) -> Sequence[int]:
    """The seeds with which a detector is fitted to a task."""
    if task.part in SUITE_PARTS:
        return seeds if detector.random or task.drawn else seeds[:1]
    small = task.part in {"one_class", "left_out", "cross"}
    if small and detector.name in TRAIN_LONG and not task.name.endswith(f"class {LONG_CLASS}"):
        return ()
    return seeds if small and detector.random and detector.name in ON_EMBEDDINGS else seeds[:1]


def _check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            msg = f"There is no {what} {name!r}. Known: {', '.join(known)}."
            raise ValueError(msg)
