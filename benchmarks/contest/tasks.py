# SPDX-License-Identifier: Apache-2.0
"""What there is to fit to, part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path

from anomalib.data import AnomalibDataModule, Visa
from torch.utils.data import DataLoader

from anomalib_flowood import CrossDataset, OneClass

from .data import HELD_OUT, IndustrialFolder, LeftOut, Together, industrial_samples, with_others

PARTS = ("industrial", "one_class", "left_out", "cross", "ablation")
SUITE_PARTS = ("industrial", "few", "unified")
"""Parts of the suite: a model for each folder, one for a few images of it, and one for all folders."""
SETS = ("fashion_mnist", "mnist")

FEW = 40
"""Training images that are drawn from a folder for the part ``few``."""

MAP_SIZE = 224
"""Height and width of the images of industrial tasks, and of the maps that are measured."""
SMALL_SIZE = 96
"""Height and width to which the backbone gets the 28 × 28 images."""


@dataclass(frozen=True)
class TestSet:
    """What a fitted detector is tested on; one row.

    Attributes:
        part: One of :data:`PARTS` or :data:`SUITE_PARTS`.
        name: Its name in rows.
        loader: Gives its images from the data module; ``None`` for those of all tests before it, as one.
    """

    part: str
    name: str
    loader: Callable[[AnomalibDataModule], DataLoader] | None = methodcaller("test_dataloader")


@dataclass(frozen=True)
class Task:
    """Something to fit to and be tested on.

    Attributes:
        part: One of :data:`PARTS` or :data:`SUITE_PARTS`.
        name: Its name.
        kind: ``industrial``, ``unified``, ``one_class`` or ``cross``: what sizes, caps and PatchCore's share hang on.
        data: Makes the data module.
        others: What the fitted detector is tested on besides the test images of the data module.
        own: Whether it is tested on those.
        size: Height and width of what the backbone gets, where it is not the usual of the kind.
        drawn: Whether the seed draws the training images: ``data`` takes it.
    """

    part: str
    name: str
    kind: str
    data: Callable[..., AnomalibDataModule]
    others: tuple[TestSet, ...] = ()
    own: bool = True
    size: int | None = None
    drawn: bool = False

    @property
    def tests(self) -> tuple[TestSet, ...]:
        """All that the fitted detector is tested on."""
        return (*([TestSet(self.part, self.name)] if self.own else []), *self.others)

    @property
    def has_maps(self) -> bool:
        """Whether it matters where an image is anomalous."""
        return self.kind in {"industrial", "unified"}

    @property
    def image_size(self) -> int:
        """Height and width of what the backbone gets."""
        return self.size or (MAP_SIZE if self.has_maps else SMALL_SIZE)


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see ``__main__.py``.

    Attributes:
        extras: Whether to measure what only the contest shows, too: images per second, memory, AUPIMO, and maps for
            pictures.
        features: Folder in which what backbones have computed outlives the command; without one it does not.
        again: Whether to run what is finished, too.
    """

    output: Path = Path("runs/contest")
    parts: Sequence[str] = PARTS
    industrial: Sequence[Path] = ()
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
    image_size: int | None = None
    extras: bool = True
    features: Path | None = None
    again: bool = False


def _industrial_folders(options: Options) -> list[tuple[str, Callable[..., IndustrialFolder]]]:
    """The folders of ``--industrial`` by name.

    Raises:
        FileNotFoundError: If one is not there, or lacks images.
        ValueError: If two have the same name, or one has masks for some anomalous images alone.
    """
    found: dict[str, Callable[..., IndustrialFolder]] = {}
    for given in options.industrial:
        folder = given.resolve()
        if folder.name in found:
            msg = f"Two folders are called {folder.name!r}, which is their name in tables: rename one."
            raise ValueError(msg)
        industrial_samples(folder)  # what is wrong with it shows before anything is fitted
        found[folder.name] = partial(IndustrialFolder, folder.parent, folder.name, limit=options.limit, **HELD_OUT)
    return list(found.items())


def industrial(options: Options, part: str) -> list[Task]:
    """Return the categories of the folders that the options name, for the part ``industrial`` or ``ablation``.

    Raises:
        FileNotFoundError: If a folder is not there, or lacks images.
        ValueError: If two folders have the same name, or one has masks for some anomalous images alone.
    """
    for given in (options.mvtec, options.visa):
        if given is not None and not given.is_dir():
            msg = f"There is no folder {given}."
            raise FileNotFoundError(msg)
    found: list[tuple[str, Callable[[], AnomalibDataModule]]] = [*_industrial_folders(options)]
    mvtec = partial(IndustrialFolder, limit=options.limit, **HELD_OUT)
    if options.mvtec is not None:
        found += [(f"mvtec/{name}", partial(mvtec, options.mvtec, name)) for name in _folders(options.mvtec, "train")]
    if options.visa is not None:
        visa = partial(Visa, options.visa, **HELD_OUT)
        found += [(f"visa/{name}", partial(visa, name)) for name in _folders(options.visa, "Data")]
    chosen = [(name, data) for name, data in found if not options.categories or _category(name) in options.categories]
    return [Task(part, name, "industrial", data, size=options.image_size) for name, data in chosen]


def few(options: Options) -> list[Task]:
    """Return the folders of ``--industrial`` with as few training images as many a user has; the seed draws them.

    Raises:
        FileNotFoundError: If a folder is not there, or lacks images.
        ValueError: If two folders have the same name, or one has masks for some anomalous images alone.
    """
    return [
        Task("few", name, "industrial", partial(data, drawn=FEW), size=options.image_size, drawn=True)
        for name, data in _industrial_folders(options)
    ]


def unified(options: Options) -> list[Task]:
    """Return the folders of ``--industrial`` as one normal class; nothing where there is one.

    Each is tested on its own, and then all together. A row's task names them all: one model for others is another.

    Raises:
        FileNotFoundError: If a folder is not there, or lacks images.
        ValueError: If two folders have the same name, or one has masks for some anomalous images alone.
    """
    folders = _industrial_folders(options)
    if len(folders) < 2:
        return []
    together = "+".join(sorted(name for name, _ in folders))
    tests = (
        *(
            TestSet("unified", f"{together}: {name}", methodcaller("test_of", number))
            for number, (name, _) in enumerate(folders)
        ),
        TestSet("unified", together, loader=None),
    )

    def data() -> Together:
        return Together([make() for _, make in folders])

    return [Task("unified", f"{len(folders)} folders", "unified", data, tests, own=False, size=options.image_size)]


def _folders(root: Path, inside: str) -> list[str]:
    return sorted(path.name for path in root.iterdir() if (path / inside).is_dir())


def _category(name: str) -> str:
    return name.rpartition("/")[2]


def one_class(options: Options) -> list[Task]:
    """Return each class of each of the small sets as the normal one."""
    train, test = (2000, 200) if options.limit is None else (options.limit, max(5, options.limit // 10))
    data = partial(OneClass, root=options.root, train_limit=train, test_limit=test)
    return [
        Task("one_class", name, "one_class", partial(data, dataset, number), shown(name, other))
        for dataset, other in (SETS, SETS[::-1])
        for number in range(10)
        for name in [f"{dataset} class {number}"]
    ]


def shown(name: str, other: str) -> tuple[TestSet, ...]:
    """Return the images of another data set that a detector of one class is shown besides."""
    return (TestSet("cross", f"{name} -> {other}", partial(with_others, other=other)),)


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
