"""Networks that remember how they were made, so that a file can make them again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)

NETWORKS: dict[str, type[nn.Module]] = {}
"""Every recorded class by its path below this package, such as "stylegan2.Generator"."""


def recorded(network: type[Network]) -> type[Network]:
    """Class decorator: instances get `init_kwargs`, every argument of their constructor by name,
    as JSON can hold it, so that type(net)(**net.init_kwargs) is built like net.

    An instance of a subclass gets none, unless the subclass is recorded too.
    """
    init = network.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recording_init(self: Network, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self) is network:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            self.init_kwargs = _by_name(bound)  # type: ignore[assignment]

    network.__init__ = recording_init  # type: ignore[assignment,method-assign]
    NETWORKS[class_path(network)] = network
    return network


def class_path(network: type[nn.Module]) -> str:
    """The path of a class below this package; elsewhere with the whole name of its module."""
    return f"{network.__module__.removeprefix(__package__ + '.')}.{network.__qualname__}"


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:  # without self
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update({key: _plain(key, argument) for key, argument in value.items()})
        else:
            named[name] = _plain(name, value)
    return named


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "tolist"):  # tensors, NumPy's arrays and scalars
        return value.tolist()
    raise TypeError(f"{name} cannot be recorded: {type(value).__name__} has no form in JSON")
