# SPDX-License-Identifier: Apache-2.0
"""The short help: of the command, and of each subcommand, on a screen."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence

from anomalib_flowood.cli.subcommands import SUBCOMMANDS, Argument
from anomalib_flowood.names import unknown_name

COMPLETION = "--print_completion"
"""The option that writes a shell's completion; newer releases of jsonargparse use the same name."""

PARSED = ("-c", "--config", "--print_config")
"""What a command line may begin with beside a subcommand, and what is left to the parser."""

_HELP = {"-h", "--help", "-hv", "-hvv"}
_LEVELS = {"-v": 1, "--verbose": 1, "-hv": 1, "-vv": 2, "-hvv": 2}


def overview() -> str:
    """What ``flowood --help`` shows."""
    return "\n".join(
        [
            "usage: flowood SUBCOMMAND ...",
            "",
            *_wrapped(
                "anomalib's command line with detectors that are normalizing flows, and with data modules for "
                "out-of-distribution detection."
            ),
            "",
            *_columns((name, subcommand.description) for name, subcommand in SUBCOMMANDS.items()),
            "",
            "first steps:",
            "  flowood doctor                    what is installed here, and what is missing",
            "  flowood train --data ./parts      a folder of images is enough",
            "  flowood configs ./configs         configuration files to begin with",
            "",
            *_wrapped(
                "flowood SUBCOMMAND --help tells more; add -v for all arguments of ours, -vv for those of Lightning, "
                f"too. flowood --version shows versions, and flowood {COMPLETION} bash (or zsh) writes what "
                "completes commands in a shell. FLOWOOD_DEBUG=1 in the environment shows the traceback of every error."
            ),
        ],
    )


def short_help(name: str) -> str:
    """What ``flowood NAME --help`` shows: usage, what most users need of the arguments, and examples."""
    subcommand = SUBCOMMANDS[name]
    positional = [argument.name.upper() for argument in subcommand.arguments if argument.name[0] != "-"]
    rows = [(_left(argument), argument.text) for argument in subcommand.arguments]
    lines = [" ".join(["usage: flowood", name, *positional, "[options]"]), "", *_wrapped(subcommand.description), ""]
    if rows:
        lines += [*_columns(rows), ""]
    if subcommand.examples:
        lines.append("examples:")
        for arguments, what in subcommand.examples:
            lines += [f"  flowood {name} {arguments}", f"      {what}"]
        lines.append("")
    return "\n".join([*lines, f"flowood {name} --help -v shows all arguments of ours, -vv those of Lightning, too."])


def help_level(arguments: Sequence[str]) -> int | None:
    """How much help a command line asks for: ``None`` for none, 0 for the short one, 1 with ``-v``, 2 with ``-vv``."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if not _HELP & set(options):
        return None
    return min(2, sum(_LEVELS.get(option, 0) for option in options))


def without_levels(arguments: Sequence[str]) -> list[str]:
    """Ask for help in the words of a parser, which knows of no levels."""
    return [*(argument for argument in arguments if argument not in _HELP | _LEVELS.keys()), "--help"]


def unknown(first: str) -> str:
    """Say that a command line cannot begin so, and what may have been meant."""
    if first[:1] != "-":
        return str(unknown_name("subcommand", first, SUBCOMMANDS, "flowood --help says what each does."))
    option = first.partition("=")[0]
    return str(unknown_name("option", option, {"--help", "--version", COMPLETION, *PARSED}))


def _left(argument: Argument) -> str:
    shown = argument.name if argument.name[0] == "-" else argument.name.upper()
    return f"{shown} {argument.value}".strip() if argument.name[0] == "-" else shown


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _width(), break_on_hyphens=False)


def _columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of two columns, the second one wrapped below itself; a long first one has a line of its own."""
    rows = list(rows)
    width = min(26, max(len(left) for left, _ in rows))
    lines = []
    for left, text in rows:
        first, *others = textwrap.wrap(text, _width() - width - 4, break_on_hyphens=False)
        lines += [f"  {left:<{width}}  {first}"] if len(left) <= width else [f"  {left}", " " * (width + 4) + first]
        lines += [" " * (width + 4) + other for other in others]
    return lines


def _width() -> int:
    return max(60, min(100, shutil.get_terminal_size().columns))
