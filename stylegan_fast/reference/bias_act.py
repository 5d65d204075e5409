"""bias_act out of PyTorch's own operators."""

from __future__ import annotations

from typing import NamedTuple

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


class Epilogue(NamedTuple):
    """What follows a linear operator; every part is optional."""

    scale: torch.Tensor | None = None  # [N, C]
    noise: torch.Tensor | None = None  # broadcasts to [N, C, H, W]
    b: torch.Tensor | None = None  # [C]
    act: str = "linear"
    alpha: float | None = None
    gain: float | None = None
    clamp: float | None = None
    strength: torch.Tensor | None = None  # [], of the noise

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        operands = (self.scale, self.noise, self.b, self.clamp)
        linear = self.act == "linear" and self.gain in (None, 1)
        return linear and all(part is None for part in operands)


def epilogue(x: torch.Tensor, end: Epilogue) -> torch.Tensor:
    """y = bias_act(scale[n,c] * x + strength * noise, b, act, alpha, gain, clamp), `[N, C, H, W]`
    and dtype of x."""
    noise = end.noise
    if noise is not None:
        noise = (noise if end.strength is None else noise * end.strength).to(x.dtype)
    if end.scale is not None:
        scale = end.scale.to(x.dtype)[:, :, None, None]
        x = x * scale if noise is None else torch.addcmul(noise, x, scale)
    elif noise is not None:
        x = x + noise
    b = None if end.b is None else end.b.to(x.dtype)
    return bias_act(x, b, 1, end.act, end.alpha, end.gain, end.clamp)
