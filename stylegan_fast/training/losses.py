"""Adversarial losses, as functions of the discriminator's logits.

d_loss(real_logits, fake_logits) and g_loss(fake_logits) are scalars to be minimised, the means over
the samples, finite wherever the logits are, which may have any shape. Differentiable to any order.
The first two are Goodfellow et al.'s (Generative Adversarial Nets, 2014), hinge is Lim and Ye's
(Geometric GAN, 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import relu, softplus


class AdversarialLoss(NamedTuple):
    d_loss: Callable[[Tensor, Tensor], Tensor]
    g_loss: Callable[[Tensor], Tensor]


def cross_entropy_d_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[-log σ(real)] + E[-log(1 - σ(fake))], σ the logistic function: binary cross-entropy with
    the labels 1 and 0. softplus(x) = log(1 + eˣ) = -log σ(-x)."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def non_saturating_g_loss(fake_logits: Tensor) -> Tensor:
    """E[-log σ(fake)]."""
    return softplus(-fake_logits).mean()


def minimax_g_loss(fake_logits: Tensor) -> Tensor:
    """E[log(1 - σ(fake))], what the discriminator maximises."""
    return -softplus(fake_logits).mean()


def hinge_d_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[max(0, 1 - real)] + E[max(0, 1 + fake)]."""
    return relu(1 - real_logits).mean() + relu(1 + fake_logits).mean()


def hinge_g_loss(fake_logits: Tensor) -> Tensor:
    """E[-fake]."""
    return -fake_logits.mean()


LOSSES = {
    "logistic": AdversarialLoss(cross_entropy_d_loss, non_saturating_g_loss),
    "minimax": AdversarialLoss(cross_entropy_d_loss, minimax_g_loss),
    "hinge": AdversarialLoss(hinge_d_loss, hinge_g_loss),
}
