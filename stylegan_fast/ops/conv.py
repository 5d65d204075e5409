"""The scaled convolution with its epilogue, y = E(L(pre ⊙ x)), closed under differentiation.

L is a convolution C (csrc/conv2d.h), or upfirdn2d after one: the tail of an upsampling layer. The
gradient of C by its input is C with the weight transposed and other factors; the one by its weight
is the third operator here; their own gradients are these operators again.

A first-order backward pass reads x, y and two bits an element, nothing in between: with an
activation that is linear on each side of 0, dy · y is the derivative d(v) times v wherever y is not
clamped, so the gradients of scale and strength follow from three sums over the pixels (PERF §3.3):

    sum d(v) · u = (sum dy · y - strength · sum d(v) · noise - b · sum d(v)) / scale

A gradient that is recorded (`create_graph`) is composed of differentiable operators instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from .. import backends
from ..activations import ACTIVATIONS
from ..backends import cpu
from ..backends.choice import FORWARD, WEIGHT_GRADIENT, ConvClass, own_kernel
from ..backends.geometry import Fir
from ..reference.bias_act import Epilogue
from ..reference.upfirdn2d import (
    filter_size,
    memory_format_of,
    pad_or_crop,
    resampled_conv2d,
)
from ..weight_gradients import weight_gradients_skipped
from . import epilogue as epilogue_ops
from . import fir as fir_ops
from ._library import (
    accumulation_dtype,
    define,
    geometry,
    mask_size,
    needed_gradients,
    operand,
    tail,
    tensor_positions,
)
from .epilogue import Masked, apply_epilogue, kernel_noise

FEW_CHANNELS = 8


def _kernel_size(w: torch.Tensor) -> tuple[int, int]:
    """(kw, kh)"""
    return w.shape[3], w.shape[2]


def _image_size(x: torch.Tensor) -> tuple[int, int]:
    """(H, W)"""
    return x.shape[2], x.shape[3]


def _geometry(up: int, down: int, padding: list[int], correlate: bool) -> Fir:
    return Fir.of((up, up), (down, down), padding, correlate, 1.0)


def _arguments(conv: Fir) -> tuple[int, int, list[int], bool]:
    return conv.up_x, conv.down_x, [conv.x0, conv.x1, conv.y0, conv.y1], conv.flip_filter


def _image(x: torch.Tensor, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """Room for a result in x's memory format."""
    return torch.empty(
        (x.shape[0], channels, *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format_of(x),
    )


def _output(x: torch.Tensor, w: torch.Tensor, conv: Fir) -> torch.Tensor:
    return _image(x, w.shape[0], conv.output_size(*_image_size(x), _kernel_size(w)))


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=memory_format_of(x))


