"""The epilogue of every fused op, alone or after a linear operator L, to second order:

    v = scale[n,c] * L(x) + strength * noise[n,1,h,w] + b[c]
    y = clamp(gain * act(v; alpha), -clamp, +clamp)

L is the identity or upfirdn2d, whose kernels end with the epilogue (ops/fir.py).

Four kernels serve all orders (csrc/epilogue.h): the forward map; dy -> gain act'(v) dy for
piecewise-linear activations, from two bits an element, also with the sums over the pixels that a
layer's first-order gradients need; the same and the second-order dy h gain act''(v) for curved
ones, from the input. The masks follow PyTorch's own operators: taken
before rounding to the storage type, zero where clamped, kept on ties.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from .. import backends
from ..activations import ACTIVATIONS
from ..backends.geometry import Fir
from ..reference.bias_act import Epilogue
from ..reference.bias_act import epilogue as reference_epilogue
from ..reference.upfirdn2d import filter_size
from ..reference.upfirdn2d import upfirdn2d as reference_upfirdn2d
from . import fir as fir_ops
from ._library import (
    accumulation_dtype,
    channel_total,
    define,
    geometry,
    laid_out,
    mask_size,
    noise_operand,
    scale_operand,
    tail,
)

_CURVED = {row.code: row.curved for row in ACTIVATIONS.values()}


def _output_like(x: torch.Tensor, per_sample: bool) -> torch.Tensor:
    """A dense tensor in x's own order of dimensions; per-sample operands need NCHW or NHWC."""
    if not per_sample:
        return torch.empty_like(x)
    nhwc = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty_like(
        x, memory_format=torch.channels_last if nhwc else torch.contiguous_format
    )


def _forward(x, scale, noise, strength, b, dim, act, alpha, gain, clamp, save_mask, backend):
    per_sample = scale is not None or noise is not None
    y = _output_like(x, per_sample)
    mask = x.new_empty(mask_size(x.numel()) if save_mask else 0, dtype=torch.uint8)
    if x.numel():
        backends.BACKENDS[backend].epilogue_forward(
            laid_out(x, y),
            y,
            mask if save_mask else None,
            geometry(y, dim, per_sample),
            tail(x, scale, noise, strength, b, act, alpha, gain, clamp),
        )
    return y, mask


def _forward_fake(x, scale, noise, strength, b, dim, act, alpha, gain, clamp, save_mask, backend):
    y = _output_like(x, scale is not None or noise is not None)
    return y, x.new_empty(mask_size(x.numel()) if save_mask else 0, dtype=torch.uint8)


def _masked(dy, mask, scale, dim, stride, negative_slope, gain, with_sum, backend):
    dx = torch.empty_strided(dy.shape, stride, dtype=dy.dtype, device=dy.device)
    total = channel_total(dy, dim, with_sum)
    if not dy.numel():
        return dx, total.zero_()
    backends.BACKENDS[backend].epilogue_masked(
        laid_out(dy, dx),
        mask,
        dx,
        total if with_sum else None,
        scale_operand(scale, dy),
        geometry(dx, dim, scale is not None),
        negative_slope,
        gain,
    )
    return dx, total


def _masked_fake(dy, mask, scale, dim, stride, negative_slope, gain, with_sum, backend):
    dx = torch.empty_strided(dy.shape, stride, dtype=dy.dtype, device=dy.device)
    return dx, channel_total(dy, dim, with_sum)


def _strided(t, stride):
    """t with these strides, which are dense; a copy only where they differ."""
    if t is None or t.stride() == tuple(stride):
        return t
    return torch.empty_strided(t.shape, stride, dtype=t.dtype, device=t.device).copy_(t)


def _backward(dy, y, mask, noise, scale, stride, negative_slope, gain, with_dx, backend):
    dx, moments = _backward_fake(
        dy, y, mask, noise, scale, stride, negative_slope, gain, with_dx, backend
    )
    if y is None or noise is None or not dy.numel():
        moments.zero_()
    if dy.numel():
        dy = _strided(dy, stride)
        backends.BACKENDS[backend].epilogue_backward(
            dy,
            _strided(y, stride),
            mask,
            noise_operand(noise, dy),
            scale_operand(scale, dy),
            dx if with_dx else None,
            moments,
            geometry(dy, 1, True),
            negative_slope,
            gain,
        )
    return dx, moments


