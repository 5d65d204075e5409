"""Who runs a convolution of a kernel backend: its own kernel, or PyTorch's convolution.

A backend says what its kernel cannot do (`conv2d_refusal`) and, by a cost model, where it is faster
(`conv2d_preferred`). A table measured on this machine, written by `python -m stylegan_fast bench
--tune`, overrides the model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from .. import _store
from .geometry import Fir

FILE = "convolutions.json"
KERNEL, PYTORCH = "kernel", "pytorch"
FORWARD, WEIGHT_GRADIENT = "forward", "weight gradient"

_forced: dict[str | None, str] = {}
_asked: dict[str, ConvClass] | None = None


class ConvClass(NamedTuple):
    """What the time of a convolution depends on."""

    direction: str
    dtype: torch.dtype
    channels_last: bool
    samples: int
    in_channels: int
    out_channels: int
    height: int  # of the input
    width: int
    kernel_x: int
    kernel_y: int
    up: int
    down: int
    pad_x: int  # the time does not depend on it, but what a kernel can do
    pad_y: int

    @classmethod
    def of(
        cls,
        direction: str,
        x: torch.Tensor,  # dense
        out_channels: int,
        kernel_size: tuple[int, int],
        conv: Fir,
    ) -> ConvClass:
        n, channels, height, width = x.shape
        nhwc = not x.is_contiguous()
        image = (n, channels, out_channels, height, width)
        factors = (conv.up_x, conv.down_x)
        return cls(direction, x.dtype, nhwc, *image, *kernel_size, *factors, conv.x0, conv.y0)

    def key(self, backend: str) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        layout = "nhwc" if self.channels_last else "nchw"
        image = f"{self.samples}x{self.in_channels}x{self.height}x{self.width}"
        kernel = f"{self.out_channels}x{self.kernel_y}x{self.kernel_x}"
        factors = f"up {self.up} down {self.down}"
        return f"{backend} {self.direction} {dtype} {layout} {image} {kernel} {factors}"


def own_kernel(name: str, backend: ModuleType, call: ConvClass, device: torch.device) -> bool:
    """Whether the backend's own kernel runs the call."""
    if backend.conv2d_refusal(call) is not None:
        return False
    if _forced or _asked is not None:
        key = call.key(name)
        if _asked is not None:
            _asked[key] = call
        forced = _forced.get(key) or _forced.get(None)
        if forced is not None:
            return forced == KERNEL
    known = table(device)
    measured = known.get(call.key(name)) if known else None
    return backend.conv2d_preferred(call) if measured is None else measured == KERNEL


@contextmanager
def forced(runner: str, key: str | None = None) -> Iterator[None]:
    """Inside, every convolution that a kernel does not refuse, or those of this key, run on it
    (KERNEL) or on PyTorch's (PYTORCH)."""
    global _forced
    previous, _forced = _forced, {**_forced, key: runner}
    try:
        yield
    finally:
        _forced = previous


@contextmanager
def asked() -> Iterator[dict[str, ConvClass]]:
    """The choices that are made inside, by their keys."""
    global _asked
    previous, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = previous


@functools.cache
def table(device: torch.device) -> dict[str, str]:
    """The measured choices for this device."""
    return _store.read(FILE, machine(device))


def path() -> Path | None:
    """The file of the table; None where none is kept."""
    return _store.path(FILE)


def remember(device: torch.device, measured: dict[str, str]) -> bool:
    """Adds measured choices, also for later processes; False where they cannot be written."""
    table(device).update(measured)
    return _store.add(FILE, machine(device), measured)


@functools.cache
def machine(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_store.processor()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"
