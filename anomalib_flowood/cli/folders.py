# SPDX-License-Identifier: Apache-2.0
"""A folder in the place of a data module: ``--data ./parts``, and ``data: ./parts`` in a configuration file."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from anomalib.data import AnomalibDataModule
from jsonargparse import Namespace

from anomalib_flowood.cli.subcommands import SUBCOMMANDS
from anomalib_flowood.configuration import read_configuration
from anomalib_flowood.data import OneClass
from anomalib_flowood.data.datamodules import LAYOUTS_OF_PARTS
from anomalib_flowood.files import at_home
from anomalib_flowood.names import subclasses, unknown_name
from anomalib_flowood.parsing import FlowoodParser

DATA = "--data"
_OF_FOLDERS = "predict"
"""The subcommand that takes a folder as it is."""
_CONFIGURATIONS = (".yaml", ".yml", ".json")
_READER = f"{OneClass.__module__}.{OneClass.__name__}"


class FolderParser(FlowoodParser):
    """A parser of configurations in which the data may be a folder, as on the command line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._here = Path.cwd()  # that of a file is another while it is parsed

    def parse_string(self, cfg_str: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a configuration; ``data: FOLDER`` in it is relative to where the command runs, not to the file."""
        if self.prog.split()[-1] != _OF_FOLDERS:
            cfg_str = _with_data_module(cfg_str, self._here)
        return super().parse_string(cfg_str, *args, **kwargs)


def _with_data_module(text: str, here: Path) -> str:
    """Let :class:`OneClass` read the folder that a configuration gives as its data."""
    try:
        top = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # which the parser says, too
        return text
    for key, value in top.value if isinstance(top, yaml.MappingNode) else ():
        if key.value != "data" or value.tag != "tag:yaml.org,2002:str":
            continue
        if Path(value.value).is_file():  # beside this one
            _check_configuration(Path(value.value))
            continue
        folder = _folder(value.value, here)
        if folder is not None:
            return text[: value.start_mark.index] + _written(folder) + text[value.end_mark.index :]
    return text


def with_data_modules(arguments: Sequence[str]) -> list[str]:
    """Let :class:`OneClass` read the folder that a command line gives as its data.

    ``predict`` takes folders as they are: it needs to know of no class.

    Args:
        arguments: What follows the command's name. Further arguments of the data module may follow the folder.

    Raises:
        FileNotFoundError: If what is written as a path leads nowhere.
        ValueError: If it leads to a file that describes no data module.
    """
    subcommand = next((argument for argument in arguments if argument in SUBCOMMANDS), "")
    if subcommand == _OF_FOLDERS:
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
    folder = _folder(value, Path.cwd())
    if folder is None:
        return None
    if _is_plain(str(folder)):
        return [DATA, _READER, f"{DATA}.dataset={folder}"]
    return [DATA, _written(folder)]


def _written(folder: Path) -> str:
    """The data module that reads a folder, as a configuration has it, in JSON.

    Raises:
        ValueError: If the folder's name is not in UTF-8, which configurations are in, those of a run, too.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        msg = (
            f"The name of the folder {str(folder)!r} is not in UTF-8, as configurations are, that of this run, too: "
            "rename it, or name a link to it (ln -s FOLDER LINK). What lies in it may have any names."
        )
        raise ValueError(msg) from error
    # As it is: YAML knows no pairs of escapes, which JSON has for a 🎈.
    return json.dumps({"class_path": _READER, "init_args": {"dataset": str(folder)}}, ensure_ascii=False)


def _is_plain(text: str) -> bool:
    """Whether an option's value, which is read as YAML, is itself; one that is not would be a comment, or a mapping."""
    try:
        return yaml.safe_load(text) == text
    except yaml.YAMLError:
        return False


def without_comments(arguments: Sequence[str]) -> list[str]:
    """Write paths that begin with ``#``, of which YAML would leave nothing, from this folder on."""
    written = []
    for argument in arguments:
        option, _, value = argument.rpartition("=")
        named = option[:2] == "--" and value[:1] == "#"
        written.append(f"{option}=./{value}" if named else f"./{argument}" if argument[:1] == "#" else argument)
    return written


def _check_configuration(file: Path) -> None:
    """Refuse, as data, a file that describes no data module, such as an image or a list of them."""
    if file.suffix.lower() not in _CONFIGURATIONS:
        with contextlib.suppress(ValueError):
            if isinstance(read_configuration(file), dict):
                return
        msg = f"{file} is a file, but describes no data module: give a folder. {LAYOUTS_OF_PARTS}"
        raise ValueError(msg)


def _folder(value: str, here: Path) -> Path | None:
    """The folder that is meant, seen from another one, as it was given; nothing where the value is something else."""
    if not value:  # as of a variable of a shell that is not set: not this very folder
        msg = f"No data are named: give a folder. {LAYOUTS_OF_PARTS}"
        raise FileNotFoundError(msg)
    given = at_home(value)
    path = here / given
    modules = {cls.__name__ for cls in subclasses(AnomalibDataModule)}
    if path.is_dir() and value not in modules:
        return given
    if path.exists() or value in modules:
        if path.is_file() and value not in modules:
            _check_configuration(path)
        return None
    if re.fullmatch(r"[\w-]+", value) and value != "null":
        folders = [entry.name for entry in here.iterdir() if entry.is_dir() and entry.name[0] != "."]
        hint = f"(Looked for the folder from {here}.) {LAYOUTS_OF_PARTS}"
        raise unknown_name("folder or data module", value, {*folders, *modules}, hint)
    if value.startswith((".", "~", "/")) or (len(given.parts) > 1 and value[0] != "{"):
        msg = f"There is no folder {value} (looked for it from {here}). {LAYOUTS_OF_PARTS}"
        raise FileNotFoundError(msg)
    return None
