# SPDX-License-Identifier: Apache-2.0
"""The arguments of detectors, data modules and Lightning's trainer, read from the code that has them.

Importing that code takes seconds, and a shell that starts asks for its completion.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import docstring_parser

from anomalib_flowood.cli.subcommands import Argument


def settings() -> list[Argument]:
    """Return ``--model.…`` of all our detectors, ``--data.…`` of our data modules, and ``--trainer.…``."""
    found: dict[str, Argument] = {}
    for arguments in _by_class().values():
        for argument in arguments:
            found.setdefault(argument.name, argument)
    return list(found.values())


def lacking() -> dict[str, list[str]]:
    """Return, by the name of a detector or a data module, the options of others of its kind that it does not have."""
    options = {name: [argument.name for argument in arguments] for name, arguments in _by_class().items()}
    kinds = {name: {option.partition(".")[0] for option in own} for name, own in options.items()}
    return {
        name: sorted({option for other in options if kinds[other] == kinds[name] for option in options[other]} - {*own})
        for name, own in options.items()
    }


def _by_class() -> dict[str, list[Argument]]:
    """What can be given to each detector, data module and the trainer; those without arguments are left out."""
    package = Path(__file__).parents[1]
    found = {}
    for group, name, file in [
        *(("model", file.parent.name, file) for file in sorted(package.glob("models/*/lightning_model.py"))),
        *(("data", file.stem, file) for file in sorted(package.glob("data/datamodules/*.py"))),
        *(("trainer", "trainer", Path(folder, "pytorch/trainer/trainer.py")) for folder in _folders("lightning")),
    ]:
        cls = "".join(word.title() for word in name.split("_"))
        arguments = [Argument(f"--{group}.{name}", "VALUE", text) for name, text in _arguments(file, cls)]
        if arguments:
            found[cls] = arguments
    return found


def _folders(package: str) -> list[str]:
    spec = find_spec(package)
    return [] if spec is None else list(spec.submodule_search_locations or ())


def _arguments(file: Path, cls: str) -> Iterator[tuple[str, str]]:
    """Names and first sentences of what builds a class; nothing if the file has no such class."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or node.name != cls:
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                parsed = docstring_parser.parse(ast.get_docstring(method) or ast.get_docstring(node) or "")
                texts = {known.arg_name: known.description or "" for known in parsed.params}
                for argument in [*method.args.args[1:], *method.args.kwonlyargs]:
                    # Names that are put in where the code runs are left out.
                    text = re.sub(r"\{\w+\}", "…", " ".join(texts.get(argument.arg, "").split()))
                    yield argument.arg, text.partition(". ")[0].removesuffix(".")
