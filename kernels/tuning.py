"""The fastest of a few configurations of a kernel, measured once on a device and remembered, in the
process and in a file of the user's cache directory."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import triton

from .. import _env, _store

FILE = "triton.json"

_Config = TypeVar("_Config", bound=tuple)

_chosen: dict[tuple[str, tuple], tuple] = {}


def choose(
    key: tuple, configs: Sequence[_Config], trial: Callable[[_Config], None], device: torch.device
) -> _Config:
    """The fastest of configs for a class of calls; trial(config) runs one of them. The first, where
    nothing can be measured: in the interpreter, and while a graph is captured."""
    if len(configs) == 1 or device.type != "cuda" or _env.flag("TRITON_INTERPRET"):
        return configs[0]
    device_name = _device_name(device)
    found = _chosen.get((device_name, key))
    if found in configs:
        return found
    name = " ".join(map(str, key))
    stored = _store.read(FILE, device_name).get(name)
    found = next((config for config in configs if list(config) == stored), None)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        found = min(configs, key=lambda config: _milliseconds(trial, config))
        _store.add(FILE, device_name, {name: list(found)})
    _chosen[device_name, key] = found
    return found


@functools.cache
def _device_name(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}"


def _milliseconds(trial: Callable[[_Config], None], config: _Config) -> float:
    try:
        return triton.testing.do_bench(lambda: trial(config), warmup=5, rep=20)
    except triton.runtime.errors.OutOfResources:
        return math.inf
