"""The compiled module `_C`, or why it is missing. Shared by the cpu and cuda backends."""

from __future__ import annotations

import functools
import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

# torch first: `_C` then shares the OpenMP runtime that torch brings.
import torch

from .. import _env
from .geometry import FilteredLrelu, Fir, Geometry, Tail

DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """(`_C`, "") or (None, the reason it cannot be loaded)."""
    try:
        loaded = importlib.import_module("stylegan_fast._C")
    except ImportError as error:
        return None, f"the compiled module is missing ({error}); {build_hint()}"
    level = _env.choice("STYLEGAN_FAST_SIMD", ("baseline", "avx2", "avx512"))
    if level is not None:
        loaded.set_simd_level(level)
    _env.choice("STYLEGAN_FAST_HUGE_PAGES", ("0", "1"))  # read by csrc/cpu/pages.h
    return loaded, ""


def module() -> Any:
    """`_C`, where a backend that needs it has been chosen."""
    return load()[0]


def build_record() -> dict[str, Any]:
    """What setup.py wrote down: compilers, flags, architectures, the last lines of a failure."""
    path = Path(__file__).resolve().parent.parent / "_build.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def build_hint() -> str:
    if build_record():
        return "`python -m stylegan_fast info` shows what the compiler said"
    return "install the package with pip to compile it"


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def epilogue(
    like: torch.Tensor,
    geometry: Geometry,
    act: int = 1,
    alpha: float = 0.0,
    gain: float = 1.0,
    clamp: float = math.inf,
    scale: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
) -> Any:
    return module().Epilogue(
        DTYPE_CODES[like.dtype],
        *geometry,
        act,
        alpha,
        gain,
        clamp,
        address(scale),
        address(noise),
        noise is not None and noise.ndim == 2,
        address(strength),
        address(b),
    )


def tail_epilogue(like: torch.Tensor, geometry: Geometry | None, tail: Tail | None) -> Any:
    if geometry is None or tail is None:
        return None
    return epilogue(like, geometry, *tail[4:], *tail[:4])


def adain(like: torch.Tensor, styles: torch.Tensor, geometry: Geometry, tail: Tail) -> Any:
    """styles, and all operands of the tail, in the accumulation type."""
    per_channel = tail.strength is not None and tail.strength.numel() > 1
    return module().Adain(tail_epilogue(like, geometry, tail), per_channel, address(styles))


def upfirdn2d(x: torch.Tensor, f: torch.Tensor | None, y: torch.Tensor, fir: Fir) -> Any:
    """x: [N, C, H, W] with any strides; f: [fh, fw] or [taps] in the accumulation type, dense; y:
    dense NCHW or NHWC."""
    taps = (1, 1) if f is None else (f.shape[-1], f.shape[0])
    return module().Upfirdn2d(
        DTYPE_CODES[x.dtype],
        (*x.shape, *y.shape[2:]),
        x.stride(),
        not y.is_contiguous(),
        fir[:4],
        fir.x0,
        fir.y0,
        address(f),
        *taps,
        f is not None and f.ndim == 1,
        fir.flip_filter,
        fir.gain,
    )


def conv2d(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, conv: Fir) -> Any:
    """x, y: [N, C, H, W], dense NCHW or NHWC; w: [O, I, kh, kw] with any strides."""
    n, i, height, width = x.shape
    return module().Conv2d(
        DTYPE_CODES[x.dtype],
        (n, i, w.shape[0], height, width, *y.shape[2:]),
        not x.is_contiguous(),
        not y.is_contiguous(),
        conv.up_x,
        conv.down_x,
        conv.x0,
        conv.y0,
        w.shape[3],
        w.shape[2],
        w.stride(),
        conv.flip_filter,
    )


def demodulation(weight: torch.Tensor, styles: torch.Tensor, eps: float) -> Any:
    """weight: [O, I, kh, kw], dense NCHW or NHWC; styles: [N, I], dense."""
    out_channels, in_channels, *kernel_size = weight.shape
    sizes = (styles.shape[0], out_channels, in_channels, math.prod(kernel_size))
    dtype = DTYPE_CODES[weight.dtype]
    return module().Demodulation(dtype, sizes, not weight.is_contiguous(), eps)


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    y: torch.Tensor,
    problem: FilteredLrelu,
    channels_last: bool,
    b: torch.Tensor | None = None,
) -> Any:
    """x, y: dense NCHW or NHWC; fu, fd: [fh, fw] or [taps] in the accumulation type, dense."""
    sizes = [(1, 1) if f is None else (f.shape[-1], f.shape[0]) for f in (fu, fd)]
    return module().FilteredLrelu(
        DTYPE_CODES[x.dtype],
        (*x.shape, *y.shape[2:], problem.sign_height, problem.sign_width),
        (problem.sign_y, problem.sign_x),
        channels_last,
        problem.up,
        problem.down,
        (problem.x0, problem.y0),
        (address(fu), address(fd)),
        *sizes,
        [f is not None and f.ndim == 1 for f in (fu, fd)],
        problem.flip_filter,
        problem.gain,
        problem.slope,
        problem.clamp,
        address(b),
    )
