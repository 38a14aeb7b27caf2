# SPDX-License-Identifier: Apache-2.0
"""Configuration files: read, or refused with their name before a parser sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_MOST_VALUES = 100_000
"""With all aliases written out; the largest configuration in ``configs/`` has fewer than a hundred."""
_DEEPEST = 100
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
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
        OSError: If one cannot be read.
        ValueError: As for :func:`check_configuration`.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, given, value = argument.partition("=") if argument.startswith("--") else (before, "=", argument)
        named = option in {"-c", "--config"} or value.lower().endswith((".yaml", ".yml"))
        if given and named and Path(value).is_file():
            check_configuration(value)


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
