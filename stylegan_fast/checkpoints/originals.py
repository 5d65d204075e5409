"""The network pickles of the originals' PyTorch releases, built from `models.stylegan2` and
`models.stylegan3`.

A file is a dictionary of networks. Each carries its own source code, which is left alone, the
arguments of its constructor and its modules' state. Of StyleGAN2, the earlier release
(stylegan2-ada-pytorch) has the synthesis network's arguments in a dictionary of their own, the
later one (stylegan3's copy) among the others, with other defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..models import stylegan2, stylegan3
from ..models._recorded import class_path
from .contents import CheckpointError, Contents, Stored
from .pickles import Record, StoredTensor

LAYOUT = "network pickle of the originals"

_CLASSES = {"Generator": stylegan2.Generator, "Discriminator": stylegan2.Discriminator}
_PARTS = ("_parameters", "_buffers", "_modules")
_MOST_ARGUMENTS = 256
_MOST_NAMES = 20_000
"""Of modules and tensors in a network; the same ones may be in many modules."""
_LONGEST_NAME = 512


def contents(value: Any) -> Contents | None:
    """The networks of a file, or None if it holds no modules."""
    if isinstance(value, Record):
        value = {"D" if value.name == "Discriminator" else "G": value}
    if not isinstance(value, dict):
        return None
    modules = {name: value[name] for name in ("G", "D", "G_ema") if is_module(value.get(name))}
    classes = {name: _class(name, module) for name, module in modules.items()}
    earlier = stylegan3.Generator not in classes.values() and any(
        _is_of_earlier_release(module) for module in modules.values()
    )
    networks = {name: _stored(module, classes[name], earlier) for name, module in modules.items()}
    return Contents(LAYOUT, networks) if networks else None


def is_module(value: Any) -> bool:
    """Whether this is an object with the state of a torch.nn.Module."""
    state = value.state if isinstance(value, Record) else None
    return isinstance(state, dict) and all(isinstance(state.get(part), dict) for part in _PARTS)


def _class(name: str, module: Record) -> type[nn.Module]:
    synthesis = module.state["_modules"].get("synthesis")
    has_input = is_module(synthesis) and "input" in synthesis.state["_modules"]
    if module.name == "Generator" and has_input:
        return stylegan3.Generator
    if module.name not in _CLASSES:
        raise CheckpointError(f"{name} is a {module.name}, which this library does not have")
    return _CLASSES[module.name]


def _is_of_earlier_release(module: Record) -> bool:
    """Told by a generator: its arguments are nested, or its average moves at the earlier rate."""
    mapping = module.state["_modules"].get("mapping")
    beta = mapping.state.get("w_avg_beta") if is_module(mapping) else None
    return beta == 0.995 or "synthesis_kwargs" in _arguments(module)


def _stored(module: Record, network: type[nn.Module], earlier: bool) -> Stored:
    arguments = _arguments(module)
    if network is stylegan3.Generator:
        return Stored(class_path(network), arguments, _tensors(module))
    arguments.update(arguments.pop("synthesis_kwargs", {}))
    if not earlier:
        arguments = {"conv_clamp": 256, "num_fp16_res": 4, **arguments}
    if network is stylegan2.Generator and earlier:
        arguments["mapping_kwargs"] = {"w_avg_beta": 0.995, **arguments.get("mapping_kwargs", {})}
    elif network is stylegan2.Generator:
        arguments = {"fused_modconv_default": True, **arguments}
    notes = [f"constructor of the {'earlier' if earlier else 'later'} release"]
    return Stored(class_path(network), arguments, _tensors(module), notes)


def _arguments(module: Record) -> dict[str, Any]:
    """The constructor's arguments by name. (The name of the seventh of the earlier release's
    generator is that of our further keyword arguments; that of StyleGAN3 has the same six.)"""
    given, named = module.state.get("_init_args"), module.state.get("_init_kwargs")
    if not isinstance(given, (tuple, list)) or not isinstance(named, dict):
        raise CheckpointError(f"a {module.name} comes without its constructor's arguments")
    names = inspect.signature(_CLASSES[module.name]).parameters
    arguments = _plain(dict(zip(names, given)) | named, iter(range(_MOST_ARGUMENTS)))
    for name in ("mapping_kwargs", "synthesis_kwargs"):
        if not isinstance(arguments.get(name, {}), dict):
            raise CheckpointError(f"a {module.name} has {name} that are no dictionary")
    return arguments


def _plain(value: Any, places: Iterator[int]) -> Any:
    """The value as JSON can hold it, where each value in it takes one of the places."""
    if next(places, None) is None:
        raise CheckpointError("a network's constructor was given too many values")
    if isinstance(value, dict):
        return {str(key): _plain(item, places) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, places) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = value.name if isinstance(value, Record) else type(value).__name__
    raise CheckpointError(f"a network's constructor was given a {kind}")


def _tensors(module: Record) -> dict[str, Tensor]:
    """The state_dict of a module."""
    tensors: dict[str, Tensor] = {}
    waiting, seen = [("", module)], 0
    while waiting:
        prefix, inner = waiting.pop()
        parameters, buffers, modules = (inner.state[part] for part in _PARTS)
        seen += 1 + len(parameters) + len(buffers) + len(modules)
        if seen > _MOST_NAMES:
            raise CheckpointError("a network has too many modules in modules")
        transient = inner.state.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set) else set()
        for name, value in (parameters | buffers).items():
            if isinstance(value, StoredTensor) and name not in transient:
                tensors[_joined(prefix, name)] = value.load()
        for name, child in modules.items():
            if is_module(child):
                waiting.append((f"{_joined(prefix, name)}.", child))
    return tensors


def _joined(prefix: str, name: Any) -> str:
    joined = f"{prefix}{name}"
    if len(joined) > _LONGEST_NAME:
        raise CheckpointError("a network has too many modules in modules, or too long names")
    return joined
