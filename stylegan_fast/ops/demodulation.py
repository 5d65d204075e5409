"""The demodulation coefficients of modulated_conv2d: one kernel, and a few products backward."""

from __future__ import annotations

import torch

from .. import backends
from ..reference.modulated_conv2d import DEMODULATION_EPS
from ..reference.modulated_conv2d import demodulation as reference_demodulation
from ..reference.upfirdn2d import memory_format_of
from ..weight_gradients import weight_gradients_skipped
from ._library import define, needed_gradients, tensor_positions


def demodulation(
    weight: torch.Tensor,  # [O, I, kh, kw]
    styles: torch.Tensor,  # [N, I], of the same dtype
    eps: float = DEMODULATION_EPS,
    *,
    backend: str,
) -> torch.Tensor:  # [N, O]
    """d[n,o] = (sum over i of styles[n,i]^2 * energy[o,i] + eps)^-1/2

        energy[o,i] = sum over ky, kx of weight[o,i,ky,kx]^2

    Of any order. The backward pass keeps the arguments, d and the energy; a dtype for which the
    backend has no kernel is the reference's.
    """
    if weight.dtype not in backends.BACKENDS[backend].dtypes():
        return reference_demodulation(weight, styles, eps)
    if torch.is_grad_enabled() and (weight.requires_grad or styles.requires_grad):
        return _Demodulation.apply(weight, styles, eps, backend)[0]
    return demodulation_op(weight, styles, eps, backend)[0]


def _forward(weight, styles, eps, backend):
    d, energy = _forward_fake(weight, styles, eps, backend)
    backends.BACKENDS[backend].demodulation(
        weight.contiguous(memory_format=memory_format_of(weight)),
        styles.contiguous(),
        energy,
        d,
        eps,
    )
    return d, energy


def _forward_fake(weight, styles, eps, backend):
    d = styles.new_empty((styles.shape[0], weight.shape[0]))
    return d, weight.new_empty(weight.shape[:2])


demodulation_op = define(
    "demodulation",
    "(Tensor weight, Tensor styles, float eps, str backend) -> (Tensor d, Tensor energy)",
    _forward,
    _forward_fake,
)


class _Demodulation(torch.autograd.Function):
    """Both results have gradients, so that a recorded backward pass is made of them as they are."""

    @staticmethod
    def forward(ctx, weight, styles, eps, backend):
        ctx.set_materialize_grads(False)
        d, energy = demodulation_op(weight, styles, eps, backend)
        ctx.save_for_backward(weight, styles, d, energy)
        ctx.positions = tensor_positions(weight, styles)
        return d, energy

    @staticmethod
    def backward(ctx, h, h_energy):
        weight, styles, d, energy = ctx.saved_tensors
        needs_weight, needs_styles = needed_gradients(ctx, ctx.positions)[:2]
        needs_weight = needs_weight and not weight_gradients_skipped()
        d_weight = d_styles = None
        twice = None if h_energy is None else 2 * h_energy  # the gradient of the energy, doubled
        if h is not None:
            v = -h * d.pow(3)  # twice that of the sum below the root
            if needs_styles:
                d_styles = styles * (v @ energy)
            if needs_weight:
                product = v.t() @ styles.square()
                twice = product if twice is None else twice + product
        if needs_weight and twice is not None:
            d_weight = weight * twice[:, :, None, None]
        return d_weight, d_styles, None, None
