"""The style-modulated layers of the StyleGAN generator of 2018."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..activations import activation as lookup_activation
from ..ops import adain
from .checks import check_choice, check_shape
from .conv import Conv2dLayer
from .linear import FullyConnectedLayer
from .synthesis import NOISE_MODES


class StyleLayer(nn.Module):
    """y = AdaIN(act(x + noise_strength ⊙ noise + bias), affine(style)), one call of `adain`.

    affine(style) [N, 2C] holds the scales of the normalised channels, less 1, then their shifts.
    noise [N, 1, H, W] is drawn anew ("random"), the buffer noise_const ("const", where the layer
    was given its resolution) or absent ("none"). Parameters: affine, noise_strength [C] = 0 and
    bias [C] = 0.

    x [N, C, H, W], style [N, style_dim] -> y [N, C, H, W], in the dtype and memory format of x.
    Differentiable twice. ValueError for another shape or noise_mode, KeyError for an unknown
    activation.
    """

    noise_const: Tensor | None

    def __init__(
        self,
        channels: int,
        style_dim: int,
        activation: str = "lrelu",
        *,
        resolution: int | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.style_dim = style_dim
        self.resolution = resolution
        self.activation = lookup_activation(activation).name
        self.affine = FullyConnectedLayer(style_dim, 2 * channels)
        self.noise_strength = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        noise = None if resolution is None else torch.randn(resolution, resolution)
        self.register_buffer("noise_const", noise)

    def forward(self, x: Tensor, style: Tensor, noise_mode: str = "random") -> Tensor:
        check_choice("noise_mode", noise_mode, NOISE_MODES)
        size = "HW" if self.resolution is None else [self.resolution] * 2
        check_shape("x", x, "N", self.channels, *size)
        check_shape("style", style, x.shape[0], self.style_dim)
        noise = self._noise(x, noise_mode)
        return adain(
            x,
            self.affine(style),
            noise=noise,
            noise_strength=None if noise is None else self.noise_strength,
            b=self.bias,
            act=self.activation,
        )

    def _noise(self, x: Tensor, noise_mode: str) -> Tensor | None:
        if noise_mode == "none":
            return None
        if noise_mode == "random":
            samples, _, height, width = x.shape
            return torch.randn((samples, 1, height, width), device=x.device, dtype=x.dtype)
        if self.noise_const is None:
            raise ValueError("noise_mode='const' needs a layer that was given its resolution")
        return self.noise_const

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, style_dim={self.style_dim}, activation={self.activation!r}, "
            f"resolution={self.resolution}"
        )


class StyleBlock(nn.Module):
    """y = style(conv(x), w): a convolution without bias, then a `StyleLayer`.

    With `upsample`, the default, conv doubles the size: `resample_filter` is nearest-neighbour
    doubling and the blur in one, [1, 3, 3, 1] = [1, 1] * [1, 2, 1]. The blur commutes with the
    convolution, so this is the original's doubling, convolution and blur, in one pass of a filter;
    it differs in the outermost pixels, where the original's blur sees zeros instead of what the
    convolution gives beyond the border.

    x [N, in_channels, H, W], style [N, style_dim] -> y [N, out_channels, 2H, 2W], [N, out_channels,
    H, W] without `upsample`. Everything else as in `StyleLayer`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style_dim: int,
        upsample: bool = True,
        kernel_size: int = 3,
        activation: str = "lrelu",
        resample_filter: Sequence[float] | Tensor | None = (1, 3, 3, 1),
        *,
        resolution: int | None = None,
    ) -> None:
        super().__init__()
        self.conv = Conv2dLayer(
            in_channels,
            out_channels,
            kernel_size,
            bias=False,
            up=2 if upsample else 1,
            resample_filter=resample_filter,
        )
        self.style = StyleLayer(out_channels, style_dim, activation, resolution=resolution)

    def forward(self, x: Tensor, style: Tensor, noise_mode: str = "random") -> Tensor:
        check_shape("x", x, "N", self.conv.in_channels, "H", "W")
        return self.style(self.conv(x), style, noise_mode)
