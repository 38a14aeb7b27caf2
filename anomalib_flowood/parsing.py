# SPDX-License-Identifier: Apache-2.0
"""The parser of the command line: help of a length that is asked for, and errors that say what was meant.

Imports neither anomalib nor PyTorch, so that subcommands which need no anomalib start at once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace

from anomalib_flowood.files import whole_file
from anomalib_flowood.names import alternatives, nearest, subclasses, unknown_name

ALL = 2
HELP_LEVEL: ContextVar[int] = ContextVar("HELP_LEVEL", default=ALL)
"""How much a parser's help shows: all, or less, where what belongs to Lightning and PyTorch is left out."""

LIBRARIES = ("trainer", "optimizer", "lr_scheduler", "logging")
"""Groups of arguments of other libraries, which document them."""
_CLASS = r"<class\s+'(?:\w+\.)*(\w+)'>"


class FlowoodParser(ArgumentParser):
    """A parser that calls itself ``flowood`` and names what was meant where a name is unknown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("prog", "flowood")
        super().__init__(*args, **kwargs)

    def format_help(self) -> str:
        """Describe the arguments, as many as :data:`HELP_LEVEL` says; in the usage only those that have to be given."""
        less = HELP_LEVEL.get() < ALL
        hidden = [action for action in self._actions if less and action.dest.split(".")[0] in LIBRARIES]
        texts, usage = [action.help for action in hidden], self.usage
        positional = [action.dest.upper() for action in self._actions if not action.option_strings]
        if self._subcommands_action is None:
            self.usage = " ".join([_command(self), *positional, "[options]"])
        try:
            for action in hidden:
                action.help = argparse.SUPPRESS
            return re.sub(_CLASS, r"\1", super().format_help())
        finally:
            self.usage = usage
            for action, text in zip(hidden, texts, strict=True):
                action.help = text

    def save(self, cfg: Namespace, path: Any, *args: Any, **kwargs: Any) -> None:
        """Write a configuration, as :meth:`ArgumentParser.save` does; the file appears whole or not at all."""
        if not kwargs.pop("overwrite", False) and Path(path).exists():
            super().save(cfg, path, *args, **kwargs)  # refuses
        with whole_file(path) as file:
            super().save(cfg, file, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with what is wrong with the command line, in the user's words, and exit status 2."""
        if not self.exit_on_error:  # a parser within a parser, which reads what it is told
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or _subcommand_parser(message, self)
        sys.stderr.write(f"flowood: {mended(message, parser)}\n({_command(parser)} --help tells more.)\n")
        sys.exit(2)


def whole_numbers_first(parser: ArgumentParser) -> None:
    """Let an argument that is an integer or a float read ``1`` as the integer, in whichever order its type names them.

    To Lightning ``limit_val_batches: 1`` is a batch, and 1.0 all of them. It names the integer first, and Python may
    give it another library's union all the same, in which the float is: to its cache of types both are equal.
    """
    for action in parser._actions:
        kind: Any = getattr(action, "_typehint", None)
        kinds = get_args(kind) if get_origin(kind) is Union else ()
        if {int, float} <= {*kinds}:
            action._typehint = Union[tuple(sorted(kinds, key=lambda one: one is not int))]  # type: ignore[attr-defined]  # noqa: UP007


def mended(message: str, parser: ArgumentParser) -> str:
    """Put an error of jsonargparse's into the user's words, with the nearest names where one is unknown.

    Args:
        message: What jsonargparse says.
        parser: The parser of the subcommand that was typed.
    """
    for say in (_linked, _unknown_option, _missing, _unknown_argument, _unknown_class, _unknown_key):
        said = say(message, parser)
        if said:
            return said
    return _plain(message)


def _linked(message: str, parser: ArgumentParser) -> str | None:
    """An option that another one sets, which jsonargparse names both of."""
    del parser
    found = re.search(r"argument (\S+) --> (\S+):.* value: '?(.*?)'?$", message)
    return said_by_another(found[2], found[1], found[3]) if found else None


def said_by_another(name: str, other: str, value: object) -> str:
    """Say which option to give instead of one that it sets."""
    return f"--{name} is what --{other} says: give --{other} {value} in its place."


def _unknown_option(message: str, parser: ArgumentParser) -> str | None:
    known = [option for option in parser._option_string_actions if option[:2] == "--" and option[-5:] != ".help"]
    if found := re.match(r"Unrecognized arguments: (.+)", message, re.DOTALL):
        options = [argument.partition("=")[0] for argument in found[1].split() if argument.strip("-")]
        options = [option for option in options if option[0] == "-"]
        if not options:
            return f"{found[1]} belongs to no option."
        return " ".join(f"There is no option {option}.{_near_option(option, known)}" for option in options)
    # Of a configuration file.
    if found := re.search(r"(?:Subcommand '\w+'|Group '([\w.]+)') does not accept option '([^']+)'", message):
        key = f"{found[1]}.{found[2]}" if found[1] else found[2]
        if key.split(".")[0] in {"class_path", "init_args"}:
            return (
                "A file that starts with class_path is of one part: it goes with --model or --data, not with --config."
            )
        keys = {option[2:] for option in known} - {"config", "help"}
        groups = {other.split(".")[0] for other in keys}
        if key.split(".")[0] not in groups:  # what is below it says nothing
            key, keys = key.split(".")[0], groups
        return f"There is no {key!r} in a configuration.{_near_option(key, keys)}"
    if found := re.search(r"argument subcommand: invalid choice: '([^']*)' \(choose from (.+)\)", message):
        return str(unknown_name("subcommand", found[1], re.findall(r"[\w-]+", found[2])))
    return None