def _backward_fake(dy, y, mask, noise, scale, stride, negative_slope, gain, with_dx, backend):
    moments = dy.new_empty((3, *dy.shape[:2]), dtype=accumulation_dtype(dy.dtype))
    if not with_dx:
        return dy.new_empty(0), moments
    return torch.empty_strided(dy.shape, stride, dtype=dy.dtype, device=dy.device), moments


def _curved(
    order, x, dy, h, scale, noise, strength, b, dim, act, alpha, gain, clamp, with_sum, backend
):
    per_sample = scale is not None or noise is not None
    dx = _output_like(x, per_sample)
    total = channel_total(x, dim, with_sum)
    if not x.numel():
        return dx, total.zero_()
    backends.BACKENDS[backend].epilogue_curved(
        order,
        laid_out(x, dx),
        laid_out(dy, dx),
        None if h is None else laid_out(h, dx),
        dx,
        total if with_sum else None,
        geometry(dx, dim, per_sample),
        tail(x, scale, noise, strength, b, act, alpha, gain, clamp),
    )
    return dx, total


def _curved_fake(
    order, x, dy, h, scale, noise, strength, b, dim, act, alpha, gain, clamp, with_sum, backend
):
    per_sample = scale is not None or noise is not None
    return _output_like(x, per_sample), channel_total(x, dim, with_sum)


forward_op = define(
    "epilogue_forward",
    "(Tensor x, Tensor? scale, Tensor? noise, Tensor? strength, Tensor? b, int dim, int act, "
    "float alpha, float gain, float clamp, bool save_mask, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
masked_op = define(
    "epilogue_masked",
    "(Tensor dy, Tensor? mask, Tensor? scale, int dim, SymInt[] stride, float negative_slope, "
    "float gain, bool with_sum, str backend) -> (Tensor, Tensor)",
    _masked,
    _masked_fake,
)
backward_op = define(
    "epilogue_backward",
    "(Tensor dy, Tensor? y, Tensor? mask, Tensor? noise, Tensor? scale, SymInt[] stride, "
    "float negative_slope, float gain, bool with_dx, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
curved_op = define(
    "epilogue_curved",
    "(int order, Tensor x, Tensor dy, Tensor? h, Tensor? scale, Tensor? noise, Tensor? strength, "
    "Tensor? b, int dim, int act, float alpha, float gain, float clamp, bool with_sum, "
    "str backend) -> (Tensor, Tensor)",
    _curved,
    _curved_fake,
)


def _combined(h_dv, h_db, dim, shape, dtype):
    """Cotangent of d(v), given those of d(v) itself and of its sum over all but the channels."""
    if h_db is None:
        return h_dv
    spread = h_db.to(dtype).reshape([-1 if axis == dim else 1 for axis in range(len(shape))])
    return spread.expand(shape) if h_dv is None else h_dv + spread


class Masked(torch.autograd.Function):
    """(dy, mask) -> (d(v), sum of d(v)): linear in dy, its own transpose, so of any order."""

    @staticmethod
    def forward(ctx, dy, mask, dim, stride, negative_slope, gain, with_sum, backend):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)
        ctx.arguments = (dim, stride, negative_slope, gain)
        ctx.backend = backend
        ctx.shape = dy.shape
        ctx.dtype = dy.dtype
        dv, db = masked_op(dy, mask, None, dim, stride, negative_slope, gain, with_sum, backend)
        if not with_sum:
            ctx.mark_non_differentiable(db)
        return dv, db

    @staticmethod
    def backward(ctx, h_dv, h_db):
        (mask,) = ctx.saved_tensors
        h = _combined(h_dv, h_db, ctx.arguments[0], ctx.shape, ctx.dtype)
        if h is None:
            return (None,) * 8
        d_dy = Masked.apply(h, mask, *ctx.arguments, False, ctx.backend)[0]
        return (d_dy,) + (None,) * 7


class _Slope(torch.autograd.Function):
    """(x, dy, b) -> (d(v), sum of d(v)) with d(v) = gain act'(v) dy, for a curved activation."""

    @staticmethod
    def forward(ctx, x, dy, b, dim, act, alpha, gain, clamp, with_sum, backend):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dy, b)
        ctx.arguments = (dim, act, alpha, gain, clamp)
        ctx.backend = backend
        dv, db = curved_op(
            1, x, dy, None, None, None, None, b, dim, act, alpha, gain, clamp, with_sum, backend
        )
        if not with_sum:
            ctx.mark_non_differentiable(db)
        return dv, db

    @staticmethod
    def backward(ctx, h_dv, h_db):
        x, dy, b = ctx.saved_tensors
        h = _combined(h_dv, h_db, ctx.arguments[0], dy.shape, dy.dtype)
        if h is None:
            return (None,) * 10
        d_x = d_dy = d_b = None
        needs_x, needs_dy, needs_b = ctx.needs_input_grad[:3]
        if needs_dy:
            d_dy = _Slope.apply(x, h, b, *ctx.arguments, False, ctx.backend)[0]
        if needs_x or needs_b:
            d_x, d_b = _Curvature.apply(x, dy, h, b, *ctx.arguments, needs_b, ctx.backend)
            d_b = d_b.to(b.dtype) if needs_b else None
        return (d_x, d_dy, d_b) + (None,) * 7


