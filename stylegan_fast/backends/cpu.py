"""C++ kernels with SIMD and threads (csrc/cpu)."""

from __future__ import annotations

import torch

from .. import _env
from . import native
from .choice import FORWARD, ConvClass
from .geometry import FilteredLrelu, Fir, Geometry, Tail
from .native import (
    adain,
    address,
    conv2d,
    epilogue,
    filtered_lrelu,
    tail_epilogue,
    upfirdn2d,
)


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


def adain_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    statistics: torch.Tensor,
    styles: torch.Tensor,
    geometry: Geometry,
    tail: Tail,
    eps: float,
) -> None:
    native.module().cpu_adain_forward(
        adain(x, styles, geometry, tail),
        eps,
        x.data_ptr(),
        y.data_ptr(),
        statistics.data_ptr(),
        torch.get_num_threads(),
    )


def adain_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    styles: torch.Tensor,
    dx: torch.Tensor,
    d_styles: torch.Tensor,
    sums: torch.Tensor,
    geometry: Geometry,
    tail: Tail,
) -> None:
    native.module().cpu_adain_backward(
        adain(x, styles, geometry, tail),
        x.data_ptr(),
        dy.data_ptr(),
        statistics.data_ptr(),
        dx.data_ptr(),
        d_styles.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )


def demodulation(
    weight: torch.Tensor, styles: torch.Tensor, energy: torch.Tensor, d: torch.Tensor, eps: float
) -> None:
    native.module().cpu_demodulation(
        native.demodulation(weight, styles, eps),
        weight.data_ptr(),
        styles.data_ptr(),
        energy.data_ptr(),
        d.data_ptr(),
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


def conv2d_forward(
    x: torch.Tensor,
    w: torch.Tensor,
    conv: Fir,
    y: torch.Tensor,
    pre: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    geometry: Geometry | None = None,
    tail: Tail | None = None,
) -> None:
    native.module().cpu_conv2d_forward(
        conv2d(x, w, y, conv),
        tail_epilogue(y, geometry, tail),
        x.data_ptr(),
        w.data_ptr(),
        address(pre),
        address(add),
        y.data_ptr(),
        address(mask),
        torch.get_num_threads(),
    )


def fresh(y: torch.Tensor) -> torch.Tensor:
    """y, about to be written for the first time by something else than the kernels, which ask for
    huge pages themselves."""
    if native.load()[0] is not None and y.device.type == "cpu":
        native.module().want_huge_pages(y.data_ptr(), y.nbytes)
    return y


def conv2d_weight_gradient(
    x: torch.Tensor,
    dy: torch.Tensor,
    conv: Fir,
    dw: torch.Tensor,
    pre: torch.Tensor | None = None,
    post: torch.Tensor | None = None,
) -> None:
    if conv.up_x > 1:
        # <dy, C(x)> = <C'(dy), x>: the same sum with the parts of x and dy exchanged.
        conv = conv.adjoint(x.shape[2], x.shape[3], (dw.shape[3], dw.shape[2]))
        x, dy, pre, post, dw = dy, x, post, pre, dw.transpose(0, 1)
    native.module().cpu_conv2d_weight_gradient(
        conv2d(x, dw, dy, conv),
        x.data_ptr(),
        dy.data_ptr(),
        address(pre),
        address(post),
        dw.data_ptr(),
        torch.get_num_threads(),
    )


def conv2d_refusal(call: ConvClass) -> str | None:
    """None, or why the Winograd kernel cannot run such a call."""
    if _env.choice("STYLEGAN_FAST_WINOGRAD", ("0", "1")) == "0":
        return "STYLEGAN_FAST_WINOGRAD=0"
    if call.dtype != torch.float32:
        return "it is for float32"
    if call.up * call.down > 2:
        return "it is for up=1 or 2, or down=2"
    if max(call.kernel_x, call.kernel_y) > 3:
        return "it is for kernels of at most 3x3"
    if call.direction == FORWARD and call.up == 2 and (call.pad_x % 2 or call.pad_y % 2):
        return "its up=2 takes an even padding"
    return None


def conv2d_preferred(call: ConvClass) -> bool:
    """Measured on two cores of Zen 4 beside oneDNN: 2 to 4 times as fast, with a stride up to 2
    times, but for a few tiles, whose transformed weights are 4 times as much to read as the
    weights, and for few taps or channels."""
    strided = call.up * call.down > 1
    pixels = 4 * call.down  # of a row of a tile
    tiles = call.samples * -(-call.height // pixels) * -(-call.width // pixels)
    enough = tiles >= (32 if strided else 16)
    taps, channels = min(call.kernel_x, call.kernel_y), min(call.in_channels, call.out_channels)
    return enough and taps >= 3 and channels >= 16


def filtered_lrelu_forward(
    x: torch.Tensor,
    b: torch.Tensor | None,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    y: torch.Tensor,
    signs: torch.Tensor | None,
    problem: FilteredLrelu,
    channels_last: bool,
) -> None:
    native.module().cpu_filtered_lrelu_forward(
        filtered_lrelu(x, fu, fd, y, problem, channels_last, b),
        x.data_ptr(),
        y.data_ptr(),
        address(signs),
        torch.get_num_threads(),
    )


def filtered_lrelu_masked(
    dy: torch.Tensor,
    signs: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    dx: torch.Tensor,
    problem: FilteredLrelu,
    channels_last: bool,
) -> None:
    native.module().cpu_filtered_lrelu_masked(
        filtered_lrelu(dy, fu, fd, dx, problem, channels_last),
        dy.data_ptr(),
        signs.data_ptr(),
        dx.data_ptr(),
        torch.get_num_threads(),
    )


def filtered_lrelu_refusal(
    dtype: torch.dtype, fu: torch.Tensor | None, fd: torch.Tensor | None, up: int, down: int
) -> str | None:
    """None, or why no kernel takes these filters; their parts run then."""
    return None
