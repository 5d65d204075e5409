"""Attributes of modules that were replaced, so that they can be put back."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class Patch(NamedTuple):
    owner: dict[str, Any] | type
    """A module's globals, or a class."""
    name: str
    original: Any
    new: Any


_ABSENT = object()
_patches: list[Patch] = []


def set_global(owner: dict[str, Any], name: str, new: Any) -> None:
    _patches.append(Patch(owner, name, owner[name], new))
    owner[name] = new


def set_attribute(owner: type, name: str, new: Any) -> None:
    _patches.append(Patch(owner, name, owner.__dict__.get(name, _ABSENT), new))
    setattr(owner, name, new)


def rebind(pairs: Iterable[tuple[Any, Any]]) -> set[str]:
    """For each (original, new), puts the new wherever a module's globals hold the original. Returns
    the names of these modules."""
    news = {id(original): (original, new) for original, new in pairs}
    found = set()
    for held, module, name in list(holders(original for original, _ in news.values())):
        set_global(vars(sys.modules[module]), name, news[id(held)][1])
        found.add(module)
    return found


def holders(values: Iterable[Any]) -> Iterator[tuple[Any, str, str]]:
    """(value, module, name) of every global of a module that is one of these objects."""
    wanted = {id(value): value for value in values}
    for module_name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict):
            for name, held in list(names.items()):
                if id(held) in wanted:
                    yield held, module_name, name


def restore() -> None:
    """Undoes every patch that still stands, the latest first."""
    while _patches:
        owner, name, original, new = _patches.pop()
        if isinstance(owner, dict):
            if owner.get(name) is new:
                owner[name] = original
        elif owner.__dict__.get(name) is new:
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
