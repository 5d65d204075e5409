"""Attributes of modules that were replaced, so that they can be put back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple


class Patch(NamedTuple):
    owner: dict[str, Any] | type
    """A module's globals, or a class."""
    name: str
    original: Any
    new: Any


_patches: list[Patch] = []


def set_global(owner: dict[str, Any], name: str, new: Any) -> None:
    _patches.append(Patch(owner, name, owner[name], new))
    owner[name] = new


def set_attribute(owner: type, name: str, new: Any) -> None:
    _patches.append(Patch(owner, name, owner.__dict__[name], new))
    setattr(owner, name, new)


def rebind(original: Any, new: Any) -> list[str]:
    """Puts `new` wherever a module's globals hold `original`, and returns these modules' names."""
    found = []
    for module, name in list(holders(original)):
        set_global(vars(sys.modules[module]), name, new)
        found.append(module)
    return found


def holders(value: Any) -> Iterator[tuple[str, str]]:
    """(module, name) of every global that is this object."""
    for module_name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict):
            for name, held in list(names.items()):
                if held is value:
                    yield module_name, name


def restore() -> None:
    """Undoes every patch that still stands, the latest first."""
    while _patches:
        owner, name, original, new = _patches.pop()
        if isinstance(owner, dict):
            if owner.get(name) is new:
                owner[name] = original
        elif owner.__dict__.get(name) is new:
            setattr(owner, name, original)