def _near_option(option: str, known: Iterable[str]) -> str:
    """Name what was meant by an option: one of its own group, if that is known."""
    group = option.rpartition(".")[0]
    same = [other for other in known if group and other.rpartition(".")[0] == group]
    if not same:
        return _did_you_mean(option, known)
    last = [other.rpartition(".")[2] for other in same]
    return _did_you_mean(option.rpartition(".")[2], last, prefix=f"{group}.")


def _command(parser: ArgumentParser) -> str:
    """What is typed for a parser: the command, and the subcommand where it is of one."""
    return parser.prog.replace(" [options]", "")


def _subcommand_parser(message: str, parser: ArgumentParser) -> ArgumentParser:
    """The parser of the subcommand of which a message says that an option of it is missing."""
    named = re.match(r"Option '([\w-]+)\.", message)
    subcommands = parser._subcommands_action
    return parser if named is None or subcommands is None else subcommands.choices.get(named[1], parser)


def _missing(message: str, parser: ArgumentParser) -> str | None:
    found = re.search(r"Option '([\w.-]+)' is required but not provided", message)
    if not found:
        return None
    name = ".".join([*_keys_before(message).split("."), found[1].rpartition(".")[2]]).removeprefix(".")
    positional = any(action.dest == name and not action.option_strings for action in parser._actions)
    return f"{name.upper()} has to be given." if positional else f"--{name} has to be given."


def _unknown_argument(message: str, parser: ArgumentParser) -> str | None:
    del parser
    found = re.search(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    if not found:
        return None
    cls, argument = _imported(found[1]), found[2]
    prefix = _keys_before(message[: found.start()])
    keys = {name for kind in (cls, *subclasses(cls)) for name in arguments_of(kind)} if cls else set()
    if "NestedArg" in message and argument in keys:  # of a class that was not named before it
        return f"--{prefix}.{argument} has to follow --{prefix} CLASS."
    if "NestedArg" in message:
        near = _did_you_mean(argument, keys, prefix=f"--{prefix}.")
        return f"--{prefix}.{argument} is no option of {found[1].rpartition('.')[2]}.{near}"
    first = argument.split(".")[0]
    if first == prefix:
        return f"A file that starts with {prefix} is of several parts: give it with --config, not with --{prefix}."
    if nearest(first, {"class_path", "init_args"}) and cls is not None and cls.__subclasses__():
        return f"There is no {first!r} in {prefix!r}.{_did_you_mean(first, ('class_path', 'init_args'))}"
    return f"{argument!r} in {prefix!r} is no argument of {found[1].rpartition('.')[2]}.{_did_you_mean(argument, keys)}"


def _unknown_class(message: str, parser: ArgumentParser) -> str | None:
    found = re.search(r"Expected a dot import path string: (\S+)", message) or re.search(
        r"module '\S+' has no attribute '(\w+)'", message
    )
    if not found:
        return None
    of_help = re.match(r"--([\w.]+)\.help: ", message)
    key = of_help[1] if of_help else _keys_before(message[: found.start()])
    action = parser._option_string_actions.get(f"--{key}")
    types = " ".join(re.findall(r"Subtypes: (.*)", message)) or str(getattr(action, "_typehint", ""))
    bases = [_imported(path) for path in re.findall(r"[\w.]+\.\w+", types)]
    known = {cls.__name__ for base in bases if base for cls in subclasses(base) if cls.__name__[0] != "_"}
    return str(unknown_name(key, found[1], known, "Name classes of other packages with their module: package.Class."))


def _unknown_key(message: str, parser: ArgumentParser) -> str | None:
    """A misspelt ``class_path``, without which nobody knows whose arguments the other keys are."""
    del parser
    if "Not a valid subclass of" not in message or "'class_path':" in message:
        return None
    near = [key for key in re.findall(r"'(\w+)':", message) if nearest(key, ("class_path",), cutoff=0.65)]
    return f"There is no {near[0]!r} in {_keys_before(message)!r}. Did you mean 'class_path'?" if near else None


def _plain(message: str) -> str:
    """What is left of a message without the account of every type that was tried."""
    path, several = _keys_before(message), "Does not validate" in message
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Problem with given class_path")
    kept = message.partition("Subclass types expect")[0]
    lines = [re.sub(r'Parser key "[^"]+":', "", line).strip().removeprefix("- ") for line in kept.splitlines()]
    lines = [line for line in lines if line and not line.startswith((*noise, "Expected a <class 'NoneType'>"))]
    value = re.search(r"Given value: (.+)", message)
    if lines and value and "NestedArg" not in value[1] and "Got value" not in lines[-1]:
        lines[-1] = f"{lines[-1].rstrip('.')}. Got value: {value[1]}"
    text = (" Or: " if several else " ").join(dict.fromkeys(lines))
    text = re.sub(f"Expected (?:an? )?{_CLASS}", r"Expected: \1", text).replace("Expected: NoneType Or: ", "")
    text = re.sub(r"Expected: (tuple|list|Sequence)\b", r"Expected: \1, written [A,B]", text)
    return f"--{path}: {text}" if path else text


def _keys_before(message: str) -> str:
    """The name of what a message is about: its keys, each nested in the one before."""
    return ".".join(re.findall(r'Parser key "([^"]+)"', message))


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = nearest(name, known, cutoff=0.65)
    return f" Did you mean {alternatives(prefix + other for other in near)}?" if near else ""


def _imported(path: str) -> Any:
    """A class that has been imported, by its path; ``None`` if there is none."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def arguments_of(cls: type) -> list[str]:
    """The arguments that a class is built with, those that it passes on as ``**kwargs``, too."""
    try:
        return ArgumentParser().add_class_arguments(cls, fail_untyped=False)
    except AssertionError:  # jsonargparse cannot describe some generic classes of PyTorch, DataLoader among them
        return []