def _scaled(x: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    return x * pre.to(x.dtype)[:, :, None, None]


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """A coefficient of 0 comes from an energy that overflowed, and has no gradient."""
    return torch.where(scale == 0, 1, scale)


def _planes(x: torch.Tensor) -> bool:
    return x.is_contiguous()


def _multiplies_well(x: torch.Tensor) -> bool:
    """Whether a product of matrices was measured to beat oneDNN's convolution."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _is_product(x: torch.Tensor, weight_shape: torch.Size, conv: Fir) -> bool:
    """Whether C is one of matrices, of pixels and few channels (from or to an image), on a CPU:
    bound by memory, and oneDNN would first write x in an order of its own."""
    o, i, kh, kw = weight_shape
    whole = conv.up_x == conv.down_x == kw == kh == 1 and not any(_arguments(conv)[2])
    return whole and min(o, i) <= FEW_CHANNELS and _multiplies_well(x)


@torch.no_grad()  # an exported program calls the operators alone, where PyTorch still records
def _product(x: torch.Tensor, w: torch.Tensor, pre: torch.Tensor | None) -> torch.Tensor:
    """C(pre ⊙ x), with a weight for each sample and so without a scaled image."""
    w = w[:, :, 0, 0].expand(x.shape[0], -1, -1)
    w = w if pre is None else w * pre.to(w.dtype)[:, None]
    y = cpu.fresh(_image(x, w.shape[1], _image_size(x)))
    if _planes(x):
        torch.bmm(w, x.flatten(2), out=y.flatten(2))
    else:
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        torch.bmm(pixels, w.transpose(1, 2), out=y.permute(0, 2, 3, 1).flatten(1, 2))
    return y


def _by_pytorch(
    x: torch.Tensor, w: torch.Tensor, conv: Fir, pre: torch.Tensor | None
) -> torch.Tensor:
    """C(pre ⊙ x). One image may scale whichever is smaller, the image or the weight."""
    if _is_product(x, w.shape, conv) and (_planes(x) or w.shape[0] <= FEW_CHANNELS):
        return _product(x, w, pre)
    if pre is not None:
        if x.shape[0] == 1 and w.numel() < x.numel():
            w = w * pre[0].to(w.dtype)[:, None, None]
        else:
            x = _scaled(x, pre)
    return resampled_conv2d(x, w, conv).contiguous(memory_format=memory_format_of(x))


def _weight_gradient_by_product(
    x: torch.Tensor, dy: torch.Tensor, kernel: tuple[int, int], down: int, padding: tuple[int, int]
) -> torch.Tensor:
    """dy times the patches of x, where these are smaller than the weight: oneDNN would spend most
    of its time on an order of its own for the weight."""
    (kw, kh), channels = kernel, (dy.shape[1], x.shape[1])
    patches = F.unfold(x, (kh, kw), padding=padding, stride=down)
    rows = dy.transpose(0, 1).flatten(1)
    return (rows @ patches.transpose(1, 2).flatten(0, 1)).reshape(*channels, kh, kw)


def _weight_gradient_by_pytorch(
    x: torch.Tensor, dy: torch.Tensor, kernel: tuple[int, int], conv: Fir
) -> torch.Tensor:
    if conv.up_x > 1:
        # <dy, C(x)> = <C'(dy), x>: the same sum with the parts of x and dy exchanged.
        adjoint = conv.adjoint(*_image_size(x), kernel)
        return _weight_gradient_by_pytorch(dy, x, kernel, adjoint).transpose(0, 1)
    _, down, (x0, x1, y0, y1), correlate = _arguments(conv)
    symmetric = x0 == x1 >= 0 and y0 == y1 >= 0
    x = x if symmetric else pad_or_crop(x, x0, x1, y0, y1)
    few_pixels = dy.shape[0] * dy.shape[2] * dy.shape[3] < dy.shape[1]
    if few_pixels and _multiplies_well(x):
        dw = _weight_gradient_by_product(x, dy, kernel, down, (y0, x0) if symmetric else (0, 0))
        return dw if correlate else dw.flip((2, 3))
    dw = conv2d_weight(
        x,
        [dy.shape[1], x.shape[1], kernel[1], kernel[0]],
        dy,
        stride=down,
        padding=(y0, x0) if symmetric else 0,
    )
    return dw if correlate else dw.flip((2, 3))


def _own_kernel(
    direction: str,
    x: torch.Tensor,
    out_channels: int,
    kernel_size: tuple[int, int],
    conv: Fir,
    backend: str,
) -> bool:
    if not x.numel():
        return False
    call = ConvClass.of(direction, x, out_channels, kernel_size, conv)
    return own_kernel(backend, backends.BACKENDS[backend], call, x.device)


def _linear(x, w, pre, up, down, padding, correlate, backend):
    conv = _geometry(up, down, padding, correlate)
    x = _dense(x)
    if not _own_kernel(FORWARD, x, w.shape[0], _kernel_size(w), conv, backend):
        return _by_pytorch(x, w, conv, pre)
    y = _output(x, w, conv)
    pre = None if pre is None else operand(pre, x, *pre.shape)
    backends.BACKENDS[backend].conv2d_forward(x, w, conv, y, pre=pre)
    return y


def _linear_fake(x, w, pre, up, down, padding, correlate, backend):
    return _output(x, w, _geometry(up, down, padding, correlate))


def _weight_gradient(x, dy, pre, kernel, up, down, padding, correlate, backend):
    conv = _geometry(up, down, padding, correlate)
    kernel_size = (kernel[0], kernel[1])
    dw = torch.empty(
        (dy.shape[1], x.shape[1], kernel[1], kernel[0]),
        dtype=accumulation_dtype(x.dtype),
        device=x.device,
    )
    if not x.numel():
        return dw.zero_().to(x.dtype)
    x, dy = _dense(x), _dense(dy)
    if _own_kernel(WEIGHT_GRADIENT, x, dy.shape[1], kernel_size, conv, backend):
        pre = None if pre is None else operand(pre, x, *pre.shape)
        backends.BACKENDS[backend].conv2d_weight_gradient(x, dy, conv, dw, pre=pre)
        return dw.to(x.dtype)
    if _is_product(x, dw.shape, conv) and _planes(x) and _planes(dy):
        each = torch.bmm(dy.flatten(2), x.flatten(2).transpose(1, 2))
        each = each if pre is None else each * pre.to(each.dtype)[:, None]
        return each.sum(0)[:, :, None, None]
    if pre is None:
        return _weight_gradient_by_pytorch(x, dy, kernel_size, conv).contiguous()
    if x.shape[0] == 1 and dw.numel() < x.numel():
        dw = _weight_gradient_by_pytorch(x, dy, kernel_size, conv)
        return (dw * pre[0].to(dw.dtype)[:, None, None]).contiguous()
    return _weight_gradient_by_pytorch(_scaled(x, pre), dy, kernel_size, conv).contiguous()


def _weight_gradient_fake(x, dy, pre, kernel, up, down, padding, correlate, backend):
    return x.new_empty((dy.shape[1], x.shape[1], kernel[1], kernel[0]))


def _with_epilogue(
    x, w, pre, up, down, padding, correlate,
    f, fir_up, fir_padding, fir_flip, fir_gain,
    scale, noise, strength, b, act, alpha, gain, clamp, save_mask, backend,
):  # fmt: skip
    conv = _geometry(up, down, padding, correlate)
    fir = None if fir_padding is None else Fir.of(fir_up, (1, 1), fir_padding, fir_flip, fir_gain)
    run = backends.BACKENDS[backend]
    x = _dense(x)
    operands = (scale, noise, strength, b)
    constants = (act, alpha, gain, clamp)
    by_kernel = fir is None or _is_one_convolution(conv, _kernel_size(w), fir)
    if by_kernel:
        whole, taps = conv, _kernel_size(w)
        if fir is not None:
            whole, taps = _composed_geometry(conv, taps, f, fir)
        y = _image(x, w.shape[0], whole.output_size(*_image_size(x), taps))
        by_kernel = fir_ops.whole_units(y) or not save_mask
        by_kernel = by_kernel and _own_kernel(FORWARD, x, w.shape[0], taps, whole, backend)
    if fir is not None and not by_kernel:
        u = _linear(x, w, pre, up, down, padding, correlate, backend)
        return fir_ops.with_epilogue(
            u, f, *fir.arguments(), *operands, None, *constants, save_mask, backend
        )

    if not by_kernel:
        y = _by_pytorch(x, w, conv, pre)
    elif fir is not None:
        w = _composed_weight(w, conv, f, fir)
    mask = x.new_empty(mask_size(y.numel()) if save_mask else 0, dtype=torch.uint8)
    if not y.numel():
        return y, mask
    walked = geometry(y, 1, True)
    end = tail(y, *operands, *constants)
    saved = mask if save_mask else None
    if by_kernel:
        pre = None if pre is None else operand(pre, x, *pre.shape)
        run.conv2d_forward(x, w, whole, y, pre=pre, mask=saved, geometry=walked, tail=end)
    else:
        run.epilogue_forward(y, y, saved, walked, end)
    return y, mask


def _is_one_convolution(conv: Fir, kernel_size: tuple[int, int], fir: Fir) -> bool:
    """The filter sees zeros around the convolution's output, so that has to end where it is 0."""
    kw, kh = kernel_size
    full = conv.x0 >= kw - 1 and conv.x1 >= kw - conv.up_x
    full = full and conv.y0 >= kh - 1 and conv.y1 >= kh - conv.up_y
    return full and conv.down_x == fir.up_x == fir.up_y == fir.down_x == fir.down_y == 1


def _composed_geometry(
    conv: Fir, kernel_size: tuple[int, int], f: torch.Tensor | None, fir: Fir
) -> tuple[Fir, tuple[int, int]]:
    """A FIR filter at the convolution's output rate after it, as one convolution with a larger
    kernel, and that kernel's size."""
    (kw, kh), (fw, fh) = kernel_size, filter_size(f)
    padding = [conv.x0 + fir.x0, conv.x1 + fir.x1, conv.y0 + fir.y0, conv.y1 + fir.y1]
    composed = _geometry(conv.up_x, conv.down_x, padding, True)
    return composed, (kw + fw - 1, kh + fh - 1)


def _composed_weight(w: torch.Tensor, conv: Fir, f: torch.Tensor | None, fir: Fir) -> torch.Tensor:
    """The kernel of it: w and the filter, convolved."""
    if f is None:
        f = w.new_ones(1, 1)
    f = (f if f.ndim == 2 else f.outer(f)).to(w.dtype) * fir.gain
    taps = f.flip((0, 1)) if fir.flip_filter else f
    o, i, kh, kw = w.shape
    w = w if conv.flip_filter else w.flip((2, 3))
    each = torch.eye(kh * kw, dtype=w.dtype, device=w.device).reshape(-1, 1, kh, kw)
    fh, fw = f.shape
    basis = F.conv2d(each, taps[None, None], padding=(fh - 1, fw - 1))
    return (w.reshape(o * i, kh * kw) @ basis.flatten(1)).reshape(o, i, *basis.shape[2:])


def _with_epilogue_fake(
    x, w, pre, up, down, padding, correlate,
    f, fir_up, fir_padding, fir_flip, fir_gain,
    scale, noise, strength, b, act, alpha, gain, clamp, save_mask, backend,
):  # fmt: skip
    y = _output(x, w, _geometry(up, down, padding, correlate))
    if fir_padding is not None:
        fir = Fir.of(fir_up, (1, 1), fir_padding, fir_flip, fir_gain)
        y = _image(x, y.shape[1], fir.output_size(*_image_size(y), filter_size(f)))
    return y, x.new_empty(mask_size(y.numel()) if save_mask else 0, dtype=torch.uint8)


_CONV = "int up, int down, SymInt[] padding, bool correlate"

linear_op = define(
    "conv2d",
    f"(Tensor x, Tensor w, Tensor? pre, {_CONV}, str backend) -> Tensor",
    _linear,
    _linear_fake,
)
weight_gradient_op = define(
    "conv2d_weight_gradient",
    f"(Tensor x, Tensor dy, Tensor? pre, SymInt[] kernel, {_CONV}, str backend) -> Tensor",
    _weight_gradient,
    _weight_gradient_fake,
)
epilogue_op = define(
    "conv2d_epilogue",
    f"(Tensor x, Tensor w, Tensor? pre, {_CONV}, Tensor? f, int[] fir_up, SymInt[]? fir_padding, "
    "bool fir_flip, float fir_gain, Tensor? scale, Tensor? noise, Tensor? strength, Tensor? b, "
    "int act, float alpha, float gain, float clamp, bool save_mask, str backend) "
    "-> (Tensor, Tensor)",
    _with_epilogue,
    _with_epilogue_fake,
)


class _Conv2d(torch.autograd.Function):
    """C(pre ⊙ x; w), of any order. w is a weight, or where is_weight is False a cotangent."""

    @staticmethod
    def forward(ctx, x, w, pre, conv, backend, is_weight):
        ctx.save_for_backward(x, w, pre)
        ctx.conv = conv
        ctx.backend = backend
        ctx.is_weight = is_weight
        ctx.positions = tensor_positions(x, w, pre)
        return linear_op(x, w, pre, *_arguments(conv), backend)

    @staticmethod
    def backward(ctx, dy):
        x, w, pre = ctx.saved_tensors
        needs_x, needs_w, needs_pre = needed_gradients(ctx, ctx.positions)[:3]
        dx = dw = d_pre = None
        if needs_x or needs_pre:
            dx = _input_gradient(dy, w, x.shape, ctx.conv, ctx.backend, is_weight=ctx.is_weight)
            dx, d_pre = _through_scale(dx, x, pre, ctx.backend)
        if needs_w and not (ctx.is_weight and weight_gradients_skipped()):
            dw = _WeightGradient.apply(x, dy, pre, _kernel_size(w), ctx.conv, ctx.backend)
        return dx, dw, d_pre, None, None, None


class _WeightGradient(torch.autograd.Function):
    """The gradient of <dy, C(pre ⊙ x; w)> by w, of any order."""

    @staticmethod
    def forward(ctx, x, dy, pre, kernel, conv, backend):
        ctx.save_for_backward(x, dy, pre)
        ctx.conv = conv
        ctx.backend = backend
        ctx.positions = tensor_positions(x, dy, pre)
        return weight_gradient_op(x, dy, pre, list(kernel), *_arguments(conv), backend)

    @staticmethod
    def backward(ctx, h):
        x, dy, pre = ctx.saved_tensors
        needs_x, needs_dy, needs_pre = needed_gradients(ctx, ctx.positions)[:3]
        dx = d_dy = d_pre = None
        if needs_x or needs_pre:
            dx = _input_gradient(dy, h, x.shape, ctx.conv, ctx.backend, is_weight=False)
            dx, d_pre = _through_scale(dx, x, pre, ctx.backend)
        if needs_dy:
            d_dy = _Conv2d.apply(x, h, pre, ctx.conv, ctx.backend, False)
        return dx, d_dy, d_pre, None, None, None


def _input_gradient(dy, w, shape, conv, backend, *, pre=None, is_weight=True):
    adjoint = conv.adjoint(*shape[2:], _kernel_size(w))
    return _Conv2d.apply(dy, w.transpose(0, 1), pre, adjoint, backend, is_weight)


def _through_scale(d, x, pre, backend):
    """The gradients of x and pre from the one of pre ⊙ x."""
    if pre is None:
        return d, None
    dx, d_pre = _ScaledDot.apply(d, x, pre, backend)
    return dx, d_pre.to(pre.dtype)


class _ScaledDot(torch.autograd.Function):
    """(scale ⊙ a, sum of a ⊙ b over the pixels), in one pass: any order."""

    @staticmethod
    def forward(ctx, a, b, scale, backend):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, scale)
        ctx.backend = backend
        a = _dense(a)
        scaled, moments = epilogue_ops.backward_op(
            a, b, None, None, scale, a.stride(), 1.0, 1.0, True, backend
        )
        return scaled, moments[1]

    @staticmethod
    def backward(ctx, h, g):
        a, b, scale = ctx.saved_tensors
        da = db = d_scale = None
        if h is not None:
            da, d_scale = _through_scale(h, a, scale, ctx.backend)
        if g is not None:
            g = g.to(a.dtype)[:, :, None, None]
            da = b * g if da is None else torch.addcmul(da, b, g)
            db = a * g
        return da, db, d_scale, None


