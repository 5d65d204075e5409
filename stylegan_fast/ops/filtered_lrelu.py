"""The activation of StyleGAN3: leaky ReLU at a higher resolution, between two FIR filters.

Where a backend has a kernel for the filters, the image between them is never made. The derivative
is a kernel of the same kind, which reads the signs that the forward pass kept
(csrc/filtered_lrelu.h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import backends
from .._checks import as_int, check_number
from ..backends import select
from ..backends.geometry import FilteredLrelu
from ..reference.bias_act import Epilogue
from ..reference.filtered_lrelu import filtered_lrelu as reference_filtered_lrelu
from ..reference.upfirdn2d import LARGEST_FACTOR, filter_size, memory_format_of
from ._library import accumulation_dtype, define, mask_size
from .bias_act import bias_act, check_bias
from .fir import filter_operand
from .upfirdn2d import (
    check_filter,
    check_output_size,
    check_upfirdn2d,
    upfirdn2d,
    upfirdn2d_epilogue,
)


def filtered_lrelu(
    x: torch.Tensor,  # [N, C, H, W]
    fu: torch.Tensor | None = None,  # [fh, fw] or [taps]
    fd: torch.Tensor | None = None,  # [fh, fw] or [taps]
    b: torch.Tensor | None = None,  # [C]
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """y = down(fd * clamp(gain * lrelu(up**2 fu * up(pad(x + b)); slope), -clamp, clamp))

    Args:
        x: `[N, C, H, W]`, float64, float32, float16 or bfloat16; N may be 0.
        fu, fd: filters before and after the activation, as f in `upfirdn2d`.
        b: bias `[C]` of x's dtype and device, or None. What is padded has no bias.
        up, down: factors of both axes.
        padding: of the zero-stuffed image: number, `[x, y]` or `[x0, x1, y0, y1]`; negative crops.
        gain: > 0. slope: >= 0, of the negative branch. clamp: None or >= 0.
        flip_filter: of both filters, as in `upfirdn2d`.
        backend: None chooses; else 'reference', 'cpu', 'triton' or 'cuda'.

    Returns:
        `[N, C, (H' - fdh) // down + 1, (W' - fdw) // down + 1]`, the image between the filters
        having H' = H * up + y0 + y1 - fuh + 1 rows and as many columns; dtype and memory format of
        x.

    Gradients: any order with respect to x and b, none with respect to fu and fd. The backward pass
    keeps two bits for each pixel between the filters, neither x nor y.

    One kernel computes in float32, of float64 in float64, and rounds once. Filters that it does not
    take run as `bias_act` and twice `upfirdn2d`, which round 16-bit types after each: on triton 2-D
    ones, factors other than 1, 2 and 4, and long ones; on cuda factors above 4 and more than 32
    taps. Without filters, factors and padding it is `bias_act`.

    Autocast: computes and returns in x's dtype.

    Raises:
        TypeError: x, fu, fd or b is not a floating-point tensor, b has another dtype, up, down or
            padding holds something else than ints, or gain, slope or clamp is not a number.
        ValueError: wrong rank, length, factor or device, a filter is not finite, gain <= 0,
            slope < 0, clamp < 0, or an output without pixels.
        NotImplementedError: fu or fd requires a gradient.
        RuntimeError: the explicitly chosen backend cannot run this.

    The originals' `filtered_lrelu` (Karras et al., "Alias-Free Generative Adversarial Networks",
    2021).
    """
    up = as_int("up", up, minimum=1, maximum=LARGEST_FACTOR)
    down = as_int("down", down, minimum=1, maximum=LARGEST_FACTOR)
    fir = check_upfirdn2d(x, fu, up, 1, padding, flip_filter, up**2, name="fu")
    check_filter("fd", fd, x)
    gain = check_number("gain", gain, minimum=0)
    if gain == 0:
        raise ValueError(f"gain must be greater than 0, got {gain=}")
    slope = check_number("slope", slope, minimum=0)
    if clamp is not None:
        clamp = check_number("clamp", clamp, minimum=0)
    if b is not None:
        b = check_bias(b, x, 1)
    fw, fh = filter_size(fd)
    image = x.shape[2], x.shape[3]
    height, width = between = fir.output_size(*image, filter_size(fu))
    size = ((height - fh) // down + 1, (width - fw) // down + 1)
    check_output_size(
        size, image=image, between=between, filter=(fh, fw), down=down, padding=padding
    )

    name = select("filtered_lrelu", x, backend)
    if name == "reference":
        return reference_filtered_lrelu(
            x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter
        )
    if fu is None and fd is None and up == down == 1 and not any(fir.arguments()[2]):
        return bias_act(x, b, 1, "lrelu", slope, gain, clamp, backend=name)
    if backends.BACKENDS[name].filtered_lrelu_refusal(x.dtype, fu, fd, up, down) is not None:
        return _composed(x, fu, fd, b, fir, down, gain, slope, clamp, name)
    problem = FilteredLrelu(
        up,
        down,
        fir.x0,
        fir.y0,
        fir.flip_filter,
        gain * fir.gain,
        slope,
        math.inf if clamp is None else clamp,
        *between,
    )
    channels_last = memory_format_of(x) == torch.channels_last
    if torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad)):
        if fd is fu and fd is not None:
            fd = fd.view_as(fd)  # Dynamo takes a tensor once
        return _FilteredLrelu.apply(x, b, fu, fd, problem, size, channels_last, name)[0]
    return forward_op(x, b, fu, fd, *problem, size, channels_last, False, name)[0]


def _composed(x, fu, fd, b, fir, down, gain, slope, clamp, backend):
    if b is not None:
        x = bias_act(x, b, backend=backend)
    up, _, padding, flip_filter, fir_gain = fir.arguments()
    end = Epilogue(act="lrelu", alpha=slope, gain=gain, clamp=clamp)
    x = upfirdn2d_epilogue(x, fu, up, 1, padding, flip_filter, fir_gain, end=end, backend=backend)
    return upfirdn2d(x, fd, 1, down, 0, flip_filter, backend=backend)


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _dense(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return t.contiguous(memory_format=_layout(channels_last))


def _output(x: torch.Tensor, size: Sequence[int], channels_last: bool) -> torch.Tensor:
    shape, layout = (*x.shape[:2], *size), _layout(channels_last)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def signs_size(x: torch.Tensor, height: int, width: int, channels_last: bool) -> int:
    """Bytes of the signs of an image between the filters."""
    n, channels = x.shape[:2]
    rows, row = (height * width, channels) if channels_last else (channels * height, width)
    return n * rows * mask_size(row)


def _forward(x, b, fu, fd, *arguments):
    *constants, size, channels_last, save_signs, backend = arguments
    y, signs = _forward_fake(x, b, fu, fd, *arguments)
    if y.numel():
        backends.BACKENDS[backend].filtered_lrelu_forward(
            _dense(x, channels_last),
            None if b is None else b.contiguous(),
            filter_operand(fu, x),
            filter_operand(fd, x),
            y,
            signs if save_signs else None,
            FilteredLrelu(*constants),
            channels_last,
        )
    return y, signs


def _forward_fake(x, b, fu, fd, *arguments):
    *constants, size, channels_last, save_signs, _ = arguments
    problem = FilteredLrelu(*constants)
    height = problem.sign_height if save_signs else 0
    signs = x.new_empty(signs_size(x, height, problem.sign_width, channels_last), dtype=torch.uint8)
    return _output(x, size, channels_last), signs


def _masked(dy, signs, fu, fd, *arguments):
    *constants, _, channels_last, backend = arguments
    dx = _masked_fake(dy, signs, fu, fd, *arguments)
    if dx.numel():
        backends.BACKENDS[backend].filtered_lrelu_masked(
            _dense(dy, channels_last),
            signs,
            filter_operand(fu, dy),
            filter_operand(fd, dy),
            dx,
            FilteredLrelu(*constants),
            channels_last,
        )
    return dx


def _masked_fake(dy, signs, fu, fd, *arguments):
    *_, size, channels_last, _ = arguments
    return _output(dy, size, channels_last)


_CONSTANTS = (
    "Tensor? fu, Tensor? fd, int up, int down, SymInt x0, SymInt y0, bool flip_filter, "
    "float gain, float slope, float clamp, SymInt sign_height, SymInt sign_width, SymInt sign_x, "
    "SymInt sign_y, SymInt[] size, bool channels_last, "
)

forward_op = define(
    "filtered_lrelu",
    f"(Tensor x, Tensor? b, {_CONSTANTS}bool save_signs, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
masked_op = define(
    "filtered_lrelu_masked",
    f"(Tensor dy, Tensor signs, {_CONSTANTS}str backend) -> Tensor",
    _masked,
    _masked_fake,
)


class _FilteredLrelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b, fu, fd, problem, size, channels_last, backend):
        ctx.set_materialize_grads(False)
        y, signs = forward_op(x, b, fu, fd, *problem, size, channels_last, True, backend)
        ctx.mark_non_differentiable(signs)
        ctx.save_for_backward(signs, fu, fd)
        ctx.problem = problem
        ctx.size = x.shape[2:]
        ctx.channels_last = channels_last
        ctx.backend = backend
        ctx.bias_dtype = None if b is None else b.dtype
        return y, signs

    @staticmethod
    def backward(ctx, dy, _signs):
        if dy is None:
            return (None,) * 8
        signs, fu, fd = ctx.saved_tensors
        dx = _transpose(dy, signs, fu, fd, ctx)
        db = None
        if ctx.needs_input_grad[1]:
            db = dx.sum((0, 2, 3), dtype=accumulation_dtype(dx.dtype)).to(ctx.bias_dtype)
        return dx if ctx.needs_input_grad[0] else None, db, *(None,) * 6


class _Masked(torch.autograd.Function):
    """Linear in x; its transpose is of its own kind, with the filters in turn."""

    @staticmethod
    def forward(ctx, x, signs, fu, fd, problem, size, channels_last, backend):
        ctx.save_for_backward(signs, fu, fd)
        ctx.problem = problem
        ctx.size = x.shape[2:]
        ctx.channels_last = channels_last
        ctx.backend = backend
        return masked_op(x, signs, fu, fd, *problem, size, channels_last, backend)

    @staticmethod
    def backward(ctx, dy):
        signs, fu, fd = ctx.saved_tensors
        return _transpose(dy, signs, fu, fd, ctx), *(None,) * 7


def _transpose(dy, signs, fu, fd, ctx):
    problem = ctx.problem.transposed(filter_size(fu), filter_size(fd))
    arguments = (dy, signs, fd, fu, problem, ctx.size, ctx.channels_last, ctx.backend)
    return _Masked.apply(*arguments)
