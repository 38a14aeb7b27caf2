# SPDX-License-Identifier: Apache-2.0
"""Names: of classes that exist, of what is registered, and one way to say that one is unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

Entry = TypeVar("Entry")
Documented = TypeVar("Documented", bound=type)


def unknown_name(kind: str, name: object, known: Iterable[str], hint: str = "") -> ValueError:
    """Build the error for a name that is not among the known ones.

    Args:
        kind: What is named, as a user would say it (``"mask"``, ``"data set"``).
        name: What the user typed.
        known: The names that would have worked.
        hint: A sentence on what else would have worked.

    Returns:
        An error that offers the nearest names, and all of them where they are few.
    """
    known = sorted(known)
    near = nearest(str(name), known)
    message = f"Unknown {kind} {name!r}."
    if near:
        message += f" Did you mean {alternatives(near)}?"
    if len(known) <= (8 if near else 30):
        message += f" Known: {', '.join(known)}."
    return ValueError(f"{message} {hint}".strip())


def counted(number: int, what: str) -> str:
    """A number and what it counts: ``1 image``, ``2,000 images``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """Find those of known names that one may have meant, whatever their case: the nearest first, three at most."""
    by_small = {other.lower(): other for other in sorted(known)}
    return [by_small[small] for small in get_close_matches(name.lower(), by_small, n=3, cutoff=cutoff)]


def check_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that are not among the known ones, by :func:`unknown_name`."""
    known = set(known)
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)


def alternatives(names: Iterable[str], quote: str = "'") -> str:
    """Offer names as a sentence does: ``'a', 'b' or 'c'``."""
    *others, last = [f"{quote}{name}{quote}" for name in names]
    return f"{', '.join(others)} or {last}" if others else last


def lists_names(**names: Iterable[str]) -> Callable[[Documented], Documented]:
    """Decorate a class: put names, for its help, in the place of the words in braces in its docstring."""

    def fill(cls: Documented) -> Documented:
        for word, known in names.items():
            if cls.__doc__:  # there is none under python -OO
                cls.__doc__ = cls.__doc__.replace(f"{{{word}}}", alternatives(known, "``"))
        return cls

    return fill


def subclasses(base: type) -> Iterator[Any]:
    """Go through all subclasses of a class that have been imported, direct or not."""
    cls: Any
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)


class Registry(dict[str, Entry]):
    """Things of one kind by the names that users type.

    ``registry[name]`` raises the error of :func:`unknown_name` where nothing has the name.

    Args:
        kind: What is named, as a user would say it.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self._modules: dict[str, str] = {}

    def __missing__(self, name: str) -> NoReturn:
        raise unknown_name(self.kind, name, self)

    def add(self, name: str, entry: Entry, made_of: Any) -> None:
        """Register something.

        Args:
            name: The name that users type.
            entry: What it means.
            made_of: The function or class that is registered.

        Raises:
            ValueError: If the name is taken by one of another module; one of the same is being imported again.
        """
        module = made_of.__module__
        if name in self and self._modules.get(name, module) != module:
            msg = f"There is a {self.kind} {name!r} already, of {self._modules[name]}: choose another name."
            raise ValueError(msg)
        self[name] = entry
        self._modules[name] = module
