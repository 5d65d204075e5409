"""The CPU in place of a CUDA device, for scripts that know no other.

Who asks PyTorch for a CUDA device gets the CPU: in arguments by a mode of `__torch_function__`,
which holds in the thread that entered it; in files by PyTorch's registry of where storages lie; and
what scripts use of `torch.cuda` itself is replaced by stand-ins.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode, resolve_name
from torch.serialization import _package_registry, register_package

from . import patching, state

_STAY = (torch.Tensor.cuda, torch.Tensor.pin_memory)
_DEVICE_COMES = {torch.device: 0, torch._C._nn._parse_to: 0, torch.Tensor.to: 1}
"""Position of a device that may be no more than its number."""


def _is_cuda(value: object) -> bool:
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"


def _note(name: str) -> None:
    state.report.routed.setdefault(name, "the CPU in place of a CUDA device")


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self is not _mode:
            return func(*args, **kwargs)
        if func in _STAY:
            _note(resolve_name(func))
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        number = _DEVICE_COMES.get(func)
        places = {
            place
            for place, value in (*enumerate(args), *kwargs.items())
            if _is_cuda(value) or (place in (number, "device") and type(value) is int)
        }
        if not places:
            return func(*args, **kwargs)
        _note(resolve_name(func) or func.__name__)
        if func is torch.device:
            return torch.device("cpu")
        args = ["cpu" if place in places else value for place, value in enumerate(args)]
        kwargs = {name: "cpu" if name in places else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


class Event:
    """Of `torch.cuda`, by the processor's clock."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        _note("torch.cuda.Event")
        self._seconds: float | None = None

    def record(self, stream=None):
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event):
        """In milliseconds."""
        if self._seconds is None or end_event._seconds is None:
            raise RuntimeError("both events must be recorded before elapsed_time")
        return (end_event._seconds - self._seconds) * 1000

    def query(self):
        return True

    def synchronize(self):
        pass

    def wait(self, stream=None):
        pass


class Stream:
    """Of `torch.cuda`: what is started is done."""

    def __init__(self, device=None, priority=0):
        _note("torch.cuda.Stream")

    def record_event(self, event=None):
        event = Event() if event is None else event
        event.record()
        return event

    def query(self):
        return True

    def synchronize(self):
        pass

    def wait_event(self, event):
        pass

    def wait_stream(self, stream):
        pass


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        if _is_cuda(device):
            _note("torch.Generator")
            device = "cpu"
        return super().__new__(cls, device)  # type: ignore[call-arg]


_fork_rng_of = torch.random.fork_rng


def _fork_rng(devices=None, enabled=True, *args, **kwargs):
    return _fork_rng_of(devices=[], enabled=enabled)


def _answer(name: str, value: Any) -> Callable:
    @wraps(getattr(torch.cuda, name))
    def function(*args, **kwargs):
        _note(f"torch.cuda.{name}")
        return value

    return function


_ANSWERS = {
    "current_device": 0,
    "device_count": 1,
    "empty_cache": None,
    "get_device_name": "CPU",
    "get_rng_state": torch.empty(0, dtype=torch.uint8),
    "is_available": True,
    "max_memory_allocated": 0,
    "max_memory_reserved": 0,
    "memory_allocated": 0,
    "memory_reserved": 0,
    "reset_peak_memory_stats": None,
    "set_device": None,
    "set_rng_state": None,
    "synchronize": None,
}
"""Of functions of `torch.cuda`."""


def _of_no_device(storage) -> None:
    return None


def _from_cuda(storage, location: str):
    if not location.startswith("cuda"):
        return None
    _note("torch.load")
    return storage


_REGISTERED = (5, _of_no_device, _from_cuda)
_mode: _OnCpu | None = None


def enter() -> None:
    """Answer requests for CUDA by the CPU, in this thread."""
    global _mode
    if _mode is not None:
        return
    names = vars(torch.cuda)
    for name, value in _ANSWERS.items():
        patching.set_global(names, name, _answer(name, value))
    for name, new in {
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "default_stream": Stream,
        "stream": contextlib.nullcontext,
    }.items():
        patching.set_global(names, name, new)
    patching.set_global(vars(torch), "Generator", _Generator)
    patching.set_global(vars(torch.random), "fork_rng", _fork_rng)
    register_package(*_REGISTERED)
    _mode = _OnCpu()
    _mode.__enter__()


def leave() -> None:
    """Undo what `enter` did and `patching.restore` does not."""
    global _mode
    if _mode is None:
        return
    _package_registry.remove(_REGISTERED)
    mode, _mode = _mode, None  # below another mode it stays, and does nothing
    if _get_current_function_mode() is mode:
        mode.__exit__(None, None, None)
