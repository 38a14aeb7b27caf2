# SPDX-License-Identifier: Apache-2.0
"""Configuration files: read, or refused with their name before a parser sees them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_MOST_VALUES = 100_000
"""With all aliases written out; the largest configuration in ``configs/`` has fewer than a hundred."""
_DEEPEST = 100
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_FILES = {"-c", "--config", "--data", "--model", "--trainer"}
"""Options whose value may be such a file."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_configuration(path: str | Path) -> Any:
    """Read a file of YAML or JSON.

    Raises:
        OSError: If it cannot be read.
        ValueError: As for :func:`check_configuration`.
    """
    text = check_configuration(path)
    try:
        return yaml.load(text, Loader=_LOADER)  # noqa: S506  # a safe one
    except yaml.YAMLError as error:
        raise _broken(path, error) from error


def check_configuration(path: str | Path) -> str:
    """Refuse a file that no configuration is, without building what it describes.

    A few lines of YAML, in which each value repeats the one before ten times, describe more values than there is
    memory for. So they are counted, and nothing is built that is too large.

    Returns:
        Its text.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not in UTF-8, not valid YAML, nested too deeply, repeats itself within itself, or has more
            values than anybody means.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = _MARKS.get(content[:2])
        what = f"is in {found}" if found else f"is not in UTF-8 (byte {error.start} is 0x{content[error.start]:02x})"
        msg = f"{path} {what}. Save it as UTF-8."
        raise ValueError(msg) from error
    try:
        problem = _excess(text)
    except yaml.YAMLError as error:
        raise _broken(path, error) from error
    if problem:
        msg = f"{path} {problem}, which no configuration needs."
        raise ValueError(msg)
    return text


def check_arguments(arguments: list[str]) -> None:
    """Check the configuration files that a command line names, ``--config``'s and others (``--data data.yaml``).

    Raises:
        OSError: If one is not there, or cannot be read.
        ValueError: As for :func:`check_configuration`; or if ``--config`` names a file that says otherwise than an
            option before it, which would be lost.
    """
    before: dict[str, str] = {}
    for option, value in _options(arguments):
        there = Path(value).is_file()
        if option in {"-c", "--config"} and there:
            _check_order(before, value)
            continue
        if value.lower().endswith((".yaml", ".yml")):
            if there:
                check_configuration(value)
            elif option in _FILES and not Path(value).exists():
                msg = (
                    f"There is no configuration file {value} (looked for it from {Path.cwd()}). `flowood configs "
                    "./configs` writes those that come with this package, to begin with."
                )
                raise FileNotFoundError(msg)
        if option.startswith("--"):
            before[option[2:]] = value


def _options(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Each argument that may be an option's value, with the option before it, whatever that is."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, given, value = argument.partition("=") if argument.startswith("--") else (before, "=", argument)
        if given:
            yield option, value


def _check_order(before: dict[str, str], path: str) -> None:
    """Refuse options that a configuration file behind them would set otherwise."""
    config = read_configuration(path)
    for name, given in before.items() if isinstance(config, dict) else ():
        found, of_class = _setting(config, name.split("."))
        if found is None or _same(given, found, of_class):
            continue
        msg = (
            f"--{name} {given} stands before --config {path}, where {name} is {found}, and what comes later counts: "
            f"put --{name} behind --config, or leave it out."
        )
        raise ValueError(msg)


def _setting(config: Any, keys: list[str]) -> tuple[Any, bool]:
    """What a configuration says of an option, ``None`` if nothing; and whether that is the name of a class."""
    for key in keys:
        inner = config.get("init_args") if isinstance(config, dict) else None
        config = next((part[key] for part in (config, inner) if isinstance(part, dict) and key in part), None)
    return (config["class_path"], True) if isinstance(config, dict) and "class_path" in config else (config, False)


def _same(given: str, found: Any, of_class: bool) -> bool:
    """Whether a value as it is typed is one of a configuration, of a class with its module or without."""
    if of_class:
        return str(found).rpartition(".")[2] == given.rpartition(".")[2]
    try:
        read = yaml.load(given, Loader=_LOADER)  # noqa: S506  # a safe one
        return found in (given, read) or float(given) == float(found)  # 1e-3, which is a text in YAML
    except (yaml.YAMLError, TypeError, ValueError):
        return found == given


def _excess(text: str) -> str:
    """Count values and depth from what a parser meets; nothing is kept but the sizes of what has a name."""
    known: dict[str | None, int] = {}
    opened: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=_LOADER):
        at = f"(line {event.start_mark.line + 1})" if event.start_mark else ""
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            known[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            known[event.anchor] = 1
            total += 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in known:
                return f"repeats *{event.anchor} before its end {at}"
            total += known[event.anchor]
        if len(opened) > _DEEPEST:
            return f"is nested more than {_DEEPEST} times {at}"
        if total > _MOST_VALUES:
            return f"has more than {_MOST_VALUES:,} values, aliases written out {at}"
    return ""


def _broken(path: str | Path, error: yaml.YAMLError) -> ValueError:
    said = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
    return ValueError(f"{path} is not valid YAML: {said}")
