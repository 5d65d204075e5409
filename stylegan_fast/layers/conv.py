"""The plain convolution layer of the StyleGAN2 networks, with optional resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..activations import activation as lookup_activation
from ..ops import setup_filter
from ..ops.conv2d_resample import conv2d_bias_act
from .checks import check_clamp


def initial_weight(
    in_channels: int, out_channels: int, kernel_size: int, channels_last: bool
) -> Tensor:
    """Weight [O, I, k, k] ~ N(0, 1) of an equalised convolution."""
    weight = torch.randn(out_channels, in_channels, kernel_size, kernel_size)
    return weight.to(memory_format=torch.channels_last) if channels_last else weight


class Conv2dLayer(nn.Module):
    """y = clamp(gain · gain_act · act(conv(x, weight / √(I·k²)) + bias), ±conv_clamp · gain).

    conv is `conv2d_resample`: FIR upsampling before, or FIR downsampling around, the convolution;
    an upsampling layer rotates its weight by 180 degrees, as the originals do. gain_act is the
    activation's default gain (√2 for lrelu).
    Parameters weight [O, I, k, k] ~ N(0, 1) and bias [O] = 0 are stored unscaled; with
    `trainable=False` they are buffers of the same names. Buffer resample_filter is float32.

    x [N, I, H, W] -> y [N, O, H·up/down, W·up/down], in the dtype and memory format of x.
    Differentiable twice. KeyError for an unknown activation.
    """

    weight: Tensor
    bias: Tensor | None
    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str = "linear",
        up: int = 1,
        down: int = 1,
        resample_filter: Sequence[float] | Tensor | None = (1, 3, 3, 1),
        conv_clamp: float | None = None,
        channels_last: bool = False,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.up = up
        self.down = down
        self.conv_clamp = check_clamp(conv_clamp)
        self.activation = lookup_activation(activation).name
        self.act_gain = lookup_activation(activation).gain
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.register_buffer("resample_filter", setup_filter(resample_filter))

        weight = initial_weight(in_channels, out_channels, kernel_size, channels_last)
        bias_values = torch.zeros(out_channels) if bias else None
        if trainable:
            self.weight = nn.Parameter(weight)
            self.bias = None if bias_values is None else nn.Parameter(bias_values)
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias_values)

    def forward(self, x: Tensor, gain: float = 1) -> Tensor:
        return conv2d_bias_act(
            x,
            (self.weight * self.weight_gain).to(x.dtype),
            self.resample_filter,
            up=self.up,
            down=self.down,
            padding=self.padding,
            flip_weight=self.up == 1,
            b=self.bias,
            act=self.activation,
            gain=self.act_gain * gain,
            clamp=None if self.conv_clamp is None else self.conv_clamp * gain,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}, activation={self.activation!r}, up={self.up}, "
            f"down={self.down}, conv_clamp={self.conv_clamp}"
        )
