"""Triton kernels (kernels/): CUDA and ROCm, no compiler needed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from .. import _env
from .geometry import Fir

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


def _device(x: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device; a CPU tensor (interpreter) changes nothing."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def upfirdn2d_forward(x: torch.Tensor, *arguments: object, **options: object) -> None:
    with _device(x):
        kernels("upfirdn2d").upfirdn2d_forward(x, *arguments, **options)


def upfirdn2d_masked(dy: torch.Tensor, *arguments: object) -> None:
    with _device(dy):
        kernels("upfirdn2d").upfirdn2d_masked(dy, *arguments)


def conv2d_forward(x: torch.Tensor, *arguments: object, **options: object) -> None:
    with _device(x):
        kernels("conv2d").conv2d_forward(x, *arguments, **options)


def conv2d_weight_gradient(x: torch.Tensor, *arguments: object, **options: object) -> None:
    with _device(x):
        kernels("conv2d").conv2d_weight_gradient(x, *arguments, **options)


def conv2d_refusal(
    x: torch.Tensor,
    w: torch.Tensor,
    conv: Fir,
    y: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    asked: bool = False,
) -> str | None:
    """None, or why this call is PyTorch's convolution and the epilogue after it; `asked` is a
    choice of this backend by name, where only that counts which the kernels cannot do."""
    samples, out_channels, height, width = y.shape
    nhwc = not y.is_contiguous() or height == width == 1
    if x.dtype not in dtypes():
        return f"its convolutions have no kernel for {x.dtype}"
    up, down = {conv.up_x, conv.up_y}, {conv.down_x, conv.down_y}
    if not (len(up) == len(down) == 1 and up | down <= {1, 2}):
        return "its convolutions have up and down of 1 or 2"
    if mask is not None:
        row = out_channels if nhwc else height * width
        if row % 8 or (up == {2} and not nhwc):
            return "its masks need 8 channels of a pixel of NHWC, or pixels of a plane of NCHW"
    if asked:
        return None

    channels = (x.shape[1], out_channels)
    if x.dtype in (torch.float32, torch.float64):
        return "PyTorch's float32 convolution is faster, for tensor cores take 16 bits"
    if not nhwc or x.stride(1) != 1:
        return "its loads are of channels, and x or y is not channels_last"
    if any(size % 8 and size > 4 for size in channels):
        return f"its loads are of 8 channels, and w is of {channels[1]} x {channels[0]}"
    if w.ndim == 5 and height * width < 64 * max(up) ** 2:
        return "a tile of one sample, for its own weights, would be larger than the image"
    # Few launches, few bytes and no zeros multiplied are what these kernels have over a library;
    # where arithmetic is all, a library comes closer to the peak.
    large = samples * height * width >= 2**14
    if w.shape[-1] > 1 and up == {1} and min(channels) >= 256 and large:
        return "at 256 channels and more of large images libraries multiply faster"
    return None
