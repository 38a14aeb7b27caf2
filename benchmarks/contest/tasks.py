# SPDX-License-Identifier: Apache-2.0
"""What there is to fit to, part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anomalib.data import AnomalibDataModule, Visa

from anomalib_flowood import CrossDataset, OneClass

from .data import HELD_OUT, IndustrialFolder, LeftOut

PARTS = ("industrial", "one_class", "left_out", "cross", "ablation")
SETS = ("fashion_mnist", "mnist")

MAP_SIZE = 224
"""Height and width of the images of industrial tasks, and of the maps that are measured."""
SMALL_SIZE = 96
"""Height and width to which the backbone gets the 28 × 28 images."""


@dataclass(frozen=True)
class Task:
    """Something to fit to and be tested on.

    Attributes:
        part: One of :data:`PARTS`.
        name: Its name in rows.
        kind: ``industrial``, ``one_class`` or ``cross``: what sizes, caps and PatchCore's share hang on.
        data: Makes the data module.
        other: For one-class tasks, the data set whose images the fitted detector is shown besides.
    """

    part: str
    name: str
    kind: str
    data: Callable[[], AnomalibDataModule]
    other: str = ""

    @property
    def image_size(self) -> int:
        """Height and width of what the backbone gets."""
        return MAP_SIZE if self.kind == "industrial" else SMALL_SIZE


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see ``__main__.py``."""

    output: Path = Path("runs/contest")
    parts: Sequence[str] = PARTS
    industrial: Path | None = None
    mvtec: Path | None = None
    visa: Path | None = None
    categories: Sequence[str] = ()
    detectors: Sequence[str] = ()
    tasks: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    backbone: str = "tf_efficientnet_lite0"
    limit: int | None = None
    cap: float | None = None
    root: str = "./datasets"


def industrial(options: Options, part: str) -> list[Task]:
    """Return the categories of the folders that the options name, for the part ``industrial`` or ``ablation``.

    Raises:
        FileNotFoundError: If a folder is not there.
    """
    for given, inside in ((options.industrial, "train/good"), (options.mvtec, ""), (options.visa, "")):
        if given is not None and not (given / inside).is_dir():
            msg = f"There is no folder {given / inside}."
            raise FileNotFoundError(msg)
    found: list[tuple[str, Callable[[], AnomalibDataModule]]] = []
    mvtec = partial(IndustrialFolder, limit=options.limit, **HELD_OUT)
    if options.industrial is not None:
        folder = options.industrial.resolve()
        found.append((folder.name, partial(mvtec, folder.parent, folder.name)))
    if options.mvtec is not None:
        found += [(f"mvtec/{name}", partial(mvtec, options.mvtec, name)) for name in _folders(options.mvtec, "train")]
    if options.visa is not None:
        visa = partial(Visa, options.visa, **HELD_OUT)
        found += [(f"visa/{name}", partial(visa, name)) for name in _folders(options.visa, "Data")]
    chosen = [(name, data) for name, data in found if not options.categories or _category(name) in options.categories]
    return [Task(part, name, "industrial", data) for name, data in chosen]


def _folders(root: Path, inside: str) -> list[str]:
    return sorted(path.name for path in root.iterdir() if (path / inside).is_dir())


def _category(name: str) -> str:
    return name.rpartition("/")[2]


def one_class(options: Options) -> list[Task]:
    """Return each class of each of the small sets as the normal one."""
    train, test = (2000, 200) if options.limit is None else (options.limit, max(5, options.limit // 10))
    data = partial(OneClass, root=options.root, train_limit=train, test_limit=test)
    return [
        Task("one_class", f"{dataset} class {number}", "one_class", partial(data, dataset, number), other)
        for dataset, other in (SETS, SETS[::-1])
        for number in range(10)
    ]


def left_out(options: Options) -> list[Task]:
    """Return each class of each of the small sets as the anomalous one."""
    train, test = (2000, 500) if options.limit is None else (options.limit, max(5, options.limit // 2))
    data = partial(LeftOut, root=options.root, train_limit=train, test_limit=test)
    return [
        Task("left_out", f"{dataset} without class {number}", "one_class", partial(data, dataset, number))
        for dataset in SETS
        for number in range(10)
    ]


def cross(options: Options) -> list[Task]:
    """Return each of the small sets as the inside of the other."""
    train, test = (4000, 1000) if options.limit is None else (options.limit, max(10, options.limit // 2))
    data = partial(CrossDataset, root=options.root, train_limit=train, test_limit=test)
    return [
        Task("cross", f"{inside} -> {outside}", "cross", partial(data, inside, [outside]))
        for inside, outside in (SETS, SETS[::-1])
    ]
