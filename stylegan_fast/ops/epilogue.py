"""The epilogue of every fused op, differentiable to second order:

    v = scale[n,c] * x + strength * noise[n,1,h,w] + b[c]
    y = clamp(gain * act(v; alpha), -clamp, +clamp)

Three kernels serve all orders (csrc/epilogue.h): the forward map; dy -> gain act'(v) dy for
piecewise-linear activations, from two bits an element; the same and the second-order
dy h gain act''(v) for curved ones, from the input. The masks follow PyTorch's own operators: taken
before rounding to the storage type, zero where clamped, kept on ties.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import backends
from ..activations import ACTIVATIONS
from ..backends.geometry import Geometry

NAMESPACE = "stylegan_fast"
_library = torch.library.Library(NAMESPACE, "DEF")
_CURVED = {row.code: row.curved for row in ACTIVATIONS.values()}


def _define(name: str, schema: str, implementation: Any, fake: Any) -> Any:
    _library.define(f"{name}{schema}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mask_size(numel: int) -> int:
    """Two bytes for every 8 elements: v <= 0, and clamped."""
    return (numel + 7) // 8 * 2


def _laid_out(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t with the strides of `like`, which is dense; a copy only where they differ."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


def _output_like(x: torch.Tensor, per_sample: bool) -> torch.Tensor:
    """A dense tensor in x's own order of dimensions; per-sample operands need NCHW or NHWC."""
    if not per_sample:
        return torch.empty_like(x)
    nhwc = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty_like(
        x, memory_format=torch.channels_last if nhwc else torch.contiguous_format
    )


def _geometry(y: torch.Tensor, dim: int, per_sample: bool) -> Geometry:
    """Any order of dimensions will do: what counts is the stride of the channels."""
    channels = y.shape[dim] if y.ndim else 1
    inner = y.stride(dim) if channels > 1 else y.numel()
    outer = y.numel() // (channels * inner)
    return Geometry(outer, channels, inner, math.prod(y.shape[2:]) if per_sample else outer * inner)


def _total(x: torch.Tensor, dim: int, wanted: bool) -> torch.Tensor:
    size = (x.shape[dim] if x.ndim else 1) if wanted else 0
    return torch.empty(size, dtype=_accumulation_dtype(x.dtype), device=x.device)


def _operand(t: torch.Tensor | None, x: torch.Tensor, *shape: int) -> torch.Tensor | None:
    """A per-sample operand in the accumulation type, dense."""
    if t is None:
        return None
    return t.detach().to(_accumulation_dtype(x.dtype)).reshape(shape).contiguous()


