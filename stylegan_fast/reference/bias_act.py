"""bias_act out of PyTorch's own operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..activations import activation

_FUNCTIONS = {
    "linear": lambda v, alpha: v,
    "relu": lambda v, alpha: F.relu(v),
    "lrelu": lambda v, alpha: F.leaky_relu(v, alpha),
    "tanh": lambda v, alpha: torch.tanh(v),
    "sigmoid": lambda v, alpha: torch.sigmoid(v),
    "elu": lambda v, alpha: F.elu(v),
    "selu": lambda v, alpha: F.selu(v),
    "softplus": lambda v, alpha: F.softplus(v),
    "swish": lambda v, alpha: torch.sigmoid(v) * v,
}


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """y = clamp(gain * act(x + b; alpha), -clamp, +clamp); see `stylegan_fast.ops.bias_act`."""
    row = activation(act)
    alpha = row.alpha if alpha is None else alpha
    gain = row.gain if gain is None else gain
    y = x if b is None else x + b.reshape([-1 if axis == dim else 1 for axis in range(x.ndim)])
    y = _FUNCTIONS[act](y, alpha)
    if gain != 1:
        y = y * gain
    if clamp is not None:
        y = y.clamp(-clamp, clamp)
    return y
