# SPDX-License-Identifier: Apache-2.0
"""Completion in a shell: subcommands, their arguments, files, folders and names."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import shtab

from anomalib_flowood.cli.help import COMPLETION
from anomalib_flowood.cli.settings import settings
from anomalib_flowood.cli.subcommands import FILE, FOLDER, SUBCOMMANDS, Argument
from anomalib_flowood.names import check_known


def completion(shell: str) -> str:
    """Write the script that completes ``flowood`` in a shell.

    jsonargparse would write one, too, from all that could be typed: minutes go into it, and megabytes come of it. Here
    ``--model.…`` and ``--data.…`` are those of all our detectors and data modules, whichever has been chosen: shtab's
    scripts do not look at what is typed before.

    Args:
        shell: ``bash``, ``zsh``, or another one that shtab knows.

    Returns:
        The script.

    Raises:
        ValueError: If the shell is not known.
    """
    check_known("shell", [shell], shtab.SUPPORTED_SHELLS)
    parser = ArgumentParser(prog="flowood", add_help=False)
    parser.add_argument("--version", action="store_true", help="Show versions.")
    _add_help(parser)
    parser.add_argument(
        COMPLETION, choices=shtab.SUPPORTED_SHELLS, help="Write the script that completes commands in a shell."
    )
    of_detectors = settings()
    subparsers = parser.add_subparsers()
    for name, subcommand in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=_literal(subcommand.description), add_help=False)
        _add_help(subparser)
        arguments = [*subcommand.arguments, *subcommand.more, *(of_detectors if subcommand.runs_detectors else ())]
        for argument in {argument.name: argument for argument in reversed(arguments)}.values():
            _add(subparser, argument)
    return shtab.complete(parser, shell)


def _add_help(parser: ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action="store_true", help="Show help; with -v and -vv more.")


def _add(parser: ArgumentParser, argument: Argument) -> None:
    if argument.name.endswith(".ARGUMENT"):
        return
    kwargs: dict[str, Any] = {"help": _literal(argument.text)}
    if not argument.value:
        kwargs["action"] = "store_true"
    elif argument.choices:
        kwargs["choices"] = argument.choices
    action: Any = parser.add_argument(argument.name, **kwargs)
    if FILE in argument.value:
        action.complete = shtab.FILE
    elif FOLDER in argument.value:
        action.complete = shtab.DIRECTORY


def _literal(text: str) -> str:
    """Escape what argparse would format."""
    return text.replace("%", "%%")
