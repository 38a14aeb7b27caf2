# SPDX-License-Identifier: Apache-2.0
"""A folder in the place of a data module: ``--data ./parts``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from anomalib.data import AnomalibDataModule

from anomalib_flowood.cli.subcommands import SUBCOMMANDS
from anomalib_flowood.data import OneClass
from anomalib_flowood.data.datamodules import LAYOUTS_OF_PARTS
from anomalib_flowood.names import subclasses, unknown_name

DATA = "--data"


def with_data_modules(arguments: Sequence[str]) -> list[str]:
    """Let :class:`OneClass` read the folder that a command line gives as its data.

    ``predict`` takes folders as they are: it needs to know of no class.

    Args:
        arguments: What follows the command's name.

    Returns:
        The same, with a data module in the place of a folder. Further arguments of it may follow.

    Raises:
        FileNotFoundError: If what is written as a path leads nowhere.
    """
    subcommand = next((argument for argument in arguments if argument in SUBCOMMANDS), "")
    if subcommand == "predict":
        return list(arguments)
    written: list[str] = []
    for argument in arguments:
        option, given, value = argument.partition("=")
        if option == DATA and given:
            written += _data_module(value) or [argument]
        elif written[-1:] == [DATA]:
            written[-1:] = _data_module(argument) or [DATA, argument]
        else:
            written.append(argument)
    return written


def _data_module(value: str) -> list[str] | None:
    """The arguments that stand for a folder; nothing where the value is something else."""
    path = Path(value).expanduser()
    modules = {cls.__name__ for cls in subclasses(AnomalibDataModule)}
    if path.is_dir() and value not in modules:
        return [DATA, f"{OneClass.__module__}.{OneClass.__name__}", f"{DATA}.dataset={path}"]
    if path.exists() or value in modules:
        return None
    if re.fullmatch(r"[\w-]+", value) and value != "null":
        folders = [entry.name for entry in Path().iterdir() if entry.is_dir() and entry.name[0] != "."]
        raise unknown_name("folder or data module", value, {*folders, *modules}, LAYOUTS_OF_PARTS)
    if value.startswith((".", "~", "/")) or (len(path.parts) > 1 and value[0] != "{"):
        msg = f"There is no folder {value} (looked for it from {Path.cwd()}). {LAYOUTS_OF_PARTS}"
        raise FileNotFoundError(msg)
    return None
