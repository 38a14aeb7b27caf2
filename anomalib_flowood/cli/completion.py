# SPDX-License-Identifier: Apache-2.0
"""Completion in a shell: subcommands, their arguments, files, folders and names."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import shtab

from anomalib_flowood.cli.help import COMPLETION
from anomalib_flowood.cli.settings import lacking, settings
from anomalib_flowood.cli.subcommands import FILE, FOLDER, SUBCOMMANDS, Argument
from anomalib_flowood.names import check_known

_OF_CLASSES = """
# What the detector and the data module that have been typed do not have; a folder is read by OneClass.
_flowood_lacking() {
  local word before
  for word in "$@"; do
    [[ $before == --data && -d $word ]] && word=OneClass
    case ${word##*.} in
LACKING
    esac
    [[ $word == '=' ]] || before=$word
  done
}
"""

_CHOSEN = {
    "bash": _OF_CLASSES
    + """
_flowood() {
  _shtab_flowood "$@"
  local word lacking offered=("${COMPREPLY[@]}")
  lacking=" $(_flowood_lacking "${COMP_WORDS[@]:1:COMP_CWORD-1}" | tr '\\n' ' ')"
  COMPREPLY=()
  for word in "${offered[@]}"; do [[ $lacking == *" $word "* ]] || COMPREPLY+=("$word"); done
}

complete -o bashdefault -F _flowood flowood
""",
    "zsh": _OF_CLASSES
    + """
_flowood() {
  local name=_shtab_flowood_$words[2]_options entry
  local lacking=" ${$(_flowood_lacking ${=words/=/ = })//$'\\n'/ } "
  local -a kept
  if [[ -n $words[2] && $words[2] != *[^a-z]* ]]; then
    for entry in "${(@P)name}"; do [[ $lacking == *" ${entry%%\\[*} "* ]] || kept+=("$entry"); done
    local -a $name
    set -A $name "${kept[@]}"
  fi
  _shtab_flowood "$@"
}

if [[ $zsh_eval_context[-1] == eval ]]; then compdef _flowood -N flowood; fi
""",
}
"""What is put around shtab's functions, by shell."""


def completion(shell: str) -> str:
    """Write the script that completes ``flowood`` in a shell.

    jsonargparse would write one, too, from all that could be typed: minutes go into it, and megabytes come of it.
    shtab's does not look at what is typed before, and offers ``--model.…`` and ``--data.…`` of all our detectors and
    data modules; in bash and zsh those that the chosen ones lack are taken out of it.

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
    return shtab.complete(parser, shell) + _CHOSEN.get(shell, "").replace("LACKING", _lacking())


def _lacking() -> str:
    """Cases of a shell: what each class lacks."""
    return "\n".join(f"    {name}) echo '{' '.join(options)}' ;;" for name, options in lacking().items() if options)


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
