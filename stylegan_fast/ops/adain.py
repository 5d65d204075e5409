"""Adaptive instance normalisation after noise, bias and activation.

Two kernels serve the first order (csrc/adain.h): both go over the pixels of a channel twice, first
for its statistics, then to apply them, and compute the activation anew on the way. A gradient that
is being recorded is composed of differentiable operators instead.
"""

from __future__ import annotations

import math

import torch

from .. import backends
from .._checks import check_device, check_number, check_tensor
from ..activations import ACTIVATIONS, activation
from ..backends import select
from ..backends.geometry import Tail
from ..reference.adain import adain as reference_adain
from ..reference.adain import styled, widened
from ._library import accumulation_dtype, define, geometry, laid_out, noise_operand, operand
from .bias_act import bias_act
from .conv2d_resample import check_operand
from .epilogue import _output_like, kernel_noise
from .modulated_conv2d import _check_broadcastable
from .upfirdn2d import check_image


def adain(
    x: torch.Tensor,  # [N, C, H, W]
    styles: torch.Tensor,  # [N, 2 C]
    eps: float = 1e-8,
    *,
    noise: torch.Tensor | None = None,  # broadcasts to x
    noise_strength: torch.Tensor | None = None,  # [] or [C]
    b: torch.Tensor | None = None,  # [C]
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """y[n,c] = (styles[n,c] + 1) * (u[n,c] - mean) / sqrt(variance + eps) + styles[n,C+c]

        u = bias_act(x + noise_strength * noise, b, act, alpha, gain, clamp)

    with the mean and the variance (the biased one) of u[n,c] over its pixels.

    Args:
        x: `[N, C, H, W]`, float64, float32, float16 or bfloat16; N may be 0.
        styles: `[N, 2 C]`, what to add to a scale of 1 and then the shifts.
        eps: > 0. A channel without variance becomes its shift.
        noise: anything that broadcasts to x, such as `[N, 1, H, W]` or `[H, W]`, or None.
        noise_strength: `[]`, or `[C]` as StyleGAN has it, or None, which is 1.
        b: `[C]` or None; act, alpha, gain, clamp: as in `bias_act`.
        backend: None chooses; else 'reference', 'cpu', 'triton' or 'cuda'.

    Returns:
        Shape, dtype and memory format (NCHW or channels_last) of x. Everything is computed in
        float32, of float64 in float64, and rounded once; styles, noise, noise_strength and b may
        have other dtypes than x.

    Gradients: first and second order with respect to x, styles, noise, noise_strength and b, any
    order for linear, relu and lrelu, as in `bias_act`. The backward pass keeps x, and the mean and
    the deviation of each channel.

    Autocast: computes and returns in x's dtype, as without.

    Raises:
        TypeError: x, styles, noise, noise_strength or b is not a floating-point tensor, or eps,
            alpha, gain or clamp is not a number. ValueError: wrong shape or device, eps <= 0,
            clamp < 0. KeyError: unknown act.
        RuntimeError: the explicitly chosen backend cannot run this.

    The end of a layer of StyleGAN (Karras et al., "A Style-Based Generator Architecture for
    Generative Adversarial Networks", 2019), whose styles also are differences from a scale of 1.
    """
    check_image("x", x)
    n, channels, height, width = x.shape
    check_operand("styles", styles, x, (n, 2 * channels))
    eps = check_number("eps", eps, minimum=0)
    if eps == 0:
        raise ValueError(f"eps must be greater than 0, got {eps=}")
    if noise is not None:
        _check_broadcastable("noise", noise, x, (n, channels, height, width))
    if noise_strength is not None:
        check_tensor("noise_strength", noise_strength)
        if tuple(noise_strength.shape) not in ((), (channels,)):
            raise ValueError(
                f"noise_strength must have the shape () or ({channels},) for "
                f"x.shape={tuple(x.shape)}, got noise_strength.shape={tuple(noise_strength.shape)}"
            )
        check_device("noise_strength", noise_strength, x)
        if noise is None:
            raise ValueError("noise_strength needs noise, got noise=None")
    if b is not None:
        check_operand("b", b, x, (channels,))
    row = activation(act)
    alpha = row.alpha if alpha is None else check_number("alpha", alpha)
    gain = row.gain if gain is None else check_number("gain", gain)
    if clamp is not None:
        clamp = check_number("clamp", clamp, minimum=0)

    name = select("adain", x, backend)
    if name == "reference":
        return reference_adain(x, styles, eps, noise, noise_strength, b, act, alpha, gain, clamp)
    if noise is not None and not kernel_noise(noise, n, (height, width)):
        x = widened(x, noise, noise_strength).to(x.dtype)
        noise = noise_strength = None
    tensors = (x, styles, noise, noise_strength, b)
    constants = (act, alpha, gain, math.inf if clamp is None else clamp, eps, name)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Adain.apply(*tensors, *constants)[0]
    return forward_op(*tensors, *constants)[0]


def _tail(x, noise, strength, b, act, alpha, gain, clamp) -> Tail:
    """As the kernels of this op take it: the strength [1] or [C], and b in the accumulation
    type."""
    operands = (noise_operand(noise, x), operand(strength, x, -1), operand(b, x, -1))
    return Tail(None, *operands, ACTIVATIONS[act].code, alpha, gain, clamp)


def _forward(x, styles, noise, strength, b, act, alpha, gain, clamp, eps, backend):
    y, statistics = _forward_fake(
        x, styles, noise, strength, b, act, alpha, gain, clamp, eps, backend
    )
    if x.numel():
        backends.BACKENDS[backend].adain_forward(
            laid_out(x, y),
            y,
            statistics,
            operand(styles, x, *styles.shape),
            geometry(y, 1, True),
            _tail(x, noise, strength, b, act, alpha, gain, clamp),
            eps,
        )
    return y, statistics


def _forward_fake(x, styles, noise, strength, b, act, alpha, gain, clamp, eps, backend):
    statistics = x.new_empty((2, *x.shape[:2]), dtype=accumulation_dtype(x.dtype))
    return _output_like(x, True), statistics


def _backward(dy, x, statistics, styles, noise, strength, b, act, alpha, gain, clamp, backend):
    dx, d_styles, sums = _backward_fake(
        dy, x, statistics, styles, noise, strength, b, act, alpha, gain, clamp, backend
    )
    if x.numel():
        backends.BACKENDS[backend].adain_backward(
            laid_out(dy, dx),
            laid_out(x, dx),
            statistics,
            operand(styles, x, *styles.shape),
            dx,
            d_styles,
            sums,
            geometry(dx, 1, True),
            _tail(x, noise, strength, b, act, alpha, gain, clamp),
        )
    return dx, d_styles, sums


def _backward_fake(dy, x, statistics, styles, noise, strength, b, act, alpha, gain, clamp, backend):
    d_styles = x.new_empty(styles.shape, dtype=accumulation_dtype(x.dtype))
    return _output_like(x, True), d_styles, torch.empty_like(statistics)


_OPERANDS = "Tensor styles, Tensor? noise, Tensor? strength, Tensor? b, "
_CONSTANTS = "str act, float alpha, float gain, float clamp, "

forward_op = define(
    "adain_forward",
    f"(Tensor x, {_OPERANDS}{_CONSTANTS}float eps, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = define(
    "adain_backward",
    f"(Tensor dy, Tensor x, Tensor statistics, {_OPERANDS}{_CONSTANTS}str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Adain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, styles, noise, strength, b, act, alpha, gain, clamp, eps, backend):
        ctx.set_materialize_grads(False)
        operands = (x, styles, noise, strength, b)
        y, statistics = forward_op(*operands, act, alpha, gain, clamp, eps, backend)
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(*operands, statistics)
        ctx.constants = (act, alpha, gain, clamp)
        ctx.eps = eps
        ctx.backend = backend
        return y, statistics

    @staticmethod
    def backward(ctx, dy, _statistics):
        if dy is None:
            return (None,) * 11
        *operands, statistics = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            gradients = _recorded(dy, operands, needs, ctx.constants, ctx.eps, ctx.backend)
        else:
            gradients = _computed(dy, operands, statistics, needs, ctx.constants, ctx.backend)
        return (*gradients, *(None,) * 6)


def _recorded(dy, operands, needs, constants, eps, backend):
    """The gradients, differentiable."""
    act, alpha, gain, clamp = constants
    with torch.enable_grad():
        # Views, so that a path from one operand to another is no part of this.
        x, styles, noise, strength, b = operands = [
            None if t is None else t.view_as(t) for t in operands
        ]
        v = widened(x, noise, strength)
        b = None if b is None else b.to(v.dtype)
        limit = None if clamp == math.inf else clamp
        u = bias_act(v, b, 1, act, alpha, gain, limit, backend=backend)
        y = styled(u, styles, eps).to(x.dtype)
    wanted = [t for t, needed in zip(operands, needs) if needed]
    gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(gradients) if needed else None for needed in needs]


def _computed(dy, operands, statistics, needs, constants, backend):
    x, styles, noise, strength, b = operands
    _, _, needs_noise, needs_strength, needs_b = needs
    dx, d_styles, sums = backward_op(dy, x, statistics, *operands[1:], *constants, backend)
    d_noise = d_strength = d_b = None
    if needs_noise:
        image = dx.to(sums.dtype)
        if strength is not None:
            image = image * strength.to(sums.dtype).reshape(-1, 1, 1)
        d_noise = image.sum(1, keepdim=True).sum_to_size(noise.shape).to(noise.dtype)
    if needs_strength:
        d_strength = sums[1].sum(0).sum_to_size(strength.shape).to(strength.dtype)
    if needs_b:
        d_b = sums[0].sum(0).to(b.dtype)
    return dx, d_styles.to(styles.dtype), d_noise, d_strength, d_b
