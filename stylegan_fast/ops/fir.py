"""The kernels of upfirdn2d as operators, and their linear form differentiable to every order.

csrc/upfirdn2d.h states the contract: u = upfirdn2d(x) alone, followed by the epilogue, or preceded
by the derivative of one.
"""

from __future__ import annotations

import math

import torch

from .. import backends
from ..activations import ACTIVATIONS
from ..backends.geometry import Fir
from ..reference.upfirdn2d import filter_size, memory_format_of
from ._library import (
    channel_total,
    define,
    geometry,
    laid_out,
    mask_size,
    operand,
    scale_operand,
    tail,
)

_LINEAR = ACTIVATIONS["linear"].code


def filter_operand(f: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """The filter as the kernels take it."""
    return None if f is None else operand(f, x, *f.shape)


def _output(x: torch.Tensor, f: torch.Tensor | None, fir: Fir) -> torch.Tensor:
    n, channels, height, width = x.shape
    return torch.empty(
        (n, channels, *fir.output_size(height, width, filter_size(f))),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format_of(x),
    )


def whole_units(y: torch.Tensor) -> bool:
    """Whether the rows of y, in memory order, are whole units of a mask."""
    return (y.shape[3] if y.is_contiguous() else y.shape[1]) % 8 == 0


def _linear(x, f, up, down, padding, flip_filter, gain, backend):
    fir = Fir.of(up, down, padding, flip_filter, gain)
    y = _output(x, f, fir)
    if y.numel():
        backends.BACKENDS[backend].upfirdn2d_forward(x, filter_operand(f, x), fir, y)
    return y


def _linear_fake(x, f, up, down, padding, flip_filter, gain, backend):
    return _output(x, f, Fir.of(up, down, padding, flip_filter, gain))


def with_epilogue(
    x, f, up, down, padding, flip_filter, fir_gain, scale, noise, strength, b, add,
    act, alpha, gain, clamp, save_mask, backend,
):  # fmt: skip
    fir = Fir.of(up, down, padding, flip_filter, fir_gain)
    y = _output(x, f, fir)
    mask = x.new_empty(mask_size(y.numel()) if save_mask else 0, dtype=torch.uint8)
    if not y.numel():
        return y, mask
    run = backends.BACKENDS[backend]
    add = None if add is None else laid_out(add, y)
    end = tail(y, scale, noise, strength, b, act, alpha, gain, clamp)
    walked = geometry(y, 1, scale is not None or noise is not None)
    if not save_mask:
        without_operands = all(t is None for t in end[:4])
        idle = without_operands and act == _LINEAR and gain == 1 and clamp == math.inf
        epilogue = (None, None) if idle else (walked, end)
        run.upfirdn2d_forward(x, filter_operand(f, x), fir, y, add, None, *epilogue)
    elif whole_units(y):
        run.upfirdn2d_forward(x, filter_operand(f, x), fir, y, add, mask, walked, end)
    else:
        u = torch.empty_like(y)
        run.upfirdn2d_forward(x, filter_operand(f, x), fir, u)
        run.epilogue_forward(u, y, mask, walked, end)
        y = y if add is None else y.add_(add)
    return y, mask


def _with_epilogue_fake(
    x, f, up, down, padding, flip_filter, fir_gain, scale, noise, strength, b, add,
    act, alpha, gain, clamp, save_mask, backend,
):  # fmt: skip
    y = _output(x, f, Fir.of(up, down, padding, flip_filter, fir_gain))
    return y, x.new_empty(mask_size(y.numel()) if save_mask else 0, dtype=torch.uint8)


def _masked(
    dy, f, up, down, padding, flip_filter, fir_gain, mask, scale, stride,
    negative_slope, gain, with_sum, backend,
):  # fmt: skip
    fir = Fir.of(up, down, padding, flip_filter, fir_gain)
    total = channel_total(dy, 1, with_sum)
    if dy.stride() != tuple(stride):
        dy = dy.new_empty_strided(dy.shape, stride).copy_(dy)
    dx = _output(dy, f, fir)
    if not dy.numel():
        return dx, total.zero_()
    run = backends.BACKENDS[backend]
    walked = geometry(dy, 1, scale is not None)
    scale = scale_operand(scale, dy)
    wanted = total if with_sum else None
    if mask is None or whole_units(dy):
        run.upfirdn2d_masked(
            dy, mask, dx, wanted, scale, filter_operand(f, dy), fir, walked, negative_slope, gain
        )
    else:
        dv = torch.empty_like(dy)
        run.epilogue_masked(dy, mask, dv, wanted, scale, walked, negative_slope, gain)
        run.upfirdn2d_forward(dv, filter_operand(f, dy), fir, dx)
    return dx, total


def _masked_fake(
    dy, f, up, down, padding, flip_filter, fir_gain, mask, scale, stride,
    negative_slope, gain, with_sum, backend,
):  # fmt: skip
    dense = dy.new_empty_strided(dy.shape, stride)
    dx = _output(dense, f, Fir.of(up, down, padding, flip_filter, fir_gain))
    return dx, channel_total(dy, 1, with_sum)


_FIR = "int[] up, int[] down, SymInt[] padding, bool flip_filter, float fir_gain"

linear_op = define(
    "upfirdn2d",
    "(Tensor x, Tensor? f, int[] up, int[] down, SymInt[] padding, bool flip_filter, float gain, "
    "str backend) -> Tensor",
    _linear,
    _linear_fake,
)
epilogue_op = define(
    "upfirdn2d_epilogue",
    f"(Tensor x, Tensor? f, {_FIR}, Tensor? scale, Tensor? noise, Tensor? strength, Tensor? b, "
    "Tensor? add, int act, float alpha, float gain, float clamp, bool save_mask, str backend) "
    "-> (Tensor, Tensor)",
    with_epilogue,
    _with_epilogue_fake,
)
masked_op = define(
    "upfirdn2d_masked",
    f"(Tensor dy, Tensor? f, {_FIR}, Tensor? mask, Tensor? scale, SymInt[] stride, "
    "float negative_slope, float gain, bool with_sum, str backend) -> (Tensor, Tensor)",
    _masked,
    _masked_fake,
)


class _Upfirdn2d(torch.autograd.Function):
    """Linear in x; its transpose is of its own kind."""

    @staticmethod
    def forward(ctx, x, f, fir, backend):
        ctx.save_for_backward(f)
        ctx.fir = fir
        ctx.backend = backend
        ctx.size = x.shape[2:]
        return linear_op(x, f, *fir.arguments(), backend)

    @staticmethod
    def backward(ctx, dy):
        (f,) = ctx.saved_tensors
        transposed = ctx.fir.adjoint(*ctx.size, filter_size(f))
        return _Upfirdn2d.apply(dy, f, transposed, ctx.backend), None, None, None


class _TransformableUpfirdn2d(torch.autograd.Function):
    """The same for torch.func and forward mode, which cost more and which Dynamo does not trace."""

    @staticmethod
    def forward(x, f, fir, backend):
        return linear_op(x, f, *fir.arguments(), backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, f, ctx.fir, ctx.backend = inputs
        ctx.save_for_backward(f)
        ctx.save_for_forward(f)
        ctx.size = x.shape[2:]

    @staticmethod
    def backward(ctx, dy):
        (f,) = ctx.saved_tensors
        transposed = ctx.fir.adjoint(*ctx.size, filter_size(f))
        return _TransformableUpfirdn2d.apply(dy, f, transposed, ctx.backend), None, None, None

    @staticmethod
    def jvp(ctx, x_tangent, *_):
        (f,) = ctx.saved_tensors
        return _TransformableUpfirdn2d.apply(x_tangent, f, ctx.fir, ctx.backend)

    @staticmethod
    def vmap(info, in_dims, x, f, fir, backend):
        if in_dims[1] is not None:
            raise NotImplementedError("torch.func.vmap over the filter f is not supported")
        samples = x.movedim(in_dims[0], 0)
        y = _TransformableUpfirdn2d.apply(samples.flatten(0, 1), f, fir, backend)
        return y.unflatten(0, samples.shape[:2]), 0


def linear(x: torch.Tensor, f: torch.Tensor | None, fir: Fir, backend: str) -> torch.Tensor:
    """upfirdn2d on a kernel backend. Arguments are validated by the callers."""
    if not torch.compiler.is_compiling() and backends.inside_transform():
        return _TransformableUpfirdn2d.apply(x, f, fir, backend)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Upfirdn2d.apply(x, f, fir, backend)
    return linear_op(x, f, *fir.arguments(), backend)