class _Curvature(torch.autograd.Function):
    """(x, dy, h, b) -> gain act''(v) dy h and its sum: the end of what is supported."""

    @staticmethod
    def forward(ctx, x, dy, h, b, dim, act, alpha, gain, clamp, with_sum, backend):
        return curved_op(
            2, x, dy, h, None, None, None, b, dim, act, alpha, gain, clamp, with_sum, backend
        )

    @staticmethod
    def backward(ctx, *cotangents):
        raise NotImplementedError(
            "a curved activation supports second-order gradients; for a third derivative use "
            "backend='reference'"
        )


class _Epilogue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, scale, noise, strength, b, add, f, fir,
        dim, act, negative_slope, alpha, gain, clamp, backend,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        needs_scale = ctx.needs_input_grad[1]
        curved = _CURVED[act]
        save_mask = not curved and (negative_slope != 1 or clamp != math.inf)
        operands = (scale, noise, strength, b)
        constants = (act, alpha, gain, clamp, save_mask, backend)
        if fir is None:
            y, mask = forward_op(x, *operands, dim, *constants)
        else:
            y, mask = fir_ops.epilogue_op(x, f, *fir.arguments(), *operands, add, *constants)
        ctx.mark_non_differentiable(mask)
        ctx.save_for_backward(
            x if curved or needs_scale else None,
            mask if save_mask else None,
            scale,
            noise,
            strength,
            b if curved else None,
            f,
        )
        ctx.b_dtype = None if b is None else b.dtype
        ctx.size = x.shape[2:]
        ctx.stride = y.stride()
        ctx.fir = fir
        ctx.arguments = (dim, act, negative_slope, alpha, gain, clamp, backend)
        return y, mask

    @staticmethod
    def backward(ctx, dy, _mask):
        if dy is None:
            return (None,) * 15
        x, mask, scale, noise, strength, b, f = ctx.saved_tensors
        fir = ctx.fir
        dim, act, negative_slope, alpha, gain, clamp, backend = ctx.arguments
        needs_x, needs_scale, needs_noise, needs_strength, needs_b, needs_add = (
            ctx.needs_input_grad[:6]
        )
        affine = scale is not None or noise is not None

        def transpose(d):
            return d if fir is None else fir_ops.linear(d, f, adjoint(), backend)

        def adjoint():
            return fir.adjoint(*ctx.size, filter_size(f))

        # A recorded gradient, or one that goes through scale or noise, is composed of
        # differentiable parts; otherwise one kernel does it all, but for the scale where that has a
        # gradient of its own.
        composed = torch.is_grad_enabled() or needs_noise or needs_strength
        composed = composed or (needs_scale and (fir is None or _CURVED[act]))

        dx = unscaled = d_scale = d_noise = d_strength = d_b = None
        dv: Any = None
        if _CURVED[act]:
            curve = (dim, act, alpha, gain, clamp, needs_b, backend)
            u = x if fir is None else fir_ops.linear(x, f, fir, backend)
            if composed:
                v, d, offset = u, dy, b
                if affine:
                    v = _affine(u, scale, noise, strength)
                    d, offset = dy.to(v.dtype), None if b is None else b.to(v.dtype)
                dv, d_b = _Slope.apply(v, d, offset, *curve)
            else:
                dx, d_b = curved_op(1, u, dy, None, scale, noise, strength, b, *curve)
                dx = transpose(dx)
        else:
            line = (dim, ctx.stride, negative_slope, gain, needs_b, backend)
            if composed:
                dv, d_b = Masked.apply(dy, mask, *line)
            elif fir is None:
                dx, d_b = masked_op(dy, mask, scale, *line)
            else:
                masked = partial(fir_ops.masked_op, dy, f, *adjoint().arguments(), mask)
                if needs_scale:
                    unscaled, d_b = masked(None, *line[1:])
                else:
                    dx, d_b = masked(scale, *line[1:])
        d_b = d_b.to(ctx.b_dtype) if needs_b else None

        if dv is not None and (needs_x or needs_scale):
            unscaled = transpose(dv)
        if needs_scale:
            d_scale = (unscaled * x).sum([2, 3], dtype=scale.dtype)
        if unscaled is not None:
            dx = unscaled if scale is None else unscaled * scale[:, :, None, None]
            dx = dx.to(dy.dtype)
        if needs_noise or needs_strength:
            image = dv.sum(1, keepdim=True, dtype=noise.dtype)
            if needs_noise:
                d_noise = image if strength is None else image * strength
                d_noise = d_noise.sum_to_size(noise.shape)
            if needs_strength:
                d_strength = (image * noise).sum().reshape(strength.shape).to(strength.dtype)
        d_add = dy if needs_add else None
        return (dx if needs_x else None, d_scale, d_noise, d_strength, d_b, d_add) + (None,) * 9