def _noise_operand(noise: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    if noise is None:
        return None
    pixels = x.shape[2] * x.shape[3]
    shared = noise.ndim < 4 or noise.shape[0] == 1
    return _operand(noise, x, pixels) if shared else _operand(noise, x, x.shape[0], pixels)


def _scale_operand(scale: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if scale is None else _operand(scale, x, x.shape[0], x.shape[1])


def _forward(x, scale, noise, strength, b, dim, act, alpha, gain, clamp, save_mask, backend):
    per_sample = scale is not None or noise is not None
    y = _output_like(x, per_sample)
    mask = x.new_empty(_mask_size(x.numel()) if save_mask else 0, dtype=torch.uint8)
    if x.numel():
        backends.BACKENDS[backend].epilogue_forward(
            _laid_out(x, y),
            y,
            mask if save_mask else None,
            _scale_operand(scale, x),
            _noise_operand(noise, x),
            _operand(strength, x, 1),
            None if b is None else b.contiguous(),
            _geometry(y, dim, per_sample),
            act,
            alpha,
            gain,
            clamp,
        )
    return y, mask


def _forward_fake(x, scale, noise, strength, b, dim, act, alpha, gain, clamp, save_mask, backend):
    y = _output_like(x, scale is not None or noise is not None)
    return y, x.new_empty(_mask_size(x.numel()) if save_mask else 0, dtype=torch.uint8)


def _masked(dy, mask, scale, dim, stride, negative_slope, gain, with_sum, backend):
    dx = torch.empty_strided(dy.shape, stride, dtype=dy.dtype, device=dy.device)
    total = _total(dy, dim, with_sum)
    if not dy.numel():
        return dx, total.zero_()
    backends.BACKENDS[backend].epilogue_masked(
        _laid_out(dy, dx),
        mask,
        dx,
        total if with_sum else None,
        _scale_operand(scale, dy),
        _geometry(dx, dim, scale is not None),
        negative_slope,
        gain,
    )
    return dx, total


def _masked_fake(dy, mask, scale, dim, stride, negative_slope, gain, with_sum, backend):
    dx = torch.empty_strided(dy.shape, stride, dtype=dy.dtype, device=dy.device)
    return dx, _total(dy, dim, with_sum)


def _curved(
    order, x, dy, h, scale, noise, strength, b, dim, act, alpha, gain, clamp, with_sum, backend
):
    per_sample = scale is not None or noise is not None
    dx = _output_like(x, per_sample)
    total = _total(x, dim, with_sum)
    if not x.numel():
        return dx, total.zero_()
    backends.BACKENDS[backend].epilogue_curved(
        order,
        _laid_out(x, dx),
        _laid_out(dy, dx),
        None if h is None else _laid_out(h, dx),
        dx,
        total if with_sum else None,
        _scale_operand(scale, x),
        _noise_operand(noise, x),
        _operand(strength, x, 1),
        None if b is None else b.contiguous(),
        _geometry(dx, dim, per_sample),
        act,
        alpha,
        gain,
        clamp,
    )
    return dx, total


def _curved_fake(
    order, x, dy, h, scale, noise, strength, b, dim, act, alpha, gain, clamp, with_sum, backend
):
    per_sample = scale is not None or noise is not None
    return _output_like(x, per_sample), _total(x, dim, with_sum)


forward_op = _define(
    "epilogue_forward",
    "(Tensor x, Tensor? scale, Tensor? noise, Tensor? strength, Tensor? b, int dim, int act, "
    "float alpha, float gain, float clamp, bool save_mask, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
masked_op = _define(
    "epilogue_masked",
    "(Tensor dy, Tensor? mask, Tensor? scale, int dim, SymInt[] stride, float negative_slope, "
    "float gain, bool with_sum, str backend) -> (Tensor, Tensor)",
    _masked,
    _masked_fake,
)
curved_op = _define(
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


class _Masked(torch.autograd.Function):
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
        d_dy = _Masked.apply(h, mask, *ctx.arguments, False, ctx.backend)[0]
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
            "bias_act with a curved activation supports second-order gradients; for a third "
            "derivative use backend='reference'"
        )


class _Epilogue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, scale, noise, strength, b, dim, act, negative_slope, alpha, gain, clamp, backend
    ):
        ctx.set_materialize_grads(False)
        needs_x, *needs_affine, needs_b = ctx.needs_input_grad[:5]
        curved = _CURVED[act]
        save_mask = not curved and (negative_slope != 1 or clamp != math.inf)
        y, mask = forward_op(
            x, scale, noise, strength, b, dim, act, alpha, gain, clamp, save_mask, backend
        )
        ctx.mark_non_differentiable(mask)
        ctx.save_for_backward(
            x if curved or needs_affine[0] else None,
            mask if save_mask else None,
            scale,
            noise,
            strength,
            b if curved else None,
        )
        ctx.b_dtype = None if b is None else b.dtype
        ctx.stride = y.stride()
        ctx.arguments = (dim, act, negative_slope, alpha, gain, clamp, backend)
        return y, mask

    @staticmethod
    def backward(ctx, dy, _mask):
        if dy is None:
            return (None,) * 12
        x, mask, scale, noise, strength, b = ctx.saved_tensors
        dim, act, negative_slope, alpha, gain, clamp, backend = ctx.arguments
        needs_x, needs_scale, needs_noise, needs_strength, needs_b = ctx.needs_input_grad[:5]
        affine = scale is not None or noise is not None
        # A recorded gradient, or one that goes through scale or noise, is composed of
        # differentiable parts; otherwise one kernel does it all.
        composed = torch.is_grad_enabled() or needs_scale or needs_noise or needs_strength

        dx = d_scale = d_noise = d_strength = d_b = None
        if _CURVED[act]:
            curve = (dim, act, alpha, gain, clamp, needs_b, backend)
            if composed:
                v, d, offset = x, dy, b
                if affine:
                    v = _affine(x, scale, noise, strength)
                    d, offset = dy.to(v.dtype), None if b is None else b.to(v.dtype)
                dv, d_b = _Slope.apply(v, d, offset, *curve)
            else:
                dv, d_b = curved_op(1, x, dy, None, scale, noise, strength, b, *curve)
        else:
            line = (dim, ctx.stride, negative_slope, gain, needs_b, backend)
            if composed:
                dv, d_b = _Masked.apply(dy, mask, *line)
            else:
                dv, d_b = masked_op(dy, mask, scale, *line)
        d_b = d_b.to(ctx.b_dtype) if needs_b else None

        if needs_x:
            dx = dv * scale[:, :, None, None] if composed and scale is not None else dv
            dx = dx.to(dy.dtype)
        if needs_scale:
            d_scale = (dv * x).sum([2, 3], dtype=scale.dtype)
        if needs_noise or needs_strength:
            image = dv.sum(1, keepdim=True, dtype=noise.dtype)
            if needs_noise:
                d_noise = image if strength is None else image * strength
                d_noise = d_noise.sum_to_size(noise.shape)
            if needs_strength:
                d_strength = (image * noise).sum().reshape(strength.shape).to(strength.dtype)
        return (dx, d_scale, d_noise, d_strength, d_b) + (None,) * 7


def _affine(x, scale, noise, strength):
    """scale * x + strength * noise in PyTorch and unrounded, for derivatives that go through it."""
    v = x.to(_accumulation_dtype(x.dtype))
    if scale is not None:
        v = v * scale[:, :, None, None]
    if noise is not None:
        v = v + (noise if strength is None else noise * strength)
    return v


def epilogue(
    x: torch.Tensor,  # [N, C, H, W]; any shape where scale and noise are None
    scale: torch.Tensor | None,  # [N, C]
    noise: torch.Tensor | None,  # [N, 1, H, W], [1, 1, H, W] or [H, W]
    strength: torch.Tensor | None,  # []
    b: torch.Tensor | None,  # [C]
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    backend: str,
) -> torch.Tensor:
    """Run the epilogue on a kernel backend. Arguments are validated by the callers."""
    row = ACTIVATIONS[act]
    limit = math.inf if clamp is None else clamp
    tensors = (x, scale, noise, strength, b)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        slope = 1.0 if row.curved else row.negative_slope(alpha)
        return _Epilogue.apply(*tensors, dim, row.code, slope, alpha, gain, limit, backend)[0]
    return forward_op(*tensors, dim, row.code, alpha, gain, limit, False, backend)[0]
