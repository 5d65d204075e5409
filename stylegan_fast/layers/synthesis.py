"""Style-modulated layers of the StyleGAN2 generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..activations import activation as lookup_activation
from ..ops import modulated_conv2d, setup_filter
from ..ops.modulated_conv2d import styled_conv2d
from .checks import check_choice, check_clamp, check_shape
from .conv import initial_weight
from .linear import FullyConnectedLayer

NOISE_MODES = ("random", "const", "none")


class SynthesisLayer(nn.Module):
    """y = clamp(gain · gain_act · act(d ⊙ conv(s ⊙ x, weight) + noise_strength · noise + bias),
    ±conv_clamp · gain), one call of `modulated_conv2d`.

    s = affine(w) [N, I] are the styles and d [N, O] their demodulation coefficients; an upsampling
    layer rotates its weight by 180 degrees, as the originals do. gain_act is the activation's
    default gain (√2 for lrelu). noise is drawn anew ("random"), the buffer noise_const ("const") or
    absent ("none").

    x [N, I, resolution/up, resolution/up], w [N, w_dim] -> y [N, O, resolution, resolution], in the
    dtype and memory format of x. Differentiable twice. ValueError for another shape of x or w or an
    unknown noise_mode, KeyError for an unknown activation.
    """

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        kernel_size: int = 3,
        up: int = 1,
        use_noise: bool = True,
        activation: str = "lrelu",
        resample_filter: Sequence[float] | Tensor | None = (1, 3, 3, 1),
        conv_clamp: float | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.w_dim = w_dim
        self.resolution = resolution
        self.kernel_size = kernel_size
        self.up = up
        self.use_noise = use_noise
        self.conv_clamp = check_clamp(conv_clamp)
        self.activation = lookup_activation(activation).name
        self.act_gain = lookup_activation(activation).gain
        self.padding = kernel_size // 2
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        weight = initial_weight(in_channels, out_channels, kernel_size, channels_last)
        self.weight = nn.Parameter(weight)
        if use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        noise_mode: str = "random",
        fused_modconv: bool = True,
        gain: float = 1,
    ) -> Tensor:
        check_choice("noise_mode", noise_mode, NOISE_MODES)
        in_resolution = self.resolution // self.up
        check_shape("x", x, "N", self.in_channels, in_resolution, in_resolution)
        check_shape("w", w, x.shape[0], self.w_dim)
        noise = self._noise(x, noise_mode)
        return styled_conv2d(
            x,
            self.weight,
            self.affine(w),
            noise=noise,
            noise_strength=None if noise is None else self.noise_strength,
            up=self.up,
            padding=self.padding,
            resample_filter=self.resample_filter,
            flip_weight=self.up == 1,
            fused_modconv=fused_modconv,
            bias=self.bias.to(x.dtype),
            act=self.activation,
            gain=self.act_gain * gain,
            clamp=None if self.conv_clamp is None else self.conv_clamp * gain,
        )

    def _noise(self, x: Tensor, noise_mode: str) -> Tensor | None:
        if not self.use_noise or noise_mode == "none":
            return None
        if noise_mode == "const":
            return self.noise_const
        shape = (x.shape[0], 1, self.resolution, self.resolution)
        return torch.randn(shape, device=x.device, dtype=self.noise_strength.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, w_dim={self.w_dim}, "
            f"resolution={self.resolution}, kernel_size={self.kernel_size}, up={self.up}, "
            f"use_noise={self.use_noise}, activation={self.activation!r}, "
            f"conv_clamp={self.conv_clamp}"
        )


class ToRGBLayer(nn.Module):
    """y = clamp(conv(s ⊙ x, weight) + bias, ±conv_clamp), s = affine(w) / √(I·k²): not demodulated.

    x [N, I, H, W], w [N, w_dim] -> y [N, O, H, W], in the dtype and memory format of x.
    Differentiable twice. ValueError for another shape of x or w.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        kernel_size: int = 1,
        conv_clamp: float | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.w_dim = w_dim
        self.kernel_size = kernel_size
        self.conv_clamp = check_clamp(conv_clamp)
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        weight = initial_weight(in_channels, out_channels, kernel_size, channels_last)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x: Tensor, w: Tensor, fused_modconv: bool = True) -> Tensor:
        check_shape("x", x, "N", self.in_channels, "H", "W")
        check_shape("w", w, x.shape[0], self.w_dim)
        return modulated_conv2d(
            x,
            self.weight,
            self.affine(w) * self.weight_gain,
            demodulate=False,
            fused_modconv=fused_modconv,
            bias=self.bias.to(x.dtype),
            clamp=self.conv_clamp,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, w_dim={self.w_dim}, "
            f"kernel_size={self.kernel_size}, conv_clamp={self.conv_clamp}"
        )
