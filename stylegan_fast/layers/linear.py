"""The fully connected layer of the StyleGAN2 networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..activations import activation as lookup_activation
from ..ops.bias_act import bias_act


def normalize_2nd_moment(x: Tensor, eps: float = 1e-8) -> Tensor:
    """x / √(mean(x², dim=1) + eps)."""
    return x * (x.square().mean(dim=1, keepdim=True) + eps).rsqrt()


class FullyConnectedLayer(nn.Module):
    """y = act(x (weight · lr_multiplier / √in)ᵀ + bias · lr_multiplier).

    Equalised learning rate: the parameters weight [out, in] ~ N(0, 1) / lr_multiplier and
    bias [out] = bias_init are stored unscaled and scaled at run time. An activation brings its
    default gain (√2 for lrelu).

    x [..., in] -> y [..., out], in the dtype of x. Differentiable twice, as `bias_act` is; to any
    order where the activation is linear. KeyError for an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "linear",
        lr_multiplier: float = 1,
        bias_init: float = 0,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = lookup_activation(activation).name
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = x.reshape(-1, x.shape[-1]), self.weight.to(x.dtype)
        if self.bias is None:
            y = linear(rows * self.weight_gain, weight)
        else:
            bias, alpha, beta = self.bias.to(x.dtype), self.weight_gain, self.bias_gain
            y = torch.addmm(bias, rows, weight.t(), alpha=alpha, beta=beta)
        if self.activation != "linear":
            y = bias_act(y, act=self.activation)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation!r}, lr_multiplier={self.bias_gain:g}"
        )
