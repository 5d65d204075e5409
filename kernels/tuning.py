"""The fastest of a few configurations of a kernel, measured once on a device and remembered, in the
process and in a file of the user's cache directory."""

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton

from .. import _env

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
    stored = _read().get(device_name, {}).get(name)
    found = next((config for config in configs if list(config) == stored), None)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        found = min(configs, key=lambda config: _milliseconds(trial, config))
        _write(device_name, name, found)
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


def _path() -> Path | None:
    folder = _env.cache_folder()
    return None if folder is None else folder / "triton.json"


def _read() -> dict[str, dict[str, list]]:
    """What is stored; nothing where the file is missing, unreadable or not of this form."""
    path = _path()
    try:
        stored = {} if path is None else json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {name: choices for name, choices in stored.items() if isinstance(choices, dict)}


def _write(device_name: str, name: str, config: tuple) -> None:
    """Adds a choice to those stored; a folder that cannot be written costs only the memory."""
    path = _path()
    if path is None:
        return
    stored = _read()
    stored.setdefault(device_name, {})[name] = list(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder, path.name)
            written.write_text(json.dumps(stored, indent=1, sort_keys=True))
            os.replace(written, path)
    except OSError:
        pass