class _Dot(torch.autograd.Function):
    """The sum of a ⊙ b over the pixels, [N, C], in the accumulation type: any order."""

    @staticmethod
    def forward(ctx, a, b, backend):
        ctx.save_for_backward(a, b)
        ctx.backend = backend
        _, moments = epilogue_ops.backward_op(
            a, b, None, None, None, a.stride(), 1.0, 1.0, False, backend
        )
        return moments[1]

    @staticmethod
    def backward(ctx, h):
        a, b = ctx.saved_tensors
        da = _scaled(b, h) if ctx.needs_input_grad[0] else None
        return da, _scaled(a, h) if ctx.needs_input_grad[1] else None, None


class _Layer(torch.autograd.Function):
    """E(L(pre ⊙ x)) for piecewise-linear activations."""

    @staticmethod
    def forward(
        ctx, x, w, pre, scale, noise, strength, b, f, conv, fir,
        act, negative_slope, alpha, gain, clamp, backend,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        save_mask = negative_slope != 1 or clamp != math.inf
        y, mask = _run(
            x, w, pre, conv, f, fir, scale, noise, strength, b, act, alpha, gain, clamp,
            save_mask, backend,
        )  # fmt: skip
        ctx.mark_non_differentiable(mask)
        sums = ctx.needs_input_grad[3] or ctx.needs_input_grad[5]
        ctx.save_for_backward(
            x, w, pre, scale, noise, strength, b, f,
            y if sums else None, mask if save_mask else None,
        )  # fmt: skip
        ctx.positions = tensor_positions(x, w, pre, scale, noise, strength, b)
        ctx.stride = y.stride()
        ctx.linear = (conv, fir)
        ctx.constants = (negative_slope, gain, backend)
        return y, mask

    @staticmethod
    def backward(ctx, dy, _mask):
        if dy is None:
            return (None,) * 16
        needs = needed_gradients(ctx, ctx.positions)[:7]
        needs[1] = needs[1] and not weight_gradients_skipped()
        # The gradient of noise itself needs d(v) element by element.
        composed = torch.is_grad_enabled() or needs[4]
        gradients = _composed_backward if composed else _fused_backward
        return (*gradients(ctx, dy, needs), *(None,) * 9)


def _fused_backward(ctx, dy, needs):
    x, w, pre, scale, noise, strength, b, f, y, mask = ctx.saved_tensors
    needs_x, needs_w, needs_pre, needs_scale, _, needs_strength, needs_b = needs
    conv, fir = ctx.linear
    negative_slope, gain, backend = ctx.constants
    sums = needs_scale or needs_strength
    through = needs_x or needs_pre or needs_w
    dx = dw = d_pre = d_scale = d_strength = d_b = None

    def reduced(with_dx):
        return epilogue_ops.backward_op(
            dy, y if needs_scale else None, mask, noise if sums else None, scale, ctx.stride,
            negative_slope, gain, with_dx, backend,
        )  # fmt: skip

    moments: Any = None
    total: Any = None
    if fir is None:
        du, moments = reduced(through)
    else:
        size = conv.output_size(*_image_size(x), _kernel_size(w))
        adjoint = fir.adjoint(*size, filter_size(f)).arguments()
        du = None
        if through:
            du, total = fir_ops.masked_op(
                dy, f, *adjoint, mask, scale, ctx.stride, negative_slope, gain,
                needs_b and not sums, backend,
            )  # fmt: skip
        if sums or (needs_b and not through):
            _, moments = reduced(False)

    if needs_b:
        d_b = (total if moments is None else moments[0].sum(0)).to(b.dtype)
    if needs_strength:
        d_strength = moments[2].sum().reshape(strength.shape).to(strength.dtype)
    if needs_scale:
        d_scale = moments[1]
        if noise is not None:
            part = moments[2] if strength is None else moments[2] * strength.to(moments.dtype)
            d_scale = d_scale - part
        if b is not None:
            d_scale = d_scale - moments[0] * b.to(moments.dtype)
        d_scale = (d_scale / _nonzero(scale)).to(scale.dtype)

    if needs_x or needs_pre:
        adjoint = _arguments(conv.adjoint(*_image_size(x), _kernel_size(w)))
        dx = linear_op(du, w.transpose(0, 1), None, *adjoint, backend)
        if pre is not None:
            dx, sums_of_x = epilogue_ops.backward_op(
                dx, x if needs_pre else None, None, None, pre, dx.stride(), 1.0, 1.0,
                needs_x, backend,
            )  # fmt: skip
            d_pre = sums_of_x[1].to(pre.dtype) if needs_pre else None
    if needs_w:
        kernel = list(_kernel_size(w))
        dw = weight_gradient_op(x, du, pre, kernel, *_arguments(conv), backend)
    return (dx if needs_x else None), dw, d_pre, d_scale, None, d_strength, d_b


def _composed_backward(ctx, dy, needs):
    x, w, pre, scale, noise, strength, b, f, y, mask = ctx.saved_tensors
    needs_x, needs_w, needs_pre, needs_scale, needs_noise, needs_strength, needs_b = needs
    conv, fir = ctx.linear
    negative_slope, gain, backend = ctx.constants
    dx = dw = d_pre = d_scale = d_noise = d_strength = d_b = None

    dv, total = Masked.apply(dy, mask, 1, ctx.stride, negative_slope, gain, needs_b, backend)
    if needs_b:
        d_b = total.to(b.dtype)
    if needs_x or needs_pre or needs_w:
        unscaled = dv
        if fir is not None:
            size = conv.output_size(*_image_size(x), _kernel_size(w))
            unscaled = fir_ops.linear(dv, f, fir.adjoint(*size, filter_size(f)), backend)
        if needs_w:
            du = unscaled if scale is None else _scaled(unscaled, scale)
            dw = _WeightGradient.apply(x, du, pre, _kernel_size(w), conv, backend)
        if needs_x or needs_pre:
            dx = _input_gradient(unscaled, w, x.shape, conv, backend, pre=scale)
            dx, d_pre = _through_scale(dx, x, pre, backend)
    if needs_scale and needs_noise:
        u = _Conv2d.apply(x, w, pre, conv, backend, True)
        u = u if fir is None else fir_ops.linear(u, f, fir, backend)
        d_scale = _Dot.apply(dv, u, backend).to(scale.dtype)
    elif needs_scale:
        # y is this node's own output: what the sum owes to x, w and the rest flows through it. What
        # it owes to b and strength cancels, up to rounding, as would that of every pixel of noise.
        kept = Masked.apply(dy, mask, 1, ctx.stride, 1.0, 1.0, False, backend)[0]
        d_scale = _Dot.apply(kept, y, backend).to(scale.dtype)
        if noise is not None:
            part = _Dot.apply(dv, noise.to(dv.dtype).expand_as(dv), backend).to(scale.dtype)
            d_scale = d_scale - (part if strength is None else part * strength)
        if b is not None:
            d_scale = d_scale - dv.sum([2, 3], dtype=scale.dtype) * b
        d_scale = d_scale / _nonzero(scale)
    if needs_noise or needs_strength:
        image = dv.sum(1, keepdim=True, dtype=noise.dtype)
        if needs_noise:
            d_noise = image if strength is None else image * strength
            d_noise = d_noise.sum_to_size(noise.shape)
        if needs_strength:
            d_strength = (image * noise).sum().reshape(strength.shape).to(strength.dtype)
    return dx, dw, d_pre, d_scale, d_noise, d_strength, d_b


def _run(
    x, w, pre, conv, f, fir, scale, noise, strength, b, act, alpha, gain, clamp, save_mask, backend
):
    after = ([1, 1], None, False, 1.0)
    if fir is not None:
        up, _, padding, flip, fir_gain = fir.arguments()
        after = (up, padding, flip, fir_gain)
    return epilogue_op(
        x, w, pre, *_arguments(conv), f, *after, scale, noise, strength, b, act, alpha, gain, clamp,
        save_mask, backend,
    )  # fmt: skip


def conv2d(x: torch.Tensor, w: torch.Tensor, conv: Fir, backend: str) -> torch.Tensor:
    """C(x; w) on a kernel backend. Arguments are validated by the callers."""
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return _Conv2d.apply(x, w, None, conv, backend, True)
    return linear_op(x, w, None, *_arguments(conv), backend)


def conv2d_epilogue(
    x: torch.Tensor,  # [N, I, H, W]
    w: torch.Tensor,  # [O, I, kh, kw]
    conv: Fir,
    end: Epilogue,
    backend: str,
    *,
    pre: torch.Tensor | None = None,  # [N, I]
    f: torch.Tensor | None = None,  # [fh, fw] or [taps]
    fir: Fir | None = None,
) -> torch.Tensor:
    """E(L(pre ⊙ x)) on a kernel backend, in x's memory format. Arguments are validated by the
    callers."""
    scale, noise, b, act, alpha, gain, clamp, strength = end
    row = ACTIVATIONS[act]
    alpha = row.alpha if alpha is None else alpha
    gain = row.gain if gain is None else gain
    size = conv.output_size(*_image_size(x), _kernel_size(w))
    size = size if fir is None else fir.output_size(*size, filter_size(f))
    known_noise = noise is None or kernel_noise(noise, x.shape[0], size)
    if row.curved or not known_noise or (fir is not None and (fir.down_x, fir.down_y) != (1, 1)):
        x = x if pre is None else _scaled(x, pre)
        y = conv2d(x, w, conv, backend)
        return apply_epilogue(y, end, backend=backend, f=f, fir=fir)

    if pre is None and fir is None and end.idle:
        return conv2d(x, w, conv, backend)
    b = None if b is None else b.to(x.dtype)
    limit = math.inf if clamp is None else clamp
    tensors = (x, w, pre, scale, noise, strength, b)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        slope = row.negative_slope(alpha)
        constants = (row.code, slope, alpha, gain, limit, backend)
        return _Layer.apply(*tensors, f, conv, fir, *constants)[0]
    return _run(
        x, w, pre, conv, f, fir, scale, noise, strength, b, row.code, alpha, gain, limit, False,
        backend,
    )[0]  # fmt: skip