def _affine(u, scale, noise, strength):
    """scale * u + strength * noise in PyTorch and unrounded, for derivatives that go through it."""
    v = u.to(accumulation_dtype(u.dtype))
    if scale is not None:
        v = v * scale[:, :, None, None]
    if noise is not None:
        v = v + (noise if strength is None else noise * strength)
    return v


def epilogue(
    x: torch.Tensor,  # [N, C, H, W]; any shape where scale, noise and fir are None
    scale: torch.Tensor | None,  # [N, C]
    noise: torch.Tensor | None,  # [N, 1, H, W], [1, 1, H, W] or [H, W] of y
    strength: torch.Tensor | None,  # []
    b: torch.Tensor | None,  # [C]
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    backend: str,
    *,
    f: torch.Tensor | None = None,  # [fh, fw] or [taps]
    fir: Fir | None = None,
    add: torch.Tensor | None = None,  # y's shape; only with fir
) -> torch.Tensor:
    """Run E(x), or with fir E(upfirdn2d(x)) + add, on a kernel backend. Arguments are validated by
    the callers."""
    row = ACTIVATIONS[act]
    limit = math.inf if clamp is None else clamp
    tensors = (x, scale, noise, strength, b, add)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        slope = 1.0 if row.curved else row.negative_slope(alpha)
        constants = (row.code, slope, alpha, gain, limit, backend)
        return _Epilogue.apply(*tensors, f, fir, dim, *constants)[0]
    constants = (row.code, alpha, gain, limit, False, backend)
    if fir is None:
        return forward_op(*tensors[:5], dim, *constants)[0]
    return fir_ops.epilogue_op(x, f, *fir.arguments(), *tensors[1:], *constants)[0]


def kernel_noise(noise: torch.Tensor, samples: int, size: tuple[int, int]) -> bool:
    """Whether the kernels take this noise: one image for all samples, or one for each."""
    return tuple(noise.shape) in (size, (1, 1, *size), (samples, 1, *size))


def apply_epilogue(
    x: torch.Tensor,  # [N, C, H, W]
    end: Epilogue,
    *,
    backend: str | None,
    f: torch.Tensor | None = None,
    fir: Fir | None = None,
    add: torch.Tensor | None = None,  # y's shape
) -> torch.Tensor:
    """E(x), or with fir E(upfirdn2d(x)), plus add: in one kernel where the backend has it."""
    name = backends.select("bias_act", x, backend)
    if name == "reference":
        y = x if fir is None else reference_upfirdn2d(x, f, *fir.arguments())
        y = reference_epilogue(y, end)
        return y if add is None else y + add

    scale, noise, b, act, alpha, gain, clamp, strength = end
    row = ACTIVATIONS[act]
    alpha = row.alpha if alpha is None else alpha
    gain = row.gain if gain is None else gain
    b = None if b is None else b.to(x.dtype)
    n, _, height, width = x.shape
    if fir is not None:
        height, width = fir.output_size(height, width, filter_size(f))
    if noise is not None and not kernel_noise(noise, n, (height, width)):
        x = x if fir is None else fir_ops.linear(x, f, fir, name)
        x = reference_epilogue(x, Epilogue(scale, noise, strength=strength))
        scale = noise = strength = fir = None
    fused_add, late_add = (
        (add, None) if fir is not None and (add is None or add.dtype == x.dtype) else (None, add)
    )
    if fir is None and Epilogue(scale, noise, b, act, alpha, gain, clamp).idle:
        y = x
    else:
        y = epilogue(
            x, scale, noise, strength, b, 1, act, alpha, gain, clamp, name, f=f, fir=fir,
            add=fused_add,
        )  # fmt: skip
    return y if late_add is None else y + late_add
