"""The network pickles of the originals' PyTorch releases, built from `models.stylegan2`.

A file is a dictionary of networks. Each carries its own source code, which is left alone, the
arguments of its constructor and its modules' state. The earlier release (stylegan2-ada-pytorch) has
the synthesis network's arguments in a dictionary of their own, the later one (stylegan3's copy of
StyleGAN2) among the others, with other defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models import stylegan2
from .contents import CheckpointError, Contents, Stored
from .pickles import Record, StoredTensor

LAYOUT = "network pickle of the originals"

_CLASSES = {"Generator": stylegan2.Generator, "Discriminator": stylegan2.Discriminator}
_MOST_MODULES = 20_000
_DEEPEST = 32


def contents(value: Any) -> Contents | None:
    """The networks of a file, or None if it holds no modules."""
    if isinstance(value, Record):
        value = {"D" if value.name == "Discriminator" else "G": value}
    if not isinstance(value, dict):
        return None
    modules = {name: value[name] for name in ("G", "D", "G_ema") if _is_module(value.get(name))}
    if not modules:
        return None
    earlier = any(_is_of_earlier_release(module) for module in modules.values())
    return Contents(LAYOUT, {name: _stored(name, m, earlier) for name, m in modules.items()})


def _is_module(value: Any) -> bool:
    return isinstance(value, Record) and isinstance(value.state, dict) and "_modules" in value.state


def _stored(name: str, module: Record, earlier: bool) -> Stored:
    state = _tensors(module)
    if any(key.startswith("synthesis.input.") for key in state):
        raise CheckpointError(f"{name} is a StyleGAN3 generator, which this library does not have")
    if module.name not in _CLASSES:
        raise CheckpointError(f"{name} is a {module.name}, which this library does not have")
    arguments = _arguments(module)
    arguments.update(arguments.pop("synthesis_kwargs", {}))
    if earlier and module.name == "Generator":
        mapping_kwargs = arguments.get("mapping_kwargs", {})
        arguments["mapping_kwargs"] = {"w_avg_beta": 0.995, **mapping_kwargs}
    elif not earlier:
        arguments = {"conv_clamp": 256, "num_fp16_res": 4, **arguments}
        if module.name == "Generator":
            arguments = {"fused_modconv_default": True, **arguments}
    release = "earlier" if earlier else "later"
    notes = [f"constructor of the {release} release"]
    return Stored(f"stylegan2.{module.name}", arguments, state, notes)


def _is_of_earlier_release(module: Record) -> bool:
    """Told by a generator: its arguments are nested, or its average moves at the earlier rate."""
    mapping = module.state["_modules"].get("mapping")
    beta = mapping.state.get("w_avg_beta") if _is_module(mapping) else None
    return "synthesis_kwargs" in _arguments(module) or beta == 0.995


def _arguments(module: Record) -> dict[str, Any]:
    """The constructor's arguments by name."""
    given, named = module.state.get("_init_args", ()), module.state.get("_init_kwargs", {})
    if not isinstance(given, (tuple, list)) or not isinstance(named, dict):
        raise CheckpointError(f"a {module.name} comes with malformed constructor arguments")
    network = _CLASSES.get(module.name)
    names = [] if network is None else list(inspect.signature(network).parameters)
    return {**_plain(dict(zip(names, given))), **_plain(named)}


def _plain(value: Any, depth: int = 0) -> Any:
    """The value as JSON can hold it."""
    if depth > _DEEPEST:
        raise CheckpointError("a network's constructor arguments are nested too deeply")
    if isinstance(value, dict):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
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
        seen += 1
        if seen > _MOST_MODULES or prefix.count(".") > _DEEPEST:
            raise CheckpointError("a network has too many modules in modules")
        state = inner.state
        own: Mapping[str, Any] = {**state.get("_parameters", {}), **state.get("_buffers", {})}
        transient = state.get("_non_persistent_buffers_set", ())
        for name, value in own.items():
            if isinstance(value, StoredTensor) and name not in transient:
                tensors[f"{prefix}{name}"] = value.load()
        for name, child in state.get("_modules", {}).items():
            if _is_module(child):
                waiting.append((f"{prefix}{name}.", child))
    return tensors
