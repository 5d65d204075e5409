"""Gradient penalties of StyleGAN2's training, and how they are applied lazily.

A lazy penalty is computed in every k-th step only, as an update of its own and k times as strong
(Karras et al., Analyzing and Improving the Image Quality of StyleGAN, 2020, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..weight_gradients import no_weight_gradients


def r1_penalty(images: Tensor, logits: Tensor, gamma: float) -> Tensor:
    """gamma/2 · E‖∇ₓ Σ D(x)‖², the real images x [N, C, H, W] requiring a gradient and logits =
    D(x) (Mescheder et al., Which Training Methods for GANs do actually Converge?, 2018)."""
    with no_weight_gradients():
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gamma / 2 * gradient.square().sum(dim=[1, 2, 3]).mean()


def path_length_penalty(
    synthesis: Callable[[Tensor], Tensor],
    ws: Tensor,
    mean: Tensor,
    weight: float = 2,
    decay: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """weight · E(ℓ - a)², a = mean + decay · (E[ℓ] - mean); and that new mean a.

    ℓ = √(mean over rows of ‖Jᵀy‖²), J = ∂ synthesis(ws) / ∂ws row by row, y ~ N(0, 1) / √(H·W).
    ws [N, num_ws, w_dim] must require a gradient. No gradient flows through a.
    """
    images = synthesis(ws)
    noise = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
    with no_weight_gradients():
        (gradient,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
    lengths = gradient.square().sum(dim=2).mean(dim=1).sqrt()
    mean = mean.lerp(lengths.detach().mean(), decay)
    return weight * (lengths - mean).square().mean(), mean


def lazy_adam(lr: float, betas: tuple[float, float], interval: int) -> dict:
    """Arguments lr and betas of Adam for a network whose penalty makes k + 1 updates of every k.

    With c = k / (k + 1), lr·c and betasᶜ leave what k steps do as it was without the penalty. Where
    interval is 1 the penalty shares the main update, and c = 1.
    """
    c = interval / (interval + 1) if interval > 1 else 1
    return {"lr": lr * c, "betas": (betas[0] ** c, betas[1] ** c)}
