"""C++ kernels with SIMD and threads (csrc/cpu)."""

from __future__ import annotations

import torch

from . import native
from .geometry import Fir, Geometry, Tail
from .native import address, epilogue, tail_epilogue, upfirdn2d


def unavailable() -> str | None:
    module, reason = native.load()
    return None if module is not None else reason


def device_types() -> tuple[str, ...]:
    return ("cpu",)


def dtypes() -> tuple[torch.dtype, ...]:
    return tuple(native.DTYPE_CODES)


def epilogue_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor | None,
    geometry: Geometry,
    tail: Tail,
) -> None:
    problem = tail_epilogue(x, geometry, tail)
    native.module().cpu_epilogue_forward(
        problem, x.data_ptr(), y.data_ptr(), address(mask), torch.get_num_threads()
    )


def epilogue_masked(
    dy: torch.Tensor,
    mask: torch.Tensor | None,
    dx: torch.Tensor,
    total: torch.Tensor | None,
    scale: torch.Tensor | None,
    geometry: Geometry,
    negative_slope: float,
    gain: float,
) -> None:
    problem = epilogue(dy, geometry, gain=gain, scale=scale)
    native.module().cpu_epilogue_masked(
        problem,
        negative_slope,
        dy.data_ptr(),
        address(mask),
        dx.data_ptr(),
        address(total),
        torch.get_num_threads(),
    )


def epilogue_curved(
    order: int,
    x: torch.Tensor,
    dy: torch.Tensor,
    h: torch.Tensor | None,
    dx: torch.Tensor,
    total: torch.Tensor | None,
    geometry: Geometry,
    tail: Tail,
) -> None:
    problem = tail_epilogue(x, geometry, tail)
    native.module().cpu_epilogue_curved(
        problem,
        order,
        x.data_ptr(),
        dy.data_ptr(),
        address(h),
        dx.data_ptr(),
        address(total),
        torch.get_num_threads(),
    )


def epilogue_backward(
    dy: torch.Tensor,
    y: torch.Tensor | None,
    mask: torch.Tensor | None,
    noise: torch.Tensor | None,
    scale: torch.Tensor | None,
    dx: torch.Tensor | None,
    moments: torch.Tensor | None,
    geometry: Geometry,
    negative_slope: float,
    gain: float,
) -> None:
    problem = epilogue(dy, geometry, gain=gain, scale=scale, noise=noise)
    native.module().cpu_epilogue_backward(
        problem,
        negative_slope,
        dy.data_ptr(),
        address(y),
        address(mask),
        address(dx),
        address(moments),
        torch.get_num_threads(),
    )


def upfirdn2d_forward(
    x: torch.Tensor,
    f: torch.Tensor | None,
    fir: Fir,
    y: torch.Tensor,
    add: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    geometry: Geometry | None = None,
    tail: Tail | None = None,
) -> None:
    native.module().cpu_upfirdn2d_forward(
        upfirdn2d(x, f, y, fir),
        tail_epilogue(y, geometry, tail),
        x.data_ptr(),
        address(add),
        y.data_ptr(),
        address(mask),
        torch.get_num_threads(),
    )


def upfirdn2d_masked(
    dy: torch.Tensor,
    mask: torch.Tensor | None,
    dx: torch.Tensor,
    total: torch.Tensor | None,
    scale: torch.Tensor | None,
    f: torch.Tensor | None,
    fir: Fir,
    geometry: Geometry,
    negative_slope: float,
    gain: float,
) -> None:
    native.module().cpu_upfirdn2d_masked(
        upfirdn2d(dy, f, dx, fir),
        epilogue(dy, geometry, gain=gain, scale=scale),
        negative_slope,
        dy.data_ptr(),
        address(mask),
        dx.data_ptr(),
        address(total),
        torch.get_num_threads(),
    )
