"""Triton kernels (kernels/): CUDA and ROCm, no compiler needed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from .. import _env
from .choice import FORWARD, ConvClass

OLDEST_TRITON = (3, 2)


@functools.cache
def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it comes with PyTorch's GPU wheels)"
    if not _env.flag("TRITON_INTERPRET") and not torch.cuda.is_available():
        return "PyTorch finds no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {version} is older than {oldest}, the first that runs the kernels correctly"
    return None


def device_types() -> tuple[str, ...]:
    return ("cuda", "cpu") if _env.flag("TRITON_INTERPRET") else ("cuda",)


GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The interpreter takes float64, and truncates bfloat16 where a GPU rounds it.
INTERPRETER_DTYPES = (torch.float64, torch.float32, torch.float16)


def dtypes() -> tuple[torch.dtype, ...]:
    return INTERPRETER_DTYPES if _env.flag("TRITON_INTERPRET") else GPU_DTYPES


@functools.cache
def kernels(name: str = "epilogue") -> ModuleType:
    return importlib.import_module(f"stylegan_fast.kernels.{name}")


def epilogue_forward(x: torch.Tensor, *arguments: object) -> None:
    with _device(x):
        kernels().epilogue_forward(x, *arguments)


def epilogue_masked(dy: torch.Tensor, *arguments: object) -> None:
    with _device(dy):
        kernels().epilogue_masked(dy, *arguments)


def epilogue_curved(order: int, x: torch.Tensor, *arguments: object) -> None:
    with _device(x):
        kernels().epilogue_curved(order, x, *arguments)


def epilogue_backward(dy: torch.Tensor, *arguments: object) -> None:
    with _device(dy):
        kernels().epilogue_backward(dy, *arguments)


def _device(x: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device; a CPU tensor (interpreter) changes nothing."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def upfirdn2d_forward(x: torch.Tensor, *arguments: object, **options: object) -> None:
    with _device(x):
        kernels("upfirdn2d").upfirdn2d_forward(x, *arguments, **options)


def upfirdn2d_masked(dy: torch.Tensor, *arguments: object) -> None:
    with _device(dy):
        kernels("upfirdn2d").upfirdn2d_masked(dy, *arguments)


def adain_forward(x: torch.Tensor, *arguments: object) -> None:
    with _device(x):
        kernels("adain").adain_forward(x, *arguments)


def adain_backward(dy: torch.Tensor, *arguments: object) -> None:
    with _device(dy):
        kernels("adain").adain_backward(dy, *arguments)


def demodulation(weight: torch.Tensor, *arguments: object) -> None:
    with _device(weight):
        kernels("demodulation").demodulation(weight, *arguments)


def conv2d_forward(x: torch.Tensor, *arguments: object, **options: object) -> None:
    with _device(x):
        kernels("conv2d").conv2d_forward(x, *arguments, **options)


def conv2d_weight_gradient(x: torch.Tensor, *arguments: object, **options: object) -> None:
    with _device(x):
        kernels("conv2d").conv2d_weight_gradient(x, *arguments, **options)


def conv2d_refusal(call: ConvClass) -> str | None:
    """None, or why the implicit-GEMM kernels cannot run such a call."""
    if call.dtype not in dtypes():
        return f"its convolutions have no kernel for {call.dtype}"
    if max(call.up, call.down) > 2:
        return "its convolutions have up and down of 1 or 2"
    if call.direction == FORWARD and call.up == 2 and not call.channels_last:
        return "its upsampling convolutions are for channels_last"
    return None


def conv2d_preferred(call: ConvClass) -> bool:
    """By reasoning, not by measurement: no GPU has judged it yet. Tensor cores take 16 bits, loads
    are of 8 channels; few launches, few bytes and no zeros multiplied are what the kernels have
    over a library, which comes closer to the peak where arithmetic is all."""
    channels = (call.in_channels, call.out_channels)
    if call.dtype not in (torch.float16, torch.bfloat16) or not call.channels_last:
        return False
    if any(size % 8 and size > 4 for size in channels):
        return False
    if call.up == 2 and max(call.kernel_x, call.kernel_y) > 4:
        return call.out_channels <= 32  # with the filter in it, 4 times the multiplications
    large = call.samples * call.height * call.width >= 2**14
    wide = min(channels) >= 256 and max(call.kernel_x, call.kernel_y) > 1
    return not (large and wide and call.up == 1)


def filtered_lrelu_forward(x: torch.Tensor, *arguments: object) -> None:
    with _device(x):
        kernels("filtered_lrelu").filtered_lrelu_forward(x, *arguments)


def filtered_lrelu_masked(dy: torch.Tensor, *arguments: object) -> None:
    with _device(dy):
        kernels("filtered_lrelu").filtered_lrelu_masked(dy, *arguments)


def filtered_lrelu_refusal(
    dtype: torch.dtype, fu: torch.Tensor | None, fd: torch.Tensor | None, up: int, down: int
) -> str | None:
    """None, or why no kernel takes these filters; their parts run then."""
    if (fu is not None and fu.ndim == 2) or (fd is not None and fd.ndim == 2):
        return "its kernel takes separable filters"
    taps_up = 0 if fu is None else _constant(fu.shape[0])
    taps_down = 0 if fd is None else _constant(fd.shape[0])
    return _filtered_lrelu_refusal(dtype, taps_up, taps_down, _constant(up), _constant(down))


def _filtered_lrelu_refusal(
    dtype: torch.dtype, taps_up: int, taps_down: int, up: int, down: int
) -> str | None:
    return kernels("filtered_lrelu").refusal(dtype, (taps_up, taps_down), up, down)


_filtered_lrelu_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _constant(number: int, most: int = 64) -> int:
    """The number, or most if it is larger: torch.compile, which may know it by a symbol only, then
    knows its value."""
    for value in range(most):
        if number == value:
            return value
    return most
